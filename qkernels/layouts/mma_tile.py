"""Tiles for the CUDA kernels: each lane's 16 bytes are its own fragments of the tensor cores' A operand, for any M.

    qweight  uint8 [..., strips, K_pad * 64 * width / 8]   width 2 to 6 as the codes have it, or 8 (7 and 8 bits)
    scales   [..., strips, G_pad, 64]                      source dtype, or small factors; with codebooks of 8 bits, too
    zeros    [..., strips, G_pad, 64]                      uint8 for integer zero points or small factors, floating, or None
    k_order  int32 [K]                                     which column of x each stored column multiplies, or None
    outer_scales, outer_zeros  [..., strips, S, 64]        or None; S is 1 for NVFP4, ceil(K / 256) for k-quants and IQ4_XS

A strip is 64 rows of the weight. N and K are padded to multiples of 64 with code 0; padded rows and groups have scale 0, and
padded columns meet x = 0. Columns are stored in `k_order` (act-order: sorted by group). Groups are 16 or 32 or a multiple of
64 long, or there is only one; G_pad is K_pad / 16 or K_pad / 32 for the short ones, so that 64 columns have all of theirs,
and G otherwise.

Codes of a strip and 64 columns, a step, lie together: qweight of one strip is [K_pad / 64][64 * 64 * width / 8 bytes]. In
`mma.m16n8k16` (PTX manual, 9.7.14) lane 4 r + c holds, of a 16 x 16 matrix A,

    a0 a1  row r,     columns 2 c, 2 c + 1        a4 a5  row r,     columns 2 c + 8, 2 c + 9
    a2 a3  row r + 8, columns 2 c, 2 c + 1        a6 a7  row r + 8, columns 2 c + 8, 2 c + 9

Width 4: four tiles of 512 bytes, 16 rows each; of a tile each lane has 16 bytes, a 32-bit word for each 16 columns: a0 a2 a4 a6
in its low half, a1 a3 a5 a7 in its high half, lowest nibble first. One mask (0x000f000f or 0x00f000f0, after no shift or one
by 8) then leaves a pair in the two halves of a register.
Width 8: eight tiles of 16 rows x 32 columns, the four of the first 32 columns first; two words for 16 columns, bytes
a0 a2 a1 a3 and a4 a6 a5 a7.
Others: one plane after the other (`tiles.GPU_PLANES`), lowest first: 2 bits, 2 + 1, 4 + 1, 4 + 2. A plane of p bits is p times
512 bytes, and a lane has p words of each tile, 16 bytes of 4 / p tiles in a row. In the nibble where a code of 4 bits would be,
a word of 2 bits has those of two runs of 16 columns, the first lowest, and the word of 1 bit has runs 0, 2, 1, 3.

Scales and zeros of a strip: row 8 j + r is at 8 r + j, so that the eight rows that one lane meets (r + 0, 8, … 56) are next to
each other: 16 bytes in 16-bit types. `csrc/cuda/layout.h` states the same contract for C++.

`mma_tile_a8` is for weights whose activations are quantized to int8 (`scheme.ACTIVATIONS`), with ops of its own, and the same
memory but for the planes: there codes of 2 and 3 bits take 4, of 5 and 6 bits 8, as they did here in version 1.
`gemm_mma_tile_a8` quantizes x per token, in the order of columns that these bytes ask of `mma.m16n8k32`. Static activations have
their scale and zero point in a buffer beside: `x_static`, fp32 [2].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConversionError
from ..scheme import ACTIVATIONS, CODEBOOKS, FACTORS, QuantScheme
from ..tensor import FLOAT_DTYPES, SCALE_DTYPES, QuantTensor
from ..text import dtype_name, dtype_names
from . import BUFFERS_A8, NUMBERS_A8, Layout
from .canonical import INTEGERS
from .tiles import GPU_PLANES, Tiles, join_planes, num_groups, split_planes, stored_bits, upgrade_of

ROWS_PER_TILE = 64  # rows of a strip, the first dimension of every buffer
COLUMNS = 64  # K is padded to a multiple of this
TILE_BYTES = 512  # of a plane of one bit, of 64 rows and 64 columns; of a tile of 4 or 8 bits
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


def _fragments(codes: Tensor, steps: int) -> Tensor:
    """[..., strips, 64, K_pad] -> [..., strips, blocks, tile, r, c, step, odd, right, high] of `steps` times 16 columns."""
    *lead, strips, _, columns = codes.shape
    L = len(lead)
    # row = 16 tile + 8 high + r, column = 16 steps * block + 16 step + 8 right + 2 c + odd
    split = codes.reshape(*lead, strips, 4, 2, 8, columns // (16 * steps), steps, 2, 4, 2)
    strip, tile, high, r, block, step, right, c, odd = range(L, L + 9)
    return split.permute(*range(L), strip, block, tile, r, c, step, odd, right, high)


def _rows(fragments: Tensor) -> Tensor:
    """The inverse, in the order of rows and columns but not yet in their shape."""
    L = fragments.dim() - 9
    strip, block, tile, r, c, step, odd, right, high = range(L, L + 9)
    return fragments.permute(*range(L), strip, tile, high, r, block, step, right, c, odd)


def _lay_plane(fields: Tensor, width: int) -> Tensor:
    """Fragments of 64 columns -> the bytes of a plane [..., strips, blocks, 512 * width]."""
    if width == 4:
        nibbles = fields
    else:  # [step, odd, right, high] -> [word, ...]; bit 2 (step % 2) + step // 2 of a plane of one bit
        runs = fields.unflatten(-4, (2, 2))
        pairs = runs[..., 0, :, :, :] | (runs[..., 1, :, :, :] << 2)
        nibbles = pairs if width == 2 else pairs[..., :1, :, :, :] | (pairs[..., 1:, :, :, :] << 1)
    words = nibbles[..., 0] | (nibbles[..., 1] << 4)  # [..., blocks, tile, r, c, word, odd, right]
    chunks: Tensor = words.unflatten(-6, (width, 4 // width))
    return chunks.movedim(-6, -4).flatten(-7)


def _lift_plane(plane: Tensor, width: int) -> Tensor:
    """The inverse."""
    words = plane.unflatten(-1, (width, 8, 4, 4 // width, width, 2, 2)).movedim(-4, -6).flatten(-7, -6)
    nibbles = torch.stack([words & 15, words >> 4], dim=-1)
    if width == 4:
        return nibbles
    if width == 1:
        nibbles = torch.cat([nibbles & 5, (nibbles >> 1) & 5], dim=-4)
    mask = (1 << width) - 1
    return torch.stack([nibbles & mask, (nibbles >> 2) & mask], dim=-4).flatten(-5, -4)


def _lay(codes: Tensor, bits: int) -> Tensor:
    widths = GPU_PLANES[bits]
    if widths == (8,):  # byte 2 odd + high of word 2 step + right
        return _fragments(codes, 2).transpose(-3, -2)
    planes = split_planes(_fragments(codes, 4), bits, GPU_PLANES)
    return torch.cat([_lay_plane(plane, width) for width, plane in planes], dim=-1)


def _lift(qweight: Tensor, columns: int, bits: int) -> Tensor:
    widths = GPU_PLANES[bits]
    *lead, strips, _ = qweight.shape
    if widths == (8,):
        lanes = qweight.reshape(*lead, strips, columns // 32, 4, 8, 4, 2, 2, 2, 2)
        return _rows(lanes.transpose(-3, -2))
    steps = qweight.reshape(*lead, strips, columns // COLUMNS, TILE_BYTES * sum(widths))
    parts = torch.split(steps, [TILE_BYTES * width for width in widths], dim=-1)
    return _rows(join_planes([_lift_plane(p, w) for p, w in zip(parts, widths, strict=True)], bits, GPU_PLANES))


def _lay_wide(codes: Tensor, bits: int) -> Tensor:
    return _lay(codes, stored_bits(bits))


def _lift_wide(qweight: Tensor, columns: int, bits: int) -> Tensor:
    return _lift(qweight, columns, stored_bits(bits))


ROW_ORDER = tuple(8 * j + r for r in range(8) for j in range(8))
TILES = Tiles(
    ROWS_PER_TILE, lambda bits: COLUMNS, _lay, _lift, groups=padded_groups, row_order=ROW_ORDER,
    stored_bits=lambda bits: sum(GPU_PLANES[bits]),
)  # fmt: skip
# Codes in 4 and 8 bits: of version 1, and of mma_tile_a8.
WIDE = Tiles(ROWS_PER_TILE, lambda bits: COLUMNS, _lay_wide, _lift_wide, groups=padded_groups, row_order=ROW_ORDER)


def arrange(weight: QuantTensor) -> dict[str, Tensor | None]:
    """See `Layout.arrange`. Kernels of integer codes read no scales of 8 bits."""
    if weight.scheme.codebook is None and weight.scales.dtype not in FLOAT_DTYPES:
        raise ConversionError(
            f"layout mma_tile holds scales of integer codes in {dtype_names(FLOAT_DTYPES, 'and')}, got "
            f"{dtype_name(weight.scales.dtype)}"
        )
    return TILES.pack(weight)


LAYOUT: Layout = Layout(
    "mma_tile", 2, "cuda", arrange, TILES.unpack, TILES.shapes, TILES.stored_bits, ROWS_PER_TILE,
    dtypes=(torch.bfloat16, torch.float16), codebooks=tuple(CODEBOOKS), factors=tuple(FACTORS),
    scale_dtypes=SCALE_DTYPES, limits=limits, gemv_tokens=32, grouped=True, upgrades={1: upgrade_of(WIDE, TILES)},
)  # fmt: skip
LAYOUT_A8: Layout = replace(
    LAYOUT, name="mma_tile_a8", version=1, arrange=WIDE.pack, unpack=WIDE.unpack, shapes=WIDE.shapes, stored_bits=stored_bits,
    acts=INTEGERS, codebooks=(), factors=(), scale_dtypes=FLOAT_DTYPES, limits=limits_a8, gemv_tokens=None, grouped=False,
    buffers=BUFFERS_A8, numbers=NUMBERS_A8, upgrades={},
)  # fmt: skip
