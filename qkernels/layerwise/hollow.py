"""Whether a model can be calibrated block by block, asked before any work and of headers alone.

The run itself finds out as it goes (`capturing`): that a block is called twice, or reads what a block long before it put out.
By then half of the model may be quantized. So a hollow model goes through the whole run first: the same passes on a few
tokens, with weights that are one number each, spread over the shape of the weight, and so take no memory. Which blocks run,
in which order, on whose outputs, does not depend on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..evaluate import evaluating
from ..models.architectures import block_lists, shared_blocks, text_config
from ..models.linears import scaled_in_place
from .capturing import Progress, feeders, next_chain
from .running import Call, Place, map_tensors

_TOKENS = 8
_NUMBER = 1 / 64  # not 0, which some models divide by


def check_calibratable(model: nn.Module) -> None:
    """Raise, before any work, where a model cannot be calibrated block by block on token ids.

    Args:
        model: may be on meta; not changed.

    Raises:
        ArgumentError: it has no blocks, does not take token ids, or has one block in several places.
        CalibrationError: it runs none of its blocks on token ids, one of them several times, or one on what blocks long before
            it put out.
    """
    block_lists(model)
    feeders(model)
    if (pair := shared_blocks(model)) is not None:
        raise ArgumentError(
            f"{type(model).__name__} uses one block in several places ({pair[0]} is {pair[1]}), and calibration layer by layer "
            f"would quantize it before it has seen all its inputs; use RTN, HQQ or NF4, which need no calibration"
        )
    if scaled := scaled_in_place(model):
        name, reason = next(iter(scaled.items()))
        raise ArgumentError(
            f"{name} cannot be calibrated: {reason}, before its inputs are what they will be; use RTN, HQQ or NF4, which need no "
            f"calibration"
        )
    hooked = any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )  # accelerate would put weights where ours are
    if not hooked and not any(buffer.is_meta for buffer in model.buffers()):  # the run says what is wrong with those
        _go_through(model)


def _go_through(model: nn.Module) -> None:
    """Every pass that a run would make."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    place = Place(device)
    vocabulary = getattr(text_config(model), "vocab_size", None) or _TOKENS
    # from the middle: padding, the end and pictures have the first or the last ids
    batch = (vocabulary // 2 + torch.arange(_TOKENS, device=device))[None] % vocabulary
    progress = Progress.of(model)

    def run(name: str, block: nn.Module, hidden: Tensor, call: Call) -> Any:
        with _solid(block):
            return call.run(block, hidden, place)

    with _hollow(model), evaluating(model), torch.no_grad():
        while True:
            chain, _ = next_chain(model, progress, batch, place, run)
            if not chain.names or not chain.follows:
                break
            put_out = progress.looks[chain.names[-1]].value
            progress.finish(chain, [map_tensors(put_out, lambda t: torch.full_like(t, _NUMBER))])


@contextmanager
def _hollow(model: nn.Module) -> Iterator[None]:
    """For a while, parameters are one number each, in float32 as layers are computed."""

    def number(parameter: Tensor) -> Tensor:
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        return torch.tensor(_NUMBER, dtype=torch.float32, device=device).expand(parameter.shape)

    with _instead(model, number):
        yield


@contextmanager
def _solid(block: nn.Module) -> Iterator[None]:
    """For a while, stacks of matrices in a hollow block are one matrix each, over and over: grouped products of experts ask
    for the strides of a matrix."""

    def matrix(parameter: Tensor) -> Tensor:
        one = torch.full(parameter.shape[-2:], _NUMBER, dtype=parameter.dtype, device=parameter.device)
        return one.expand(parameter.shape)

    with _instead(block, matrix, dims=3):
        yield


@contextmanager
def _instead(module: nn.Module, other: Callable[[Tensor], Tensor], dims: int = 0) -> Iterator[None]:
    """Other tensors in the place of float parameters of at least so many dimensions, for a while."""
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_floating_point() and parameter.dim() >= dims:
                    taken.append((owner, name, parameter))
                    owner._parameters[name] = nn.Parameter(other(parameter), requires_grad=False)
        yield
    finally:
        for owner, name, parameter in taken:
            owner._parameters[name] = parameter
