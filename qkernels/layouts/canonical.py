"""The canonical form as a layout: a `QuantTensor`'s own tensors, one byte a code. It serves `gemm_reference`, on any device;
as layout reference_a8 the same tensors serve `gemm_reference_a8`, which quantizes activations to int8.

qweight  uint8 [..., N, K]    codes
scales   [..., N, G]          source dtype
zeros    [..., N, G]          uint8, floating, or None
k_order  int32 [K]            the columns sorted by group, or None; the codes themselves stay in natural order
outer_scales, outer_zeros  [..., N, S]   or None; where they are there, scales and zeros are the small factors
x_static fp32 [2]             of reference_a8: scale and zero point of static activations, or None
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..codebooks import INTEGER_STEPS
from ..factors import Factors
from ..group_index import group_index_of
from ..scheme import ACTIVATIONS, CODEBOOKS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES, QuantTensor
from . import BUFFERS_A8, NUMBERS_A8, Buffers, Layout, Shapes

INTEGERS = tuple(name for name, activation in ACTIVATIONS.items() if activation.integers)


def shapes(N: int, K: int, bits: int, group_length: int) -> Shapes:
    """See `Layout.shapes`."""
    return {"qweight": (N, K), "scales": (N, max(1, -(-K // group_length)))}


def arrange(weight: QuantTensor) -> dict[str, Tensor | None]:
    """The tensors as they are; nothing is copied unless it is not contiguous."""
    groups = groups_of(weight)
    buffers = {name: None if t is None else t.contiguous() for name, t in groups.items()}
    return {"qweight": weight.codes.contiguous(), "k_order": weight.k_order(), "x_static": weight.x_static} | buffers


def groups_of(weight: QuantTensor) -> dict[str, Tensor | None]:
    """What a weight has for each of its groups, by the names of buffers: scales and zeros, or their factors."""
    factors = weight.factors
    if factors is None:
        return {"scales": weight.scales, "zeros": weight.zeros, "outer_scales": None, "outer_zeros": None}
    return {
        "scales": factors.small, "zeros": factors.small_zeros,
        "outer_scales": factors.outer, "outer_zeros": factors.outer_zeros,
    }  # fmt: skip


def weight_of(
    codes: Tensor,
    groups: Mapping[str, Tensor | None],
    group_index: Tensor | None,
    scheme: QuantScheme,
    x_static: Tensor | None,
) -> QuantTensor:
    """The inverse of `groups_of`."""
    scales, zeros = groups["scales"], groups["zeros"]
    assert scales is not None
    if scheme.factors is None:
        return QuantTensor(codes, scales, zeros, group_index, scheme, x_static=x_static)
    outer = groups["outer_scales"]
    assert outer is not None
    factors = Factors(scales, outer, zeros, groups["outer_zeros"])
    return QuantTensor.from_factors(codes, factors, scheme, group_index, x_static)


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """See `Layout.unpack`."""
    qweight = buffers["qweight"]
    assert qweight is not None
    return weight_of(qweight, buffers, group_index_of(buffers["k_order"], K, scheme), scheme, buffers.get("x_static"))


LAYOUT: Layout = Layout(
    "reference", 1, "torch", arrange, unpack, shapes, stored_bits=lambda bits: 8, rows_per_tile=1,
    codebooks=tuple(CODEBOOKS), factors=tuple(FACTORS), grouped=True, scale_dtypes=SCALE_DTYPES,
)  # fmt: skip
LAYOUT_A8: Layout = replace(
    LAYOUT,
    name="reference_a8",
    acts=INTEGERS,
    codebooks=tuple(INTEGER_STEPS),
    buffers=BUFFERS_A8,
    numbers=NUMBERS_A8,
)
