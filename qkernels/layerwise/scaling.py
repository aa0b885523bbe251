"""Scales folded into what feeds a linear layer. A method says whether it searches them, as AWQ does (Lin et al. 2023,
section 3.2), or computes them, as SmoothQuant does (Xiao et al. 2022, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import Fold
from ..models.linears import linear_of, set_weight
from ..quantizers import Options
from ..quantizers.awq import ScaleChoice, fold_into_norm, fold_into_rows, search, weight_magnitude
from ..quantizers.grid import checked_weight
from ..quantizers.options import ScaleRule, ScaleSearch
from .running import LayerInputs, LayerJob, Place, Stop, collect_statistics, first_output, map_tensors, run_to_stop


@dataclass(frozen=True)
class HeadSharing:
    """How the input channels of an output projection follow from the channels of the value projection: with grouped-query
    attention, `repeats` heads of `width` channels in a row read the same value head and must share its scales."""

    repeats: int = 1
    width: int = 1

    def gather(self, channels: Tensor) -> Tensor:
        """`[K]` -> `[K / repeats]`: the mean over the channels that share a source."""
        return channels.view(-1, self.repeats, self.width).mean(1).flatten()

    def largest(self, channels: Tensor) -> Tensor:
        """`[K]` -> `[K / repeats]`: the largest of the channels that share a source."""
        return channels.view(-1, self.repeats, self.width).amax(1).flatten()

    def spread(self, channels: Tensor) -> Tensor:
        """`[K / repeats]` -> `[K]`: each source channel's value for all that read it."""
        return channels.view(-1, 1, self.width).expand(-1, self.repeats, -1).flatten()


def fold_scales(
    layer: nn.Module, fold: Fold, methods: Mapping[str, Options], inputs: LayerInputs, job: LayerJob
) -> None:
    """Scale the inputs of one fold as the methods of its targets say, in place: the layer still computes what it did.

    Args:
        methods: those of all linear layers that will be quantized, by their names in the layer.
    """
    own = {target: methods[target] for target in fold.targets if target in methods}
    searches = {target: found for target, method in own.items() if (found := method.scale_search()) is not None}
    if searches:
        scale_inputs(layer, fold, searches, inputs, job)
    rule = next((rule for method in own.values() if (rule := method.scale_rule()) is not None), None)
    if rule is not None:
        smooth_inputs(layer, fold, rule, inputs, job)


def scale_inputs(
    layer: nn.Module, fold: Fold, methods: Mapping[str, ScaleSearch], inputs: LayerInputs, job: LayerJob
) -> ScaleChoice:
    """Search the scale of one fold and apply it, in place: the layer still computes what it did.

    Args:
        layer: on the compute device.
        methods: for those of the fold's targets that will be quantized; at least one. The others are scaled too, since
            they read the same input, but have no say in how.
        job: with the architecture that the fold is of.
    """
    method = next(iter(methods.values()))
    inputs = inputs.first(method.search_tokens)
    statistics = collect_statistics(layer, [next(iter(methods))], inputs, job.place)[next(iter(methods))]
    weights = {
        target: checked_weight(linear_of(layer, target).weight.data, f"{job.name}.{target}.weight").clone()
        for target in methods
    }
    magnitude = statistics.mean_magnitude(f"{job.name}.{fold.targets[0]}")
    of_weights = weight_magnitude(list(weights.values()), method.scheme.group_length(len(magnitude)))
    sharing = _head_sharing(layer.get_submodule(fold.source), len(magnitude), job.head_dim)
    candidates = method.candidates(sharing.gather(magnitude), sharing.gather(of_weights))
    if fold.parent is None and len(weights) == 1:
        loss = _own_loss(weights, methods, statistics.hessian(job.name))
    else:
        loss = _parent_loss(layer, fold.parent or "", weights, methods, inputs, job.place)
    choice = search(candidates, lambda scales: loss(sharing.spread(scales)))
    apply_fold(layer, fold, choice.scales, sharing, *_of_source(job, fold))
    return choice


def smooth_inputs(layer: nn.Module, fold: Fold, method: ScaleRule, inputs: LayerInputs, job: LayerJob) -> Tensor:
    """Apply the computed scale of one fold, in place: the layer still computes what it did. Returns the scales of the
    source's output channels.

    Every target of the fold counts, whether it will be quantized or not: all of them read the scaled input. Where several
    input channels share a source channel (grouped-query attention), the loudest of them decides.

    Args: as for `scale_inputs`.
    """
    first = fold.targets[0]
    statistics = collect_statistics(layer, [first], inputs, job.place)[first]
    largest = statistics.largest_magnitude(f"{job.name}.{first}")
    weights = [checked_weight(linear_of(layer, t).weight.data, f"{job.name}.{t}.weight") for t in fold.targets]
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    sharing = _head_sharing(layer.get_submodule(fold.source), len(largest), job.head_dim)
    scales = method.scales(sharing.largest(largest), sharing.largest(of_weights))
    apply_fold(layer, fold, scales, sharing, *_of_source(job, fold))
    return scales


def apply_fold(
    layer: nn.Module, fold: Fold, scales: Tensor, sharing: HeadSharing, unit_offset: bool, stored_dtype: torch.dtype
) -> None:
    """Divide the source's output channels by `scales` and multiply the targets' input channels, in place."""
    source: Any = layer.get_submodule(fold.source)
    old_bias: Tensor | None = None if getattr(source, "bias", None) is None else source.bias.data
    if isinstance(source, nn.Linear):
        weight, new_bias = fold_into_rows(source.weight.data, old_bias, scales)
    else:
        weight, new_bias, scales = fold_into_norm(source.weight.data, old_bias, scales, stored_dtype, unit_offset)
    source.weight.data.copy_(weight)
    if new_bias is not None:
        source.bias.data.copy_(new_bias)
    for target in fold.targets:
        linear_of(layer, target).weight.data.mul_(sharing.spread(scales))


def _of_source(job: LayerJob, fold: Fold) -> tuple[bool, torch.dtype]:
    """Of a fold's source: whether norms multiply by 1 + weight, and the dtype in the checkpoint."""
    return job.architecture is not None and job.architecture.unit_offset_norms, job.stored[f"{fold.source}.weight"]


def _head_sharing(source: nn.Module, channels: int, head_dim: int) -> HeadSharing:
    if isinstance(source, nn.Linear) and source.out_features != channels:
        return HeadSharing(channels // source.out_features, head_dim)
    return HeadSharing()


def _own_loss(
    weights: Mapping[str, Tensor], methods: Mapping[str, ScaleSearch], hessian: Tensor
) -> Callable[[Tensor], float]:
    """The squared output error of a single linear layer, from the second moments of its input: no forward pass."""
    (name,) = weights

    def loss(scales: Tensor) -> float:
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
) -> Callable[[Tensor], float]:
    """The squared error of a block's output, by running the block on what the layer calls it with."""
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

    def outputs() -> Iterator[Tensor]:
        for args, kwargs in calls:
            yield first_output(block(*place.move(args), **place.move(kwargs)))

    expected = [output.cpu() for output in outputs()]

    def loss(scales: Tensor) -> float:
        for name, weight in weights.items():
            set_weight(layer, name, methods[name].rounded(weight, scales))
        pairs = zip(outputs(), expected, strict=True)
        total = sum(float((output - right.to(output.device)).float().square().sum()) for output, right in pairs)
        for name, weight in weights.items():
            set_weight(layer, name, weight)
        return total

    return loss
