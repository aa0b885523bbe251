"""A `QuantTensor` in GGUF blocks without loss, where a block type holds it: the way back from `weights.py`, and more.

Integers times a scale fit many types: the codes of GPTQ or AWQ minus their zero points are small integers, and a group of 128
is four blocks of 32 with one scale. What is made is decoded and held against the weight, so that nothing depends on this list
of ways being right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ...errors import ConversionError
from ...tensor import QuantTensor
from .parts import Parts
from .types import block_type, blocks_of, dequantize
from .weights import EXACT_SCHEMES

_FACTORED: Final = {scheme: name for name, scheme in EXACT_SCHEMES.items() if scheme.factors is not None}


class _Integers(NamedTuple):
    """A type of integers times one scale; `turned`: the scale changes its sign (then 2-bit codes of -2 … 1 fit as 2 … -1)."""

    type: str
    low: int
    high: int
    turned: bool = False


# The smallest first; types with a minimum come between.
_INTEGERS: Final = (_Integers("Q2_0", -1, 2), _Integers("Q2_0", -1, 2, turned=True), _Integers("Q4_0", -8, 7))
_WIDER: Final = (_Integers("Q5_0", -16, 15), _Integers("Q8_0", -128, 127))


class _Way(NamedTuple):
    type: str
    parts: Callable[[], Parts | str]  # or why not


def exact_blocks(weight: QuantTensor, type: str | None = None) -> tuple[str, Tensor]:
    """The blocks of a type that mean the same weight, bit for bit but for the sign of zeros.

    Args:
        weight: `[N, K]`.
        type: the only one that will do; None for the smallest that does.

    Returns:
        The type, and uint8 `[N, bytes of a row]`.

    Raises:
        ConversionError: no type holds it, or not that one; says why.

    >>> import torch
    >>> from qkernels import RTN
    >>> from qkernels.formats.gguf.lossless import exact_blocks
    >>> exact_blocks(RTN(bits=4, group_size=64).quantize(torch.randn(8, 64)))[0]
    'Q4_0'
    """
    if weight.codes.dim() != 2:
        raise ConversionError(f"GGUF blocks are made of one [N, K] weight, got {list(weight.codes.shape)}")
    if weight.group_index is not None:
        raise ConversionError(
            "its columns are grouped in the order of their activations (act-order), and a block of a GGUF file holds neighbours"
        )
    tried: dict[str, None] = {}
    for way in _ways(weight):
        if type is not None and way.type != type:
            continue
        elements = block_type(way.type).ggml.elements
        if weight.K % elements:
            tried[f"rows of {weight.K} are no multiple of the {elements} of a block of {way.type}"] = None
            continue
        parts = way.parts()
        if isinstance(parts, str):
            tried[parts] = None
            continue
        blocks = blocks_of(parts, way.type)
        if torch.equal(dequantize(blocks, way.type), weight.dequantize(torch.float32)):
            return way.type, blocks
        tried[f"its scales or zero points do not fit float16 as {way.type} has them"] = None
    wanted = "no GGUF type" if type is None else type
    because = f" ({'; '.join(tried)})" if tried else ""
    raise ConversionError(f"{wanted} holds a weight of {weight.scheme} without loss{because}")


def _ways(weight: QuantTensor) -> Iterator[_Way]:
    scheme = weight.scheme
    if weight.factors is not None:
        name = _FACTORED.get(scheme)
        if name is not None and name != "NVFP4":
            yield _Way(name, partial(_factored, weight))
        elif name is not None:
            yield _Way(name, partial(_nvfp4, weight))
        return
    if scheme.codebook is not None:
        name = {"iq4nl": "IQ4_NL", "e2m1": "MXFP4"}.get(scheme.codebook)
        if name is not None:
            yield _Way(name, partial(_table, weight, name))
        return
    if scheme.zeros in ("none", "int"):
        yield from (_Way(of.type, partial(_integers, weight, of)) for of in _INTEGERS)
    if scheme.zeros != "none":
        yield from (_Way(name, partial(_ranged, weight, name)) for name in ("Q4_1", "Q5_1"))
    if scheme.zeros in ("none", "int"):
        yield from (_Way(of.type, partial(_integers, weight, of)) for of in _WIDER)


def _factored(weight: QuantTensor) -> Parts:
    factors = weight.factors
    assert factors is not None
    return Parts(weight.codes, factors.small, factors.small_zeros, factors.outer, factors.outer_zeros)


def _nvfp4(weight: QuantTensor) -> Parts | str:
    factors = weight.factors
    assert factors is not None
    if not bool((factors.outer == 1).all()):
        return "its scale of the whole weight is not 1"
    return Parts(weight.codes, factors.small.view(torch.uint8))


def _spread(values: Tensor, weight: QuantTensor, name: str) -> Tensor | str:
    """One value a block of one value a group."""
    elements, length = block_type(name).ggml.elements, weight.scheme.group_length(weight.K)
    if length % elements and length < weight.K:
        return f"groups of {length} do not hold whole blocks of {elements}"
    return values[:, torch.arange(0, weight.K, elements) // length]


def _table(weight: QuantTensor, name: str) -> Parts | str:
    scales = _spread(weight.scales.float(), weight, name)
    if isinstance(scales, str):
        return scales
    if name == "IQ4_NL":
        return Parts(weight.codes, d=scales.half())
    return Parts(weight.codes, scales.to(torch.float8_e8m0fnu).view(torch.uint8))


def _integers(weight: QuantTensor, of: _Integers) -> Parts | str:
    name, low, high, turned = of
    scales = _spread(weight.scales.float(), weight, name)
    if isinstance(scales, str):
        return scales
    values = weight.codes.short() - _zeros(weight)
    values = -values if turned else values
    if values.numel() and (int(values.min()) < low or int(values.max()) > high):
        return f"codes less zero points are {int(values.min())} … {int(values.max())}, {name} has {low} … {high}"
    return Parts((values - low).to(torch.uint8), d=(-scales if turned else scales).half())


def _zeros(weight: QuantTensor) -> Tensor:
    """int16, of each code."""
    if weight.zeros is None:
        return torch.full((1, 1), 1 << (weight.scheme.bits - 1), dtype=torch.int16)
    return weight.zeros[:, weight.column_groups()].to(torch.int16)


def _ranged(weight: QuantTensor, name: str) -> Parts | str:
    meaning = block_type(name).meaning
    assert meaning is not None
    assert weight.zeros is not None
    if weight.scheme.bits > meaning.bits:
        return f"codes have {weight.scheme.bits} bits, those of {name} {meaning.bits}"
    scales = weight.scales.float()
    lows = weight.zeros.float() if weight.scheme.zeros == "offset" else -weight.zeros.float() * scales
    d, m = _spread(scales, weight, name), _spread(lows, weight, name)
    if isinstance(d, str) or isinstance(m, str):
        return str(d)
    return Parts(weight.codes, d=d.half(), dmin=m.half())
