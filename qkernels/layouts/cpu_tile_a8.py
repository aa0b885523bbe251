"""Tiles for the CPU kernels with int8 activations: those of cpu_tile_a16 (same buffers, blocks, planes and padding), but for the
order of the codes in a lane. Dot products of bytes (vpdpbusd, vpmaddubsw) want four neighbours along K in the four bytes of a
lane: byte j of a plane's lane holds columns j, 4 + j, 8 + j, … lowest bits first; of 4-bit codes code j in its low nibble and
code 4 + j in its high one. Static activations have their scale and zero point in a buffer beside: `x_static`, fp32 [2].

Of 3 bits, the bytes of three lanes have at bits 0 and 3 the quads of the octets 0, 1 and 2; of octet 3, quad q has its low two
bits at bit 6 of lane q's bytes, and the third at bit 6 + q of lane 2's.

`csrc/cpu/kernels.h` states the same contract for C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codebooks import INTEGER_STEPS
from ..scheme import ACTIVATIONS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES
from . import BUFFERS_A8, NUMBERS_A8, Layout, cpu_tile_a16
from .canonical import INTEGERS
from .cpu_tile_a16 import ROWS_PER_TILE, Lanes, layouts_of
from .tiles import place, places, true_bits

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


def _lay_threes(codes: Tensor) -> Tensor:
    """Codes of 3 bits [..., 32 columns of a block] -> [..., 3 lanes, 4 bytes]"""
    octets = codes.unflatten(-1, (4, 2, 4))  # quad, byte
    first, last = octets[..., :3, :, :], octets[..., 3, :, :]
    third = last >> 2
    over = torch.cat([last & 3, third[..., :1, :] | third[..., 1:, :] << 1], dim=-2)
    bytes_: Tensor = first[..., 0, :] | first[..., 1, :] << 3 | over << 6
    return bytes_


def _lift_threes(lanes: Tensor) -> Tensor:
    """The inverse."""
    octets, over = torch.stack([lanes & 7, lanes >> 3 & 7], dim=-2), lanes >> 6
    third = torch.stack([over[..., 2, :] & 1, over[..., 2, :] >> 1], dim=-2)
    last = over[..., :2, :] | third << 2
    return torch.cat([octets, last.unsqueeze(-3)], dim=-3).flatten(-3)


TILES, UPGRADES = layouts_of(Lanes(_lay_plane, _lift_plane, _lay_threes, _lift_threes))
LAYOUT: Layout = Layout(
    "cpu_tile_a8", 3, "cpu", TILES.pack, TILES.unpack, TILES.shapes, true_bits, ROWS_PER_TILE,
    acts=INTEGERS, codebooks=tuple(INTEGER_STEPS), factors=tuple(FACTORS), grouped=True, scale_dtypes=SCALE_DTYPES,
    limits=limits, gemv_tokens=8, buffers=BUFFERS_A8, numbers=NUMBERS_A8, upgrades=UPGRADES,
)  # fmt: skip
