"""What a fold is: a scale on the input channels of linear layers that is taken out of the layer before, so that the block
computes what it did. Which folds a block has, `tracing` finds out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.architectures import Fold
from ..models.experts import stack_at
from ..models.linears import as_linear, linear_of
from ..quantizers.awq import fold_into_norm, fold_into_rows


@dataclass(frozen=True)
class HeadSharing:
    """How the input channels of a linear layer follow from the channels of what feeds it: with grouped-query attention,
    `repeats` heads of `width` channels in a row read the same value head and must share its scales."""

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


@dataclass(frozen=True)
class ProvedFold:
    """A fold of which it was seen that the block computes what it did.

    Args:
        unit_offset: the source is a norm that multiplies by 1 + weight.
        sharing: how the targets' input channels follow from the source's output channels.
    """

    fold: Fold
    unit_offset: bool = False
    sharing: HeadSharing = HeadSharing()


@dataclass(frozen=True)
class Refusal:
    """A norm or linear layer whose output channels cannot be scaled, the linear layers that read it, and why."""

    source: str
    readers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Folds:
    """The folds of a block, in the order of its forward pass; and what was tried besides."""

    proved: tuple[ProvedFold, ...] = ()
    refused: tuple[Refusal, ...] = ()

    def why_unscaled(self, target: str) -> str | None:
        """Why the input channels of a linear layer cannot be scaled; None where they can."""
        if any(target in found.fold.targets for found in self.proved):
            return None
        near = [f"{refusal.source}: {refusal.reason}" for refusal in self.refused if target in refusal.readers]
        return near[-1] if near else "no norm or linear layer of its block feeds it, up to a scale per channel"


def reader_of(layer: nn.Module, target: str) -> str:
    """The module that reads a target's input: itself, but for stacked experts ("….experts.gate_up_proj"), which their module
    reads."""
    stack = stack_at(layer, target)
    return target if stack is None else stack[0]


def input_weight(layer: nn.Module, target: str) -> Tensor:
    """A target's weight with its input channels last, as a view: `[N, K]` of a linear layer or a router, `[E, N, K]` of stacked
    experts, their rows as they lie."""
    stack = stack_at(layer, target)
    if stack is not None:
        experts, form, projection = stack
        stored: Tensor = layer.get_submodule(experts)._parameters[projection].data  # type: ignore[union-attr]
        return stored.transpose(-1, -2) if form.transposed else stored
    module = layer.get_submodule(target)
    if as_linear(module) is not None:
        return linear_of(layer, target).weight.data
    return next(p.data for p in module.parameters(recurse=False) if p.dim() == 2)


def apply_fold(layer: nn.Module, found: ProvedFold, scales: Tensor, stored_dtype: torch.dtype) -> None:
    """Divide the source's output channels by `scales` and multiply the targets' input channels, in place.

    Args:
        stored_dtype: of the source's weight in the checkpoint: a norm's new gain is rounded to it, and the targets make up for
            that.
    """
    source = layer.get_submodule(found.fold.source)
    linear = as_linear(source)
    weight: Tensor = source.weight.data if linear is None else linear.weight.data  # type: ignore[assignment]
    bias: Tensor | None = None if getattr(source, "bias", None) is None else source.bias.data  # type: ignore[assignment]
    if linear is not None:
        new_weight, new_bias = fold_into_rows(weight, bias, scales)
    else:
        new_weight, new_bias, scales = fold_into_norm(weight, bias, scales, stored_dtype, found.unit_offset)
    weight.copy_(new_weight)
    if bias is not None and new_bias is not None:
        bias.copy_(new_bias)
    for target in found.fold.targets:
        input_weight(layer, target).mul_(found.sharing.spread(scales))
