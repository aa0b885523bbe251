"""The canonical form as a layout: a `QuantTensor`'s own tensors, one byte a code. It serves `gemm_reference`, on any device.

qweight  uint8 [..., N, K]    codes
scales   [..., N, G]          source dtype
zeros    [..., N, G]          uint8, floating, or None
k_order  int32 [K]            the columns sorted by group, or None; the codes themselves stay in natural order
"""

from __future__ import annotations

from torch import Tensor

from ..errors import ConversionError
from ..scheme import QuantScheme
from ..tensor import QuantTensor, group_index_of
from . import Buffers, Layout


def reasons(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Only a codebook: the ops' schema has no argument that could carry its table."""
    return [] if scheme.codebook is None else [f"codebook {scheme.codebook!r} is not taken by the reference op"]


def buffer_shapes(N: int, K: int, bits: int, group_length: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Shapes of qweight and of scales (zeros likewise), without leading dimensions."""
    return (N, K), (N, max(1, -(-K // group_length)))


def pack(qt: QuantTensor) -> dict[str, Tensor | None]:
    """The tensors as they are; nothing is copied unless it is not contiguous.

    Raises:
        ConversionError: the scheme has a reason (see `reasons`).
    """
    if why := reasons(qt.N, qt.K, qt.scheme):
        raise ConversionError(f"layout reference cannot hold {qt.scheme}: {'; '.join(why)}")
    return {
        "qweight": qt.codes.contiguous(),
        "scales": qt.scales.contiguous(),
        "zeros": None if qt.zeros is None else qt.zeros.contiguous(),
        "k_order": qt.k_order(),
    }


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """The weight that was packed. Buffers from outside go through `layouts.unpack_checked`."""
    qweight, scales = buffers["qweight"], buffers["scales"]
    assert qweight is not None
    assert scales is not None
    return QuantTensor(qweight, scales, buffers["zeros"], group_index_of(buffers["k_order"], K, scheme), scheme)


LAYOUT: Layout = Layout("reference", 1, reasons, pack, unpack, buffer_shapes, rows_per_tile=1)
