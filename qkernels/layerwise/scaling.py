"""Scales folded into what feeds a linear layer. A method says whether it searches them, as AWQ does (Lin et al. 2023,
section 3.2), or computes them, as SmoothQuant does (Xiao et al. 2022, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import Options
from ..quantizers.awq import ScaleChoice, search, weight_magnitude
from ..quantizers.grid import checked_weight
from ..quantizers.options import ScaleRule, ScaleSearch
from .folds import ProvedFold, apply_fold, input_weight
from .running import (
    LayerInputs,
    LayerJob,
    Place,
    Stop,
    collect_statistics,
    first_output,
    map_tensors,
    run_to_stop,
    unused,
)

Loss = Callable[[Tensor, range], float]  # of scales [K], over some of the batches


def fold_scales(
    layer: nn.Module, found: ProvedFold, methods: Mapping[str, Options], inputs: LayerInputs, job: LayerJob
) -> None:
    """Scale the inputs of one fold as the methods of its targets say, in place: the layer still computes what it did.

    Args:
        methods: those of all linear layers that will be quantized, by their names in the layer.
    """
    own = {target: methods[target] for target in found.fold.targets if target in methods}
    searches = {target: scales for target, method in own.items() if (scales := method.scale_search()) is not None}
    if searches:
        scale_inputs(layer, found, searches, inputs, job)
    rule = next((rule for method in own.values() if (rule := method.scale_rule()) is not None), None)
    if rule is not None:
        smooth_inputs(layer, found, rule, inputs, job)


def scale_inputs(
    layer: nn.Module, found: ProvedFold, methods: Mapping[str, ScaleSearch], inputs: LayerInputs, job: LayerJob
) -> ScaleChoice:
    """Search the scale of one fold and apply it, in place: the layer still computes what it did.

    Args:
        layer: on the compute device.
        methods: for those of the fold's targets that will be quantized; at least one. The others are scaled too, since
            they read the same input, but have no say in how.
    """
    fold = found.fold
    method = next(iter(methods.values()))
    inputs = inputs.first(method.search_tokens)
    first = next(iter(methods))
    alone = fold.parent is None and len(methods) == 1
    statistics = collect_statistics(layer, [first], inputs, job.place, moments=alone)[first]
    weights = {target: _checked(layer, target, job.name).clone() for target in methods}
    magnitude = statistics.mean_magnitude(f"{job.name}.{fold.targets[0]}")
    rows = [weight.flatten(0, -2) for weight in weights.values()]
    of_weights = weight_magnitude(rows, method.scheme.group_length(len(magnitude)))
    sharing = found.sharing
    candidates = method.candidates(sharing.gather(magnitude), sharing.gather(of_weights))
    if alone:
        loss, batches = _own_loss(weights, methods, statistics.hessian(job.name)), 1
    else:
        loss, batches = _parent_loss(layer, fold.parent or "", weights, methods, inputs, job.place)
    choice = search(candidates, lambda scales, part: loss(sharing.spread(scales), part), batches)
    apply_fold(layer, found, choice.scales, job.stored[f"{fold.source}.weight"])
    return choice


def smooth_inputs(layer: nn.Module, found: ProvedFold, method: ScaleRule, inputs: LayerInputs, job: LayerJob) -> Tensor:
    """Apply the computed scale of one fold, in place: the layer still computes what it did. Returns the scales of the
    source's output channels.

    Every target of the fold counts, whether it will be quantized or not: all of them read the scaled input. Where several
    input channels share a source channel (grouped-query attention), the loudest of them decides.

    Args: as for `scale_inputs`.
    """
    fold = found.fold
    first = fold.targets[0]
    statistics = collect_statistics(layer, [first], inputs, job.place, moments=False)[first]
    largest = statistics.largest_magnitude(f"{job.name}.{first}")
    weights = [_checked(layer, target, job.name) for target in fold.targets]
    of_weights = torch.stack([weight.abs().flatten(0, -2).amax(0) for weight in weights]).amax(0)
    scales = method.scales(found.sharing.largest(largest), found.sharing.largest(of_weights))
    apply_fold(layer, found, scales, job.stored[f"{fold.source}.weight"])
    return scales


def _checked(layer: nn.Module, target: str, name: str) -> Tensor:
    weight = input_weight(layer, target)
    checked_weight(weight.flatten(0, -2), f"{name}.{target}.weight")
    return weight


def _rounded(method: ScaleSearch, weight: Tensor, scales: Tensor) -> Tensor:
    """As `method.rounded`; of stacked experts, each by itself."""
    if weight.dim() == 2:
        return method.rounded(weight, scales)
    return torch.stack([method.rounded(expert, scales) for expert in weight])


def _own_loss(weights: Mapping[str, Tensor], methods: Mapping[str, ScaleSearch], hessian: Tensor) -> Loss:
    """The squared output error of a single linear layer, from the second moments of its input: no forward pass."""
    (name,) = weights

    def loss(scales: Tensor, part: range) -> float:
        difference = methods[name].rounded(weights[name], scales) - weights[name]
        return float(((difference @ hessian) * difference).sum())

    return loss


def _parent_loss(
    layer: nn.Module,
    parent: str,
    weights: Mapping[str, Tensor],
    methods: Mapping[str, ScaleSearch],
    inputs: LayerInputs,
    place: Place,
) -> tuple[Loss, int]:
    """The squared error of a block's output, by running the block on what the layer calls it with; and how many calls those
    are."""
    block = layer.get_submodule(parent)
    calls: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(map_tensors((args, kwargs), lambda t: t.cpu()))
        raise Stop

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run_to_stop(layer, inputs, place)
    finally:
        handle.remove()

    def output(call: int) -> Tensor:
        args, kwargs = calls[call]
        return first_output(block(*place.move(unused(args)), **place.move(unused(kwargs))))

    expected = [output(call).cpu() for call in range(len(calls))]

    def loss(scales: Tensor, part: range) -> float:
        for name, weight in weights.items():
            input_weight(layer, name).copy_(_rounded(methods[name], weight, scales))
        total = 0.0
        for call in part:
            got = output(call)
            total += float((got - expected[call].to(got.device)).float().square().sum())
        for name, weight in weights.items():
            input_weight(layer, name).copy_(weight)
        return total

    return loss, len(calls)
