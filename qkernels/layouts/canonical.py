"""The canonical form as a layout: a `QuantTensor`'s own tensors, one byte a code. It serves `gemm_reference`, on any device;
as layout reference_a8 the same tensors serve `gemm_reference_a8`, which quantizes activations to int8.

qweight  uint8 [..., N, K]    codes
scales   [..., N, G]          source dtype
zeros    [..., N, G]          uint8, floating, or None; for a codebook: its table, fp32 [2^bits]
k_order  int32 [K]            the columns sorted by group, or None; the codes themselves stay in natural order
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..scheme import CODEBOOKS, QuantScheme
from ..tensor import QuantTensor, group_index_of
from . import Buffers, Layout


def reasons(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """None: it holds every scheme."""
    return []


def buffer_shapes(N: int, K: int, bits: int, group_length: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Shapes of qweight and of scales (zeros likewise), without leading dimensions."""
    return (N, K), (N, max(1, -(-K // group_length)))


def pack(qt: QuantTensor) -> dict[str, Tensor | None]:
    """The tensors as they are; nothing is copied unless it is not contiguous."""
    zeros = None if qt.zeros is None else qt.zeros.contiguous()
    if qt.scheme.codebook is not None:
        zeros = torch.tensor(CODEBOOKS[qt.scheme.codebook], dtype=torch.float32, device=qt.device)
    return {
        "qweight": qt.codes.contiguous(),
        "scales": qt.scales.contiguous(),
        "zeros": zeros,
        "k_order": qt.k_order(),
    }


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """The weight that was packed. Buffers from outside go through `layouts.unpack_checked`."""
    qweight, scales = buffers["qweight"], buffers["scales"]
    assert qweight is not None
    assert scales is not None
    zeros = buffers["zeros"] if scheme.codebook is None else None
    return QuantTensor(qweight, scales, zeros, group_index_of(buffers["k_order"], K, scheme), scheme)


LAYOUT: Layout = Layout("reference", 1, reasons, pack, unpack, buffer_shapes, rows_per_tile=1)
LAYOUT_A8: Layout = replace(LAYOUT, name="reference_a8")
