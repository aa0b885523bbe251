"""Tiles for the CPU kernels with floating activations: 32 rows, k in octets; the same bytes for AVX-512, AVX2 and scalar code.

    qweight  uint8 [..., tiles, K_pad * 32 * width / 8]   width 4 (codes of 2 to 4 bits) or 8 (5 to 8 bits)
    scales   [..., tiles, G, 32]                          source dtype
    zeros    [..., tiles, G, 32]                          uint8 for integer zero points, floating for the other kinds, or None
    k_order  int32 [K]                                    which column of x each stored column multiplies, or None

Columns are stored in `k_order` (act-order: sorted by group), K padded to K_pad, a multiple of 8; groups are a multiple of 8
long, so that only the last one can be padded. N is padded to whole tiles with rows of code 0 and scale 0. Padded columns have
code 0 and meet x = 0.

One 32-bit lane a row, 16 rows to 64 bytes. For an octet of 4-bit codes the lane's low word holds k = 0, 2, 4, 6 and its high
word k = 1, 3, 5, 7, lowest nibble first: shifting the lane right by 4 p leaves the pair (2 p, 2 p + 1) at the bottom of its two
words, which is what a table look-up by word (vpermw) and a dot product of bf16 pairs (vdpbf16ps) want. For a quad of 8-bit
codes the low word is k0 | k2 << 8, the high word k1 | k3 << 8. Both orders say the same thing about the bits of k, which is how
they are written below: the lowest bit of k picks the word. `csrc/cpu/kernels.h` states the same contract for C++.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConversionError
from ..scheme import ACTIVATIONS, QuantScheme
from ..tensor import QuantTensor, group_index_of
from . import Buffers, Layout

ROWS_PER_TILE = 32
COLUMNS = 8  # K is padded to a multiple of this


def code_width(bits: int) -> int:
    """Bits that a code takes up in the tiles: 4 or 8."""
    return 4 if bits <= 4 else 8


def buffer_shapes(N: int, K: int, bits: int, group_length: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Shapes of qweight and of scales (zeros likewise), without leading dimensions."""
    tiles, columns = -(-N // ROWS_PER_TILE), -(-K // COLUMNS) * COLUMNS
    groups = max(1, -(-K // group_length))
    return (tiles, columns * ROWS_PER_TILE * code_width(bits) // 8), (tiles, groups, ROWS_PER_TILE)


def reasons(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Why an [N, K] weight of this scheme has no such tiles."""
    why = []
    if scheme.codebook is not None:
        why.append(f"codebook {scheme.codebook!r}: only integer codes are supported")
    if scheme.act is not None:
        why.append(f"{ACTIVATIONS[scheme.act]}: these kernels take float32, bfloat16 and float16 ones")
    if scheme.num_groups(K) > 1 and scheme.group_length(K) % COLUMNS:
        why.append(f"group_size {scheme.group_size} is not a multiple of {COLUMNS}")
    return why


def pack(qt: QuantTensor) -> dict[str, Tensor | None]:
    """Weight -> buffers; leading (expert) dimensions stay in front of qweight, scales and zeros.

    Raises:
        ConversionError: the scheme has a reason (see `reasons`).
    """
    N, K, scheme = qt.N, qt.K, qt.scheme
    if why := reasons(N, K, scheme):
        raise ConversionError(f"layout cpu_tile_a16 cannot hold {scheme} with N={N}, K={K}: {'; '.join(why)}")
    return pack_tiles(qt, _lanes)


def pack_tiles(qt: QuantTensor, lanes_of: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor | None]:
    """`pack`, with the order of the codes inside a lane left to `lanes_of`: (codes [..., rows, octets, 8], width) -> bytes
    [..., rows, lanes of a row, 4]."""
    k_order = qt.k_order()
    codes = qt.codes if k_order is None else qt.codes[..., k_order.long()]
    codes = pad(codes, (0, -qt.K % COLUMNS, 0, -qt.N % ROWS_PER_TILE))
    lead, octets, tiles = codes.shape[:-2], codes.shape[-1] // COLUMNS, codes.shape[-2] // ROWS_PER_TILE
    width = code_width(qt.scheme.bits)
    lanes = lanes_of(codes.reshape(*lead, tiles, ROWS_PER_TILE, octets, COLUMNS), width)
    return {
        "qweight": lanes.movedim(-3, -2).reshape(*lead, tiles, octets * 4 * width * 8).contiguous(),
        "scales": _pack_groups(qt.scales),
        "zeros": None if qt.zeros is None else _pack_groups(qt.zeros),
        "k_order": k_order,
    }


def _lanes(codes: Tensor, width: int) -> Tensor:
    *lead, octets, _ = codes.shape
    if width == 4:  # k = 4 i + 2 h + e is nibble h of byte 2 e + i
        i_h_e = codes.reshape(*lead, octets, 2, 2, 2)
        return (i_h_e[..., 0, :] | (i_h_e[..., 1, :] << 4)).transpose(-1, -2).reshape(*lead, octets, 4)
    # k = 2 h + e is byte 2 e + h
    return codes.reshape(*lead, octets * 2, 2, 2).transpose(-1, -2).reshape(*lead, octets * 2, 4)


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """The weight that was packed, bit for bit. Buffers from outside go through `layouts.unpack_checked`."""
    return unpack_tiles(buffers, N, K, scheme, _codes)


def unpack_tiles(
    buffers: Buffers, N: int, K: int, scheme: QuantScheme, codes_of: Callable[[Tensor, int], Tensor]
) -> QuantTensor:
    """`unpack` with the inverse of `pack_tiles`' `lanes_of`: (bytes [..., rows, lanes, 4], width) -> the
    codes of each lane, in the order of k."""
    qweight, scales, zeros, k_order = (buffers[name] for name in ("qweight", "scales", "zeros", "k_order"))
    assert qweight is not None
    assert scales is not None
    *lead, tiles, _ = qweight.shape
    width, octets = code_width(scheme.bits), -(-K // COLUMNS)
    lanes = qweight.reshape(*lead, tiles, octets * width // 4, ROWS_PER_TILE, 4).movedim(-2, -3)
    codes = codes_of(lanes, width).reshape(*lead, tiles * ROWS_PER_TILE, octets * COLUMNS)[..., :N, :K]
    if k_order is not None:
        codes = torch.empty_like(codes, memory_format=torch.contiguous_format).index_copy_(-1, k_order.long(), codes)
    group_index = group_index_of(k_order, K, scheme)
    true_zeros = None if zeros is None else _unpack_groups(zeros, N)
    return QuantTensor(codes.contiguous(), _unpack_groups(scales, N), true_zeros, group_index, scheme)


def _codes(lanes: Tensor, width: int) -> Tensor:
    byte_pairs = lanes.reshape(*lanes.shape[:-1], 2, 2).transpose(-1, -2)
    if width == 4:
        byte_pairs = torch.stack([byte_pairs & 15, byte_pairs >> 4], dim=-2)
    return byte_pairs


def _pack_groups(values: Tensor) -> Tensor:
    """[..., N, G] -> [..., tiles, G, 32]"""
    padded = pad(values, (0, 0, 0, -values.shape[-2] % ROWS_PER_TILE))
    shape = (*padded.shape[:-2], padded.shape[-2] // ROWS_PER_TILE, ROWS_PER_TILE, padded.shape[-1])
    return padded.reshape(shape).transpose(-1, -2).contiguous()


def _unpack_groups(values: Tensor, N: int) -> Tensor:
    """[..., tiles, G, 32] -> [..., N, G]"""
    *lead, tiles, groups, rows = values.shape
    return values.transpose(-1, -2).reshape(*lead, tiles * rows, groups)[..., :N, :].contiguous()


LAYOUT: Layout = Layout(
    "cpu_tile_a16", 1, reasons, pack, unpack, buffer_shapes, ROWS_PER_TILE, gemv_tokens=8, device="cpu", compiled=True,
)  # fmt: skip
