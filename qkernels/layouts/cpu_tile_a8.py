"""Tiles for the CPU kernels with int8 activations: those of cpu_tile_a16 (same buffers, blocks, planes and padding), but for the
order of the codes in a lane. Dot products of bytes (vpdpbusd, vpmaddubsw) want four neighbours along K in the four bytes of a
lane: byte j of a plane's lane holds columns j, 4 + j, 8 + j, … lowest bits first; of 4-bit codes code j in its low nibble and
code 4 + j in its high one. Static activations have their scale and zero point in a buffer beside: `x_static`, fp32 [2].

`csrc/cpu/kernels.h` states the same contract for C++.
"""

from __future__ import annotations

from torch import Tensor

from ..codebooks import INTEGER_STEPS
from ..scheme import ACTIVATIONS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES
from . import BUFFERS_A8, NUMBERS_A8, Layout, cpu_tile_a16
from .canonical import INTEGERS
from .cpu_tile_a16 import ROWS_PER_TILE, tiles_with
from .tiles import place, places, true_bits, upgrade_of

# So many products fit an int32 sum: of |x| <= 127 with |code - 2^(bits-1)| <= 128, or with |code - zero| <= 255, whatever the
# byte that a file has for a zero point: 2^17 * 127 * 128 = 0.992 * 2^31, 2^16 * 127 * 255 = 0.988 * 2^31. Floating zeros and
# offsets leave the integers of a symmetric weight, and add sum(x) * rest in fp32: |sum(x)| <= 127 * 2^17 < 2^24 is exact there.
# Where x goes down to -128, 2^17 * 128 * 128 is one too many (2^16 * 128 * 255 = 0.996 * 2^31), and 2^24 still exact.
LONGEST_GROUP = 1 << 17
LONGEST_GROUP_WITH_ZERO_POINTS = 1 << 16


def limits(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Groups that end inside an octet, or whose sum of products could overflow."""
    why = cpu_tile_a16.limits(N, K, scheme)
    wide = ACTIVATIONS[scheme.act].lowest == -128
    longest = LONGEST_GROUP_WITH_ZERO_POINTS if scheme.zeros == "int" else LONGEST_GROUP - wide
    if min(K, scheme.group_length(K)) > longest:
        why.append(f"groups of {scheme.group_length(K)} could overflow an int32 sum: at most {longest}")
    return why


def _lay_plane(codes: Tensor, width: int) -> Tensor:
    """[..., columns of a lane] -> [..., 4 bytes]"""
    return place(codes.unflatten(-1, (8 // width, 4)).transpose(-1, -2), width)


def _lift_plane(lanes: Tensor, width: int) -> Tensor:
    """The inverse."""
    return places(lanes, width).transpose(-1, -2).flatten(-2)


TILES, _TILES_1 = tiles_with(_lay_plane, _lift_plane), tiles_with(_lay_plane, _lift_plane, old=True)
LAYOUT: Layout = Layout(
    "cpu_tile_a8", 2, "cpu", TILES.pack, TILES.unpack, TILES.shapes, true_bits, ROWS_PER_TILE,
    acts=INTEGERS, codebooks=tuple(INTEGER_STEPS), factors=tuple(FACTORS), grouped=True, scale_dtypes=SCALE_DTYPES,
    limits=limits, gemv_tokens=8, buffers=BUFFERS_A8, numbers=NUMBERS_A8, upgrades={1: upgrade_of(_TILES_1, TILES)},
)  # fmt: skip
