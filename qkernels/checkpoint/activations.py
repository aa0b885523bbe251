"""The activations of a weight from a file: as it asks, or in 16 bits where no kernel or no format has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import ConversionError, SchemeError, UnsupportedProblem
from ..formats import Format, Oddity, Parsed, Written
from ..kernels.catalogue import Problem, arch_of, select
from ..scheme import ACTIVATIONS
from ..tensor import QuantTensor
from .packed import PACKED

if TYPE_CHECKING:
    from ..kernels.catalogue import OnUnsupported

Activations = Literal["file", "16bit", "int8"]


def with_16_bits(weight: QuantTensor) -> QuantTensor:
    """The same weight, for activations as they come."""
    return replace(weight, scheme=replace(weight.scheme, act=None), x_static=None)


def is_ours(format: Format | None) -> bool:
    """Whether a format spells schemes as we do: what its weights ask for is meant, and no kernel for it an error."""
    return format is None or format.name in ("native", *PACKED)


def with_int8(
    parts: Iterable[QuantTensor],
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    on_unsupported: OnUnsupported = "raise",
    experts: int = 0,
) -> tuple[Iterator[QuantTensor], tuple[Oddity, ...]]:
    """The parts of a weight of that shape (N, K), for activations that are rounded to int8 a token; as they are, and a word about
    it, where no kernel has those."""
    rest = iter(parts)
    first = next(rest)
    if first.scheme.act is not None:
        return chain([first], rest), ()
    try:
        scheme = replace(first.scheme, act="int8")
        select(Problem(*shape, scheme, dtype, arch_of(device), experts), on_unsupported)
    except (SchemeError, UnsupportedProblem):
        kept = Oddity(
            "int8 activations were asked for, which no kernel here has", f"{first.scheme}: they stay in 16 bits"
        )
        return chain([first], rest), (kept,)
    return (replace(part, scheme=scheme) for part in chain([first], rest)), ()


def as_it_runs(
    parsed: Parsed,
    format: Format | None,
    device: torch.device,
    dtype: torch.dtype,
    on_unsupported: OnUnsupported = "raise",
    experts: int = 0,
    activations: Activations | None = None,
) -> Parsed:
    """A weight with activations as `load` was asked for. By default, of another tool's format: those that it asks for where a
    kernel has them, else 16-bit ones and a word about it."""
    weight = parsed.weight
    if activations == "16bit":
        return Parsed(with_16_bits(weight), parsed.oddities)
    if activations == "int8" and weight.scheme.act is None:
        (weight,), kept = with_int8([weight], (weight.N, weight.K), device, dtype, on_unsupported, experts)
        return Parsed(weight, (*kept, *parsed.oddities))
    if weight.scheme.act is None or activations == "file" or is_ours(format):
        return parsed
    try:
        select(Problem(weight.N, weight.K, weight.scheme, dtype, arch_of(device), experts), on_unsupported)
    except UnsupportedProblem:
        asked = Oddity(
            f"it asks for {ACTIVATIONS[weight.scheme.act]}, which no kernel here has",
            f'{weight.scheme}: 16-bit ones are used instead; on_unsupported="reference" runs them, slowly',
        )
        return Parsed(with_16_bits(weight), (asked, *parsed.oddities))
    return parsed


def as_written(parsed: Parsed, source: Format | None, target: Format) -> Parsed:
    """A weight of another tool's format as `target` holds it: without activations that it has no field for, and then a word about
    it."""
    weight = parsed.weight
    if weight.scheme.act is None or is_ours(source):
        return parsed
    try:
        target.config_of(Written.of({"": weight.scheme}))
    except ConversionError:
        lost = Oddity(
            f"{target.name} does not say that activations are quantized", f"the file asks for {weight.scheme}"
        )
        return Parsed(with_16_bits(weight), (lost, *parsed.oddities))
    return parsed
