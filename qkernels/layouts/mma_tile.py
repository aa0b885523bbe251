"""Tiles for the CUDA kernels: each lane's 16 bytes are its own fragments of the tensor cores' A operand, for any M.

    qweight  uint8 [..., strips, K_pad * 64 * width / 8]   width 4 (codes of 2 to 4 bits) or 8 (5 to 8 bits)
    scales   [..., strips, G_pad, 64]                      source dtype; with codebooks of 8 bits, too
    zeros    [..., strips, G_pad, 64]                      uint8 for integer zero points, floating for the other kinds, or None
    k_order  int32 [K]                                     which column of x each stored column multiplies, or None
    outer_scales  [..., strips, 1, 64]                     NVFP4's factors of rows, or None

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

`mma_tile_a8` is the same memory for weights whose activations are quantized to int8 (`scheme.ACTIVATIONS`), with ops of its own:
`gemm_mma_tile_a8` quantizes x per token, in the order of columns that these bytes ask of `mma.m16n8k32`. Static activations have
their scale and zero point in a buffer beside: `x_static`, fp32 [2].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConversionError
from ..scheme import ACTIVATIONS, CODEBOOKS, QuantScheme
from ..tensor import FLOAT_DTYPES, SCALE_DTYPES, QuantTensor
from ..text import dtype_name, dtype_names
from . import BUFFERS_A8, NUMBERS_A8, Layout
from .canonical import INTEGERS
from .tiles import Tiles, num_groups, stored_bits

ROWS_PER_TILE = 64  # rows of a strip, the first dimension of every buffer
COLUMNS = 64  # K is padded to a multiple of this
SHORT_GROUPS = (16, 32)
MOST_GROUP_COLUMNS_A8 = 131072  # 131072 · 128 · 127 < 2³¹: the int32 sum of a group; of 128 · 128 one less


def padded_groups(K: int, group_length: int) -> int:
    """G_pad: how many groups are stored."""
    groups = num_groups(K, group_length)
    return -(-K // COLUMNS) * (COLUMNS // group_length) if groups > 1 and group_length in SHORT_GROUPS else groups


def limits(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Groups whose borders are not those of 64 columns."""
    group = scheme.group_length(K)
    if scheme.num_groups(K) > 1 and group not in SHORT_GROUPS and group % COLUMNS:
        return [f"group_size {scheme.group_size} is neither 16 nor 32 nor a multiple of {COLUMNS}"]
    return []


def limits_a8(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """What the kernels with int8 activations leave to others."""
    if scheme.act is None:  # of no concern, and said
        return []
    why = []
    if not scheme.symmetric:
        why.append(f"zeros={scheme.zeros!r}: with int8 activations these kernels take symmetric weights alone")
    group = scheme.group_length(K)
    if scheme.num_groups(K) > 1 and group != 32 and group % COLUMNS:
        why.append(f"group_size {scheme.group_size} is neither 32 nor a multiple of {COLUMNS}")
    most = MOST_GROUP_COLUMNS_A8 - (ACTIVATIONS[scheme.act].lowest == -128)
    if -(-min(group, K) // COLUMNS) * COLUMNS > most:
        why.append(f"groups of {min(group, K)} columns: an int32 sum is exact over {most} (use group_size)")
    return why


def _lay(codes: Tensor, bits: int) -> Tensor:
    width = stored_bits(bits)
    *lead, strips, _, columns = codes.shape
    L = len(lead)
    steps = 4 if width == 4 else 2  # of 16 columns in a tile
    # row = 16 tile + 8 high + r, column = 16 steps * block + 16 step + 8 right + 2 c + odd
    split = codes.reshape(*lead, strips, 4, 2, 8, columns // (16 * steps), steps, 2, 4, 2)
    strip, tile, high, r, block, step, right, c, odd = range(L, L + 9)
    if width == 4:  # byte 2 odd + right of a word has row r in its low nibble, row r + 8 in its high one
        lanes = split.permute(*range(L), strip, block, tile, r, c, step, odd, right, high)
        return lanes[..., 0] | (lanes[..., 1] << 4)
    # byte 2 odd + high of word 2 step + right
    return split.permute(*range(L), strip, block, tile, r, c, step, right, odd, high)


def _lift(qweight: Tensor, columns: int, bits: int) -> Tensor:
    width = stored_bits(bits)
    *lead, strips, _ = qweight.shape
    L = len(lead)
    if width == 4:
        lanes = qweight.reshape(*lead, strips, columns // 64, 4, 8, 4, 4, 2, 2)
        lanes = torch.stack([lanes & 15, lanes >> 4], dim=-1)
        strip, block, tile, r, c, step, odd, right, high = range(L, L + 9)
    else:
        lanes = qweight.reshape(*lead, strips, columns // 32, 4, 8, 4, 2, 2, 2, 2)
        strip, block, tile, r, c, step, right, odd, high = range(L, L + 9)
    return lanes.permute(*range(L), strip, tile, high, r, block, step, right, c, odd)


TILES = Tiles(
    ROWS_PER_TILE, lambda bits: COLUMNS, _lay, _lift, groups=padded_groups,
    row_order=tuple(8 * j + r for r in range(8) for j in range(8)),
)  # fmt: skip


def arrange(weight: QuantTensor) -> dict[str, Tensor | None]:
    """See `Layout.arrange`. Kernels of integer codes read no scales of 8 bits."""
    if weight.scheme.codebook is None and weight.scales.dtype not in FLOAT_DTYPES:
        raise ConversionError(
            f"layout mma_tile holds scales of integer codes in {dtype_names(FLOAT_DTYPES, 'and')}, got "
            f"{dtype_name(weight.scales.dtype)}"
        )
    return TILES.pack(weight)


LAYOUT: Layout = Layout(
    "mma_tile", 1, "cuda", arrange, TILES.unpack, TILES.shapes, stored_bits, ROWS_PER_TILE,
    dtypes=(torch.bfloat16, torch.float16), codebooks=tuple(CODEBOOKS), factors=("nvfp4", "nvfp4m"),
    scale_dtypes=SCALE_DTYPES, limits=limits, gemv_tokens=32, grouped=True,
)  # fmt: skip
LAYOUT_A8: Layout = replace(
    LAYOUT, name="mma_tile_a8", acts=INTEGERS, codebooks=(), factors=(), scale_dtypes=FLOAT_DTYPES, limits=limits_a8,
    gemv_tokens=None, grouped=False, buffers=BUFFERS_A8, numbers=NUMBERS_A8,
)  # fmt: skip
