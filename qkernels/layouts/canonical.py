"""The canonical form as a layout: a `QuantTensor`'s own tensors, one byte a code. It serves `gemm_reference`, on any device;
as layout reference_a8 the same tensors serve `gemm_reference_a8`, which quantizes activations to int8.

qweight  uint8 [..., N, K]    codes
scales   [..., N, G]          source dtype
zeros    [..., N, G]          uint8, floating, or None; for a codebook: its table, fp32 [2^bits]
k_order  int32 [K]            the columns sorted by group, or None; the codes themselves stay in natural order
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..scheme import CODEBOOKS, QuantScheme
from ..tensor import QuantTensor, group_index_of
from . import Buffers, Layout, Shapes, table_of


def shapes(N: int, K: int, bits: int, group_length: int) -> Shapes:
    """See `Layout.shapes`."""
    return {"qweight": (N, K), "scales": (N, max(1, -(-K // group_length)))}


def arrange(weight: QuantTensor) -> dict[str, Tensor | None]:
    """The tensors as they are; nothing is copied unless it is not contiguous."""
    zeros = table_of(weight.scheme, weight.device) if weight.zeros is None else weight.zeros.contiguous()
    return {
        "qweight": weight.codes.contiguous(),
        "scales": weight.scales.contiguous(),
        "zeros": zeros,
        "k_order": weight.k_order(),
    }


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """See `Layout.unpack`."""
    qweight, scales = buffers["qweight"], buffers["scales"]
    assert qweight is not None
    assert scales is not None
    zeros = buffers["zeros"] if scheme.codebook is None else None
    return QuantTensor(qweight, scales, zeros, group_index_of(buffers["k_order"], K, scheme), scheme)


LAYOUT: Layout = Layout(
    "reference", 1, "torch", arrange, unpack, shapes, stored_bits=lambda bits: 8, rows_per_tile=1,
    codebooks=tuple(CODEBOOKS),
)  # fmt: skip
LAYOUT_A8: Layout = replace(LAYOUT, name="reference_a8", acts=("int8",), codebooks=())
