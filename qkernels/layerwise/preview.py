"""What a run needs, told from headers alone."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..models.architectures import block_lists, expected_folds, text_config
from ..models.experts import ExpertsForm, experts_of, parameter_of, stack_at
from ..models.linears import linear_of
from ..quantizers import RTN, Options
from ..reports import MIB, ModulePreview, QuantPreview
from ..storage.files import SHARD_BYTES
from ..tensor import QuantTensor
from .walking import held_bytes
from .work import work_path

FILE_BYTES = 16 * 1024  # allowed for headers, configs and reports, a linear layer


def preview_of(
    checkpoint: Checkpoint,
    model: nn.Module,
    method: Options,
    methods: Mapping[str, Options],
    skipped: Mapping[str, str],
    samples: int,
    seq_len: int,
) -> QuantPreview:
    """What a run takes for a checkpoint, its model on meta, and the method of every layer that is chosen.

    Args:
        methods: by the name of the linear layer; at least one.
        skipped: the reasons for all other matrices.
        samples, seq_len: how many calibration windows there will be, and tokens in each; for methods that need them.
    """
    modules = tuple(
        _previewed(checkpoint, _shape(model, name), name, parameter_of(model, name), chosen)
        for name, chosen in methods.items()
    )
    before = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    after = before - sum(module.bytes_before - module.bytes_after for module in modules)
    widest = max(module.shape[0] * module.shape[1] for module in modules)
    activations, device_bytes, moments = 0, 4 * widest, 0
    if method.needs == "moments":
        layers = [layer for blocks in block_lists(model).values() for layer in blocks]
        config: Any = text_config(model)
        activations = (
            samples * seq_len * checkpoint.dtype(parameter_of(model, modules[0].name)).itemsize * config.hidden_size
        )
        lanes = (
            2 if any(chosen.aims for chosen in methods.values()) else 1
        )  # the layer and the model as they came, beside
        activations *= lanes
        largest = lanes * max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
        # in fp32: the layer, the second moments of its widest input, and two matrices of that size while they are factored
        moments = 4 * 3 * max(module.shape[1] for module in modules) ** 2
        device_bytes = 4 * largest + moments
        widths = {module.shape[1] for module in modules if stack_at(model, module.name) is None}
        held = lanes * max((held_bytes(samples * seq_len, config.hidden_size, width) for width in widths), default=0)
        forms = [experts_of(layer) for layer in layers]
        if found := [form for of_layer in forms for form in of_layer.values()]:
            moments += 4 * found[0].hidden ** 2  # of all tokens, beside those of an expert
            device_bytes += 4 * found[0].hidden ** 2
            # what goes into experts, for all of the calibration, when nothing is held any more; codes of both projections, one of
            # them once more while stacked
            of_experts = 4 * samples * seq_len * found[0].hidden
            held = max(held, of_experts + max(sum(_codes(form) for form in of_layer.values()) for of_layer in forms))
        device_bytes += held
    # The result, the finished layers beside it, one shard once more while its header is put before it, and the activations of
    # two layers while one replaces the other.
    disk = 2 * after + min(after, SHARD_BYTES) + 2 * activations + FILE_BYTES * len(modules)
    scales = _where_scales_go(model) if method.folds else None
    return QuantPreview(method.name, modules, skipped, before, after, activations, device_bytes, disk, scales, moments)


def _codes(form: ExpertsForm) -> int:
    """Bytes of an experts module's unpacked codes while its up projection is stacked."""
    up, down = (form.experts * math.prod(form.shape(projection)) for projection in (form.up, form.down))
    return 2 * up + down


def _where_scales_go(model: nn.Module) -> str:
    """What can be said of it without weights."""
    model_type = getattr(text_config(model), "model_type", None) or type(model).__name__
    folds = "; ".join(f"{fold.source} -> {', '.join(fold.targets)}" for fold in expected_folds(model))
    if folds:
        return f"expected of {model_type}, and proved on each layer when it is at hand: {folds}"
    return (
        f"nothing is known of {model_type}: what takes a scale is found and proved on each layer when it is at hand, and the run "
        f"ends before the first is quantized if nothing does"
    )


def check_disk(preview: QuantPreview, target: str | os.PathLike[str]) -> None:
    """Raise where the disk of a target has less room than a run needs, what an interrupted one has written counted as room.

    Raises:
        CheckpointError: says how much is needed and how much there is.
    """
    path = Path(target).expanduser().resolve()
    existing = next(parent for parent in path.parents if parent.exists())
    try:
        free = shutil.disk_usage(existing).free
        kept = sum(file.stat().st_size for file in work_path(target).rglob("*") if file.is_file())
    except OSError as error:
        raise CheckpointError(f"cannot tell how much room {existing} has: {error}") from error
    if free + kept < preview.disk_bytes:
        raise CheckpointError(
            f"{target} needs {preview.disk_bytes * MIB:.0f} MiB of disk while it is made (the result, the finished layers beside "
            f"it and activations), and {(free + kept) * MIB:.0f} MiB are free; free some, choose another target, or take fewer "
            f"samples"
        )


@lru_cache(maxsize=256)
def as_quantized(shape: tuple[int, ...], dtype: torch.dtype, method: Options) -> QuantTensor:
    """What a method makes of a weight `[..., N, K]`, on meta: shapes without values. 30 ms a shape, and models have few."""
    rounding = RTN(scale_dtype=method.scale_dtype).with_scheme(method.scheme)
    return rounding.quantize(torch.empty(shape, dtype=dtype, device="meta"))


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """`[N, K]`, or `[E, N, K]` of stacked experts."""
    found = stack_at(model, name)
    if found is None:
        return tuple(linear_of(model, name).weight.shape)
    _, form, projection = found
    return (form.experts, *form.shape(projection))


def _previewed(
    checkpoint: Checkpoint, shape: tuple[int, ...], name: str, parameter: str, method: Options
) -> ModulePreview:
    """Sizes without weights: quantizing a meta tensor gives the shapes."""
    dtype = checkpoint.dtype(parameter)
    result = as_quantized(shape, dtype, method)
    nbytes = result.nbytes + (4 * result.K if method.orders_columns and len(shape) == 2 else 0)
    return ModulePreview(name, (result.N, result.K), str(method.scheme), math.prod(shape) * dtype.itemsize, nbytes)
