"""Importance of a model's weights, measured by running it on calibration text: what llama.cpp's imatrix holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..formats.gguf import ImportanceFile, InputSquares
from ..models.experts import ExpertsForm, activation_of, experts_of, shell_of
from ..models.linears import as_linear
from ..texts import Windows, batches_of
from .experts import routed_rows


class _Sums:
    """Of squared inputs of a weight, a row for each expert."""

    def __init__(self, experts: int, width: int, device: torch.device) -> None:
        self.squares = torch.zeros(experts, width, device=device)
        self.counts = [0] * experts

    def add(self, rows: Tensor, expert: int = 0) -> None:
        self.squares[expert] += rows.float().square().sum(0)
        self.counts[expert] += len(rows)


def measure_importance(model: nn.Module, windows: Windows, dataset: str = "") -> ImportanceFile:
    """Sums of squared inputs of every plain linear layer that text runs through, by its name in the model (with ".weight"), and
    of stacked experts by their parameter's, each with the tokens that the router sends to it.

    Args:
        model: float, on one device, in memory.
        windows: token ids `[windows, seq_len]` (`texts.calibration_windows`).
        dataset: what the file says that it was measured on.

    Raises:
        CalibrationError: no token reached any, or inputs are NaN or infinite; the layer is named.
    """
    sums: dict[str, _Sums] = {}
    hooks: list[tuple[nn.Module, Callable[..., None]]] = []
    for name, module in model.named_modules():
        if (linear := as_linear(module)) is not None:
            sums[f"{name}.weight"] = found = _Sums(1, linear.in_features, linear.weight.device)
            hooks.append((module, _of_linear(found)))
    for name, form in experts_of(model).items():
        module = model.get_submodule(name)
        device = module.get_parameter(form.up).device
        up, down = (_Sums(form.experts, width, device) for width in (form.hidden, form.width))
        sums |= {f"{name}.{form.up}": up, f"{name}.{form.down}": down}
        hooks.append((module, _of_experts(module, form, up, down)))
    device = next(model.parameters()).device
    with torch.inference_mode(), _hooked(hooks):
        for group in windows:
            for batch in batches_of(group):
                model(batch.to(device))
    entries = {}
    for name, found in sums.items():
        if not any(found.counts):
            continue
        if not bool(found.squares.isfinite().all()):
            raise CalibrationError(
                f"the inputs of {name.removesuffix('.weight')} are NaN or infinite during calibration, or overflow when squared; "
                "check the model on this text in a wider dtype"
            )
        entries[name] = InputSquares(found.squares.cpu().clone(), torch.tensor(found.counts, dtype=torch.float32))
    if not entries:
        raise CalibrationError("calibration sent no token through a linear layer; give more calibration text")
    return ImportanceFile(entries, (dataset,) * bool(dataset), sum(map(len, windows)), max(g.shape[1] for g in windows))


def _of_linear(sums: _Sums) -> Callable[..., None]:
    return lambda module, args, kwargs: sums.add(args[0].detach().reshape(-1, args[0].shape[-1]))


def _of_experts(module: Any, form: ExpertsForm, up: _Sums, down: _Sums) -> Callable[..., None]:
    """What goes into both projections; down's inputs are computed once more, from the weights of up."""
    between = activation_of(shell_of(module), form)
    stored = module._parameters.get(f"{form.up}_bias")
    bias = None if stored is None else form.in_halves(stored.data, -1)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, ids = routed_rows(form, args, kwargs)
        for expert in ids.unique().tolist():
            rows = x[(ids == expert).any(1)]
            weight = form.of_projection(form.up, module.get_parameter(form.up)[expert])
            product = rows @ weight.T
            up.add(rows, expert)
            down.add(between(product if bias is None else product + bias[expert]), expert)

    return hook


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Hooks that see keywords too, before the forward of modules, for a while."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
