"""Tiles for the CUDA kernels: each lane's 16 bytes are its own fragments of the tensor cores' A operand, for any M.

    qweight  uint8 [..., strips, K_pad * 64 * width / 8]   width 4 (codes of 2 to 4 bits) or 8 (5 to 8 bits)
    scales   [..., strips, G_pad, 64]                      source dtype
    zeros    [..., strips, G_pad, 64]                      uint8 for integer zero points, floating for the other kinds, or None
    k_order  int32 [K]                                     which column of x each stored column multiplies, or None

A strip is 64 rows of the weight. N and K are padded to multiples of 64 with code 0; padded rows and groups have scale 0, and
padded columns meet x = 0. Columns are stored in `k_order` (act-order: sorted by group). Groups are 16 or 32 or a multiple of
64 long, or there is only one; G_pad is K_pad / 16 or K_pad / 32 for the short ones, so that 64 columns have all of theirs,
and G otherwise.

Base tiles of 512 bytes, 16 rows x 64 columns (width 4) or 16 x 32 (width 8). Four of them, rows 0, 16, 32, 48 of the strip,
follow one another; then come the next columns: qweight of one strip is [K_pad / 64 or 32][4 tiles][32 lanes][16 bytes], and
2 KB in a row serve 64 rows. In `mma.m16n8k16` (PTX manual, 9.7.14) lane 4 r + c holds, of a 16 x 16 matrix A,

    a0 a1  row r,     columns 2 c, 2 c + 1        a4 a5  row r,     columns 2 c + 8, 2 c + 9
    a2 a3  row r + 8, columns 2 c, 2 c + 1        a6 a7  row r + 8, columns 2 c + 8, 2 c + 9

Width 4: one 32-bit word per 16 columns, a0 a2 a4 a6 in its low half, a1 a3 a5 a7 in its high half, lowest nibble first. One
mask (0x000f000f or 0x00f000f0, after no shift or one by 8) then leaves a pair in the two halves of a register.
Width 8: two words per 16 columns, bytes a0 a2 a1 a3 and a4 a6 a5 a7.

Scales and zeros of a strip: row 8 j + r is at 8 r + j, so that the eight rows that one lane meets (r + 0, 8, … 56) are next to
each other: 16 bytes in 16-bit types. `csrc/cuda/layout.h` states the same contract for C++.

`mma_tile_a8` is the same memory for weights whose activations are quantized to int8 (`act="int8"`), with ops of its own:
`gemm_mma_tile_a8` quantizes x per token, in the order of columns that these bytes ask of `mma.m16n8k32`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConversionError
from ..scheme import ACTIVATIONS, QuantScheme
from ..tensor import QuantTensor, group_index_of
from . import Buffers, Layout

ROWS_PER_TILE = 64  # rows of a strip, the first dimension of every buffer
COLUMNS = 64  # K is padded to a multiple of this
SHORT_GROUPS = (16, 32)
MOST_GROUP_COLUMNS_A8 = 131072  # 131072 · 128 · 127 < 2³¹: the int32 sum of a group


def code_width(bits: int) -> int:
    """Bits that a code takes up in the tiles: 4 or 8."""
    return 4 if bits <= 4 else 8


def padded_groups(K: int, group_length: int) -> int:
    """G_pad: how many groups are stored."""
    groups = max(1, -(-K // group_length))
    return -(-K // COLUMNS) * (COLUMNS // group_length) if groups > 1 and group_length in SHORT_GROUPS else groups


def buffer_shapes(N: int, K: int, bits: int, group_length: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Shapes of qweight and of scales (zeros likewise), without leading dimensions."""
    strips, columns = -(-N // ROWS_PER_TILE), -(-K // COLUMNS) * COLUMNS
    codes = (strips, columns * ROWS_PER_TILE * code_width(bits) // 8)
    return codes, (strips, padded_groups(K, group_length), ROWS_PER_TILE)


def reasons(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Why an [N, K] weight of this scheme has no such tiles."""
    why = []
    if scheme.codebook is not None:
        why.append(f"codebook {scheme.codebook!r}: only integer codes are supported")
    if scheme.act is not None:
        why.append(f"{ACTIVATIONS[scheme.act]}: these kernels take bfloat16 and float16 ones")
    group = scheme.group_length(K)
    if scheme.num_groups(K) > 1 and group not in SHORT_GROUPS and group % COLUMNS:
        why.append(f"group_size {scheme.group_size} is neither 16 nor 32 nor a multiple of {COLUMNS}")
    return why


def reasons_a8(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Why an [N, K] weight of this scheme is none for the kernels with int8 activations."""
    if scheme.act != "int8":
        return [f"{scheme}: these kernels take int8 activations (act='int8') alone"]
    why = []
    if not scheme.symmetric:
        why.append(f"zeros={scheme.zeros!r}: with int8 activations these kernels take symmetric weights alone")
    group = scheme.group_length(K)
    if scheme.num_groups(K) > 1 and group != 32 and group % COLUMNS:
        why.append(f"group_size {scheme.group_size} is neither 32 nor a multiple of {COLUMNS}")
    if -(-min(group, K) // COLUMNS) * COLUMNS > MOST_GROUP_COLUMNS_A8:
        why.append(
            f"groups of {min(group, K)} columns: an int32 sum is exact over {MOST_GROUP_COLUMNS_A8} (use group_size)"
        )
    return why


def pack(qt: QuantTensor) -> dict[str, Tensor | None]:
    """Weight -> buffers, on the weight's device; leading (expert) dimensions stay in front of qweight, scales and zeros.

    Raises:
        ConversionError: the scheme has a reason (see `reasons`).
    """
    return _tiles(qt, LAYOUT)


def pack_a8(qt: QuantTensor) -> dict[str, Tensor | None]:
    """`pack` for layout mma_tile_a8 (see `reasons_a8`): the same bytes."""
    return _tiles(qt, LAYOUT_A8)


def _tiles(qt: QuantTensor, layout: Layout) -> dict[str, Tensor | None]:
    N, K, scheme = qt.N, qt.K, qt.scheme
    if why := layout.reasons(N, K, scheme):
        raise ConversionError(f"layout {layout.name} cannot hold {scheme} with N={N}, K={K}: {'; '.join(why)}")
    k_order = qt.k_order()
    codes = qt.codes if k_order is None else qt.codes[..., k_order.long()]
    codes = pad(codes, (0, -K % COLUMNS, 0, -N % ROWS_PER_TILE))
    lead, strips, columns = codes.shape[:-2], codes.shape[-2] // ROWS_PER_TILE, codes.shape[-1]
    L = len(lead)
    steps = 4 if code_width(scheme.bits) == 4 else 2  # of 16 columns in a tile
    # row = 16 tile + 8 high + r, column = 16 steps * block + 16 step + 8 right + 2 c + odd
    split = codes.reshape(*lead, strips, 4, 2, 8, columns // (16 * steps), steps, 2, 4, 2)
    strip, tile, high, r, block, step, right, c, odd = range(L, L + 9)
    if steps == 4:  # byte 2 odd + right of a word has row r in its low nibble, row r + 8 in its high one
        lanes = split.permute(*range(L), strip, block, tile, r, c, step, odd, right, high)
        lanes = lanes[..., 0] | (lanes[..., 1] << 4)
    else:  # byte 2 odd + high of word 2 step + right
        lanes = split.permute(*range(L), strip, block, tile, r, c, step, right, odd, high)
    _, groups = buffer_shapes(N, K, scheme.bits, scheme.group_length(K))
    return {
        "qweight": lanes.reshape(*lead, strips, columns * ROWS_PER_TILE * code_width(scheme.bits) // 8).contiguous(),
        "scales": _pack_groups(qt.scales, groups[1]),
        "zeros": None if qt.zeros is None else _pack_groups(qt.zeros, groups[1]),
        "k_order": k_order,
    }


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """The weight that was packed, bit for bit. Buffers from outside go through `layouts.unpack_checked`."""
    qweight, scales, zeros, k_order = (buffers[name] for name in ("qweight", "scales", "zeros", "k_order"))
    assert qweight is not None
    assert scales is not None
    lead, strips, columns = qweight.shape[:-2], qweight.shape[-2], -(-K // COLUMNS) * COLUMNS
    L = len(lead)
    if code_width(scheme.bits) == 4:
        lanes = qweight.reshape(*lead, strips, columns // 64, 4, 8, 4, 4, 2, 2)
        lanes = torch.stack([lanes & 15, lanes >> 4], dim=-1)
        strip, block, tile, r, c, step, odd, right, high = range(L, L + 9)
    else:
        lanes = qweight.reshape(*lead, strips, columns // 32, 4, 8, 4, 2, 2, 2, 2)
        strip, block, tile, r, c, step, right, odd, high = range(L, L + 9)
    split = lanes.permute(*range(L), strip, tile, high, r, block, step, right, c, odd)
    codes = split.reshape(*lead, strips * ROWS_PER_TILE, columns)[..., :N, :K]
    if k_order is not None:
        codes = torch.empty_like(codes, memory_format=torch.contiguous_format).index_copy_(-1, k_order.long(), codes)
    G = scheme.num_groups(K)
    true_zeros = None if zeros is None else _unpack_groups(zeros, N, G)
    group_index = group_index_of(k_order, K, scheme)
    return QuantTensor(codes.contiguous(), _unpack_groups(scales, N, G), true_zeros, group_index, scheme)


def _pack_groups(values: Tensor, groups: int) -> Tensor:
    """[..., N, G] -> [..., strips, G_pad, 64]"""
    padded = pad(values, (0, groups - values.shape[-1], 0, -values.shape[-2] % ROWS_PER_TILE))
    *lead, rows, _ = padded.shape
    split = padded.reshape(*lead, rows // ROWS_PER_TILE, 8, 8, groups)  # strip, j, r, group
    return split.movedim(-1, -3).transpose(-1, -2).reshape(*lead, rows // ROWS_PER_TILE, groups, 64).contiguous()


def _unpack_groups(values: Tensor, N: int, G: int) -> Tensor:
    """[..., strips, G_pad, 64] -> [..., N, G]"""
    *lead, strips, groups, _ = values.shape
    split = values.reshape(*lead, strips, groups, 8, 8).transpose(-1, -2).movedim(-3, -1)  # strip, j, r, group
    return split.reshape(*lead, strips * ROWS_PER_TILE, groups)[..., :N, :G].contiguous()


LAYOUT: Layout = Layout(
    "mma_tile", 1, reasons, pack, unpack, buffer_shapes, ROWS_PER_TILE, gemv_tokens=32, device="cuda", compiled=True
)
LAYOUT_A8: Layout = Layout(
    "mma_tile_a8", 1, reasons_a8, pack_a8, unpack, buffer_shapes, ROWS_PER_TILE, device="cuda", compiled=True
)
