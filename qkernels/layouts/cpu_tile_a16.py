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

import torch
from torch import Tensor

from ..scheme import CODEBOOKS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES
from . import Layout
from .tiles import Tiles, stored_bits

ROWS_PER_TILE = 32
COLUMNS = 8  # K is padded to a multiple of this


def limits(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Groups that end inside an octet."""
    if scheme.num_groups(K) > 1 and scheme.group_length(K) % COLUMNS:
        return [f"group_size {scheme.group_size} is not a multiple of {COLUMNS}"]
    return []


def _lay(codes: Tensor, width: int) -> Tensor:
    *lead, columns = codes.shape
    if width == 4:  # k = 4 i + 2 h + e is nibble h of byte 2 e + i
        i_h_e = codes.reshape(*lead, columns // 8, 2, 2, 2)
        lanes = (i_h_e[..., 0, :] | (i_h_e[..., 1, :] << 4)).transpose(-1, -2).reshape(*lead, columns // 8, 4)
    else:  # k = 2 h + e is byte 2 e + h
        lanes = codes.reshape(*lead, columns // 4, 2, 2).transpose(-1, -2).reshape(*lead, columns // 4, 4)
    return rows_inside(lanes)


def _lift(qweight: Tensor, columns: int, width: int) -> Tensor:
    lanes = rows_outside(qweight, columns * width // 32)
    pairs = lanes.reshape(*lanes.shape[:-1], 2, 2).transpose(-1, -2)
    return torch.stack([pairs & 15, pairs >> 4], dim=-2) if width == 4 else pairs


def rows_inside(lanes: Tensor) -> Tensor:
    """[..., tiles, 32 rows, lanes of a row, 4 bytes] -> [..., tiles, lanes, rows, bytes]"""
    return lanes.movedim(-3, -2)


def rows_outside(qweight: Tensor, lanes: int) -> Tensor:
    """Bytes [..., tiles, lanes * 32 * 4] -> [..., tiles, 32 rows, lanes, 4 bytes]"""
    return qweight.reshape(*qweight.shape[:-1], lanes, ROWS_PER_TILE, 4).movedim(-2, -3)


TILES = Tiles(ROWS_PER_TILE, COLUMNS, _lay, _lift)
LAYOUT: Layout = Layout(
    "cpu_tile_a16", 1, "cpu", TILES.pack, TILES.unpack, TILES.shapes, stored_bits, ROWS_PER_TILE,
    codebooks=tuple(CODEBOOKS), factors=tuple(FACTORS), scale_dtypes=SCALE_DTYPES, limits=limits, gemv_tokens=8,
)  # fmt: skip
