"""Importance of a model's weights, measured by running it on calibration text: what llama.cpp's imatrix holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..formats.gguf import ImportanceFile, InputSquares
from ..models.linears import as_linear
from ..texts import Windows, batches_of
from .running import Hook, pre_hooks


def measure_importance(model: nn.Module, windows: Windows, dataset: str = "") -> ImportanceFile:
    """Sums of squared inputs of every plain linear layer that text runs through, by its name in the model (with ".weight").

    Args:
        model: float, on one device, in memory.
        windows: token ids `[windows, seq_len]` (`texts.calibration_windows`).
        dataset: what the file says that it was measured on.

    Raises:
        CalibrationError: no token reached any, or inputs are NaN or infinite; the layer is named.
    """
    layers = {name: as_linear(module) for name, module in model.named_modules()}
    linears = {name: linear for name, linear in layers.items() if linear is not None}
    sums = {name: torch.zeros(linear.in_features, device=linear.weight.device) for name, linear in linears.items()}
    counts = dict.fromkeys(linears, 0)

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            sums[name] += rows.square().sum(0)
            counts[name] += len(rows)

        return hook

    device = next(model.parameters()).device
    with torch.inference_mode(), pre_hooks(model, {name: watch(name) for name in linears}):
        for group in windows:
            for batch in batches_of(group):
                model(batch.to(device))
    entries = {}
    for name in linears:
        if not counts[name]:
            continue
        if not bool(sums[name].isfinite().all()):
            raise CalibrationError(
                f"the inputs of {name} are NaN or infinite during calibration, or overflow when squared; check the model on this "
                "text in a wider dtype"
            )
        total = sums[name].cpu().clone()
        entries[f"{name}.weight"] = InputSquares(total[None], torch.tensor([float(counts[name])]))
    if not entries:
        raise CalibrationError("calibration sent no token through a linear layer; give more calibration text")
    return ImportanceFile(entries, (dataset,) * bool(dataset), sum(map(len, windows)), max(g.shape[1] for g in windows))
