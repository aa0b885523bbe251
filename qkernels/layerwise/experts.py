"""Stacked experts of a decoder layer, quantized one expert at a time, given the tokens that the router sends to each, or all.

What went into the experts module is kept for all of the calibration (one `[tokens, H]` more than the layer's own inputs); the
second moments of an expert's rows are made when its turn comes, so one Hessian is in memory, whatever their number (two where
all tokens go through every expert: that of up is the same for all of them then). Down sees what the quantized up puts out.
Errors in the report are of the tokens that the router sends, whatever the calibration saw. An expert that gets few tokens is
calibrated with all of them and listed (`FEW`). No order of columns is written: it would be another one for each expert, which no
grouped kernel takes, so GPTQ's "group" is "static" here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.experts import ExpertsForm, activation_of, shell_of
from ..quantizers import InputStatistics, Options, rounding_of
from ..tensor import QuantTensor
from .running import LayerInputs, LayerJob, Stop, run_to_stop

log = logging.getLogger(__name__)

# An expert that gets fewer tokens than so many times its input channels is calibrated with others, too: tokens taken evenly
# from all, up to the second number of times. Measured: docs/decisions/0021.
FEW: Final = 4
ENOUGH: Final = 16
ROWS_AT_ONCE: Final = 8192  # of activations in float32


Pair = tuple[Tensor, Tensor | None]  # rows x̂, and x of the same tokens in the model as it came


@dataclass(frozen=True)
class QuantizedStack:
    """One projection of all experts: see `quantizing.Quantized`."""

    tensor: QuantTensor
    method: str
    error: float
    seconds: float
    fallback: str | None
    few: str | None


@dataclass
class _Sums:
    """What is collected over the experts of a projection."""

    weights: list[QuantTensor]
    rare: dict[int, int]
    error: float = 0.0
    energy: float = 0.0
    seconds: float = 0.0


def quantize_experts(
    layer: nn.Module,
    leaf: str,
    form: ExpertsForm,
    methods: Mapping[str, Options],
    inputs: LayerInputs,
    job: LayerJob,
    twin: nn.Module | None = None,
) -> dict[str, QuantizedStack]:
    """Quantize an experts module of a decoder layer, which then holds the dequantized weights.

    Args:
        leaf: its name in the layer.
        methods: of each projection.
        twin: the layer as it came, where `inputs` has what goes into that, too.

    Returns:
        by projection.
    """
    source: Any = layer.get_submodule(leaf)
    x, ids = _seen(layer, leaf, form, inputs, job)
    exact = x
    if twin is not None and form.routed:  # else rows are of the tokens that each model's own router sends
        exact, _ = _seen(twin, leaf, form, inputs.of_the_model(), job)
    between = activation_of(shell_of(source), form)
    methods = {p: m.with_one_order().with_scales_for(job.stored[f"{leaf}.{p}"]) for p, m in methods.items()}
    sums = {p: _Sums([], {}) for p in methods}
    few = {expert: int((ids == expert).any(1).sum()) for expert in range(form.experts)}
    every = slice(None)
    if job.routing == "routed":
        few = {expert: count for expert, count in few.items() if count < FEW * form.hidden}
        every = slice(None, None, -(-len(x) // (ENOUGH * form.hidden)) or 1)

    def pairs(rows: Any) -> list[Pair]:
        """Rows of x̂ and, where it is known, of x."""
        own = x[rows].split(ROWS_AT_ONCE)
        return (
            [(part, None) for part in own] if exact is x else [*zip(own, exact[rows].split(ROWS_AT_ONCE), strict=True)]
        )

    everywhere = _moments(pairs(every), form.hidden) if few else None
    bias = source._parameters.get(f"{form.up}_bias")
    halves = None if bias is None else form.in_halves(bias.data, -1).float()
    projections: tuple[str, str] = (form.up, form.down)
    for expert in range(form.experts):
        sent = (ids == expert).any(1)
        rows, given = x[sent].float(), pairs(every if expert in few else sent)
        moments = everywhere if expert in few and everywhere is not None else _moments(given, form.hidden)
        for projection in projections:
            name = f"{job.name}.{leaf}.{projection}[{expert}]"
            place = source._parameters[projection].data[expert]
            weight = form.of_projection(projection, place).float()
            made = _one(weight, rows, moments, methods[projection], name, sums[projection], expert)
            place.copy_(form.stored(projection, made))
            if projection == form.up:
                bias_of_one = None if halves is None else halves[expert]

                def inner(part: Tensor, up: Tensor = made, bias: Tensor | None = bias_of_one) -> Tensor:
                    product = part.float() @ up.T
                    return between(product if bias is None else product + bias).float()

                def inner_pair(pair: Pair, up: Tensor = weight) -> Pair:
                    return inner(pair[0]), None if pair[1] is None else inner(pair[1], up)

                moments = _moments(map(inner_pair, given), form.width)
                rows = inner(rows)
    said = None
    if few and job.routing == "routed":
        said = (
            f"{len(few)} of {form.experts} experts saw fewer than {FEW * form.hidden} of {len(x)} tokens, and are calibrated "
            f"with {len(x[every])} of all: {_listed(few)}"
        )
        log.warning("%s.%s: %s", job.name, leaf, said)
    return {p: _result(sums[p], methods[p], f"{job.name}.{leaf}.{p}", said) for p in sums}


def _seen(layer: nn.Module, leaf: str, form: ExpertsForm, inputs: LayerInputs, job: LayerJob) -> tuple[Tensor, Tensor]:
    """What goes into the experts over all batches: rows `[tokens, H]`, and the experts of each `[tokens, k]`."""
    rows, ids = [], []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, chosen = routed_rows(form, args, kwargs)
        rows.append(x)
        ids.append(chosen)
        raise Stop

    handle = layer.get_submodule(leaf).register_forward_pre_hook(watch, with_kwargs=True)
    try:
        run_to_stop(layer, inputs, job.place)
    finally:
        handle.remove()
    if not rows:
        device = next(layer.parameters()).device
        return torch.zeros(0, form.hidden, device=device), torch.zeros(0, 1, dtype=torch.int64, device=device)
    return torch.cat(rows), torch.cat(ids)


def routed_rows(form: ExpertsForm, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Of a call of an experts module: rows `[tokens, H]`, and the experts of each `[tokens, k]`."""
    given = [*args, *kwargs.values()]
    x = given[0].detach().reshape(-1, form.hidden)
    if form.routed:
        return x, given[1].detach()
    owner = torch.arange(form.experts, device=x.device).repeat_interleave(x.shape[0] // form.experts)
    chosen = (x != 0).any(1)  # rows of tokens that an expert was not chosen for are 0
    return x[chosen], owner[chosen, None]


def _moments(pairs: Iterable[Pair], width: int) -> InputStatistics:
    statistics = None
    for part, exact in pairs:
        statistics = InputStatistics(width, part.device) if statistics is None else statistics
        statistics.update(part, exact)
    return InputStatistics(width) if statistics is None else statistics


def _one(
    weight: Tensor,
    rows: Tensor,
    statistics: InputStatistics,
    method: Options,
    name: str,
    sums: _Sums,
    expert: int,
) -> Tensor:
    """Quantize one expert's weight; returns it dequantized."""
    began = time.perf_counter()
    try:
        tensor = method.for_inputs(statistics.hessian(name), statistics.cross(), name)(weight, name)
    except CalibrationError as hopeless:
        log.debug("%s is rounded to nearest: %s", name, hopeless)
        sums.rare[expert] = statistics.tokens
        tensor = rounding_of(method).quantize(weight, name=name)
    restored = tensor.dequantize()
    sums.weights.append(tensor)
    sums.error += float((rows @ (restored - weight).T).square().sum())
    sums.energy += float((rows @ weight.T).square().sum())
    sums.seconds += time.perf_counter() - began
    return restored


def _listed(counts: Mapping[int, int]) -> str:
    some = ", ".join(f"{expert} ({count} tokens)" for expert, count in [*counts.items()][:8])
    return some + (", …" if len(counts) > 8 else "")


def _result(sums: _Sums, method: Options, name: str, few: str | None) -> QuantizedStack:
    fallback = None
    if sums.rare:
        fallback = (
            f"{len(sums.rare)} of {len(sums.weights)} experts saw no tokens, or none that tell their columns apart, and are "
            f"rounded to nearest: {_listed(sums.rare)}"
        )
        log.warning("%s: %s", name, fallback)
    error = (sums.error / sums.energy) ** 0.5 if sums.energy > 0 else 0.0
    used = rounding_of(method).name if len(sums.rare) == len(sums.weights) else method.name
    return QuantizedStack(QuantTensor.stack(sums.weights), used, error, sums.seconds, fallback, few)
