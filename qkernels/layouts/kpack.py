"""Rows packed along K for the Triton kernels: one row's codes are contiguous, in natural order but for the nibbles.

    qweight  uint8 [..., strips, 64, K_pad * width / 8]   width 4 (codes of 2 to 4 bits) or 8 (5 to 8 bits)
    scales   [..., strips, G, 64]                         source dtype
    zeros    [..., strips, G, 64]                         uint8 for integer zero points, floating for the other kinds, or None;
                                                          for a codebook: its table, fp32 [2^bits]
    k_order  int32 [K]                                    which column of x each stored column multiplies, or None

A strip is 64 rows of the weight; N and K are padded to multiples of 64 with code 0. Padded rows have scale 0 and are never
stored to the result, padded columns meet x = 0. Columns are stored in `k_order` (act-order: sorted by group); groups may have
any length.

What the two widths cost: codes of 2 bits take twice the bytes of a dense packing, of 3 bits 4/3, of 5 bits 8/5, of 6 bits 4/3
and of 7 bits 8/7. A [4096, 4096] weight in w2a16_g128 is 8.25 MiB here and would be 4.25 MiB; a decoder, which is bound by
bytes, gains nothing from 2 or 3 bits over 4 on these kernels.

Width 4: of every 64 columns, byte j holds column j in its low nibble and column j + 32 in its high one. A tile of bytes is
then two tiles of columns (`byte & 15` and `byte >> 4`) that multiply two plain tiles of x: no interleaving, which in Triton is
a change of register layout. Width 8: byte j is column j. Scales of 64 rows lie next to each other, since threads of a warp
take neighbouring rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConversionError
from ..scheme import ACTIVATIONS, CODEBOOKS, QuantScheme
from ..tensor import QuantTensor, group_index_of
from . import Buffers, Layout

ROWS_PER_TILE = 64  # rows of a strip, the first dimension of every buffer
COLUMNS = 64  # K is padded to a multiple of this
GEMV_TOKENS = 8


def code_width(bits: int) -> int:
    """Bits that a code takes up: 4 or 8."""
    return 4 if bits <= 4 else 8


def buffer_shapes(N: int, K: int, bits: int, group_length: int) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """Shapes of qweight and of scales (zeros likewise), without leading dimensions."""
    strips, columns = -(-N // ROWS_PER_TILE), -(-K // COLUMNS) * COLUMNS
    groups = max(1, -(-K // group_length))
    return (strips, ROWS_PER_TILE, columns * code_width(bits) // 8), (strips, groups, ROWS_PER_TILE)


def reasons(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Why an [N, K] weight of this scheme cannot be packed so."""
    if scheme.act is not None:
        return [f"{ACTIVATIONS[scheme.act]}: these kernels take bfloat16 and float16 ones"]
    return []


def pack(qt: QuantTensor) -> dict[str, Tensor | None]:
    """Weight -> buffers, on the weight's device; leading (expert) dimensions stay in front of qweight, scales and zeros.

    Raises:
        ConversionError: the scheme has a reason (see `reasons`).
    """
    N, K, scheme = qt.N, qt.K, qt.scheme
    if why := reasons(N, K, scheme):
        raise ConversionError(f"layout kpack cannot hold {scheme} with N={N}, K={K}: {'; '.join(why)}")
    k_order = qt.k_order()
    codes = qt.codes if k_order is None else qt.codes[..., k_order.long()]
    codes = pad(codes, (0, -K % COLUMNS, 0, -N % ROWS_PER_TILE))
    *lead, rows, columns = codes.shape
    if code_width(scheme.bits) == 4:
        halves = codes.reshape(*lead, rows, columns // COLUMNS, 2, COLUMNS // 2)
        codes = halves[..., 0, :] | (halves[..., 1, :] << 4)
    bytes_of_row = columns * code_width(scheme.bits) // 8
    if scheme.codebook is not None:
        zeros: Tensor | None = torch.tensor(CODEBOOKS[scheme.codebook], dtype=torch.float32, device=qt.device)
    else:
        zeros = None if qt.zeros is None else _pack_groups(qt.zeros)
    return {
        "qweight": codes.reshape(*lead, rows // ROWS_PER_TILE, ROWS_PER_TILE, bytes_of_row).contiguous(),
        "scales": _pack_groups(qt.scales),
        "zeros": zeros,
        "k_order": k_order,
    }


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """The weight that was packed, bit for bit. Buffers from outside go through `layouts.unpack_checked`."""
    qweight, scales, zeros, k_order = (buffers[name] for name in ("qweight", "scales", "zeros", "k_order"))
    assert qweight is not None
    assert scales is not None
    *lead, strips, _, _ = qweight.shape
    columns = -(-K // COLUMNS) * COLUMNS
    codes = qweight
    if code_width(scheme.bits) == 4:
        blocks = qweight.reshape(*lead, strips, ROWS_PER_TILE, columns // COLUMNS, COLUMNS // 2)
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-2)
    codes = codes.reshape(*lead, strips * ROWS_PER_TILE, columns)[..., :N, :K]
    if k_order is not None:
        codes = torch.empty_like(codes, memory_format=torch.contiguous_format).index_copy_(-1, k_order.long(), codes)
    true_zeros = None if zeros is None or scheme.codebook is not None else _unpack_groups(zeros, N)
    group_index = group_index_of(k_order, K, scheme)
    return QuantTensor(codes.contiguous(), _unpack_groups(scales, N), true_zeros, group_index, scheme)


def _pack_groups(values: Tensor) -> Tensor:
    """[..., N, G] -> [..., strips, G, 64]"""
    padded = pad(values, (0, 0, 0, -values.shape[-2] % ROWS_PER_TILE))
    *lead, rows, groups = padded.shape
    return padded.reshape(*lead, rows // ROWS_PER_TILE, ROWS_PER_TILE, groups).transpose(-1, -2).contiguous()


def _unpack_groups(values: Tensor, N: int) -> Tensor:
    """[..., strips, G, 64] -> [..., N, G]"""
    *lead, strips, groups, _ = values.shape
    return values.transpose(-1, -2).reshape(*lead, strips * ROWS_PER_TILE, groups)[..., :N, :].contiguous()


LAYOUT: Layout = Layout(
    "kpack", 1, reasons, pack, unpack, buffer_shapes, ROWS_PER_TILE, gemv_tokens=GEMV_TOKENS, device="cuda"
)
