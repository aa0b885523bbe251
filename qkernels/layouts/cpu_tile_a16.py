"""Tiles for the CPU kernels with floating activations: 32 rows, k in octets; the same bytes for AVX-512, AVX2 and scalar code.

    qweight  uint8 [..., tiles, K_pad * 32 * bits / 8]    7-bit codes take 8
    scales   [..., tiles, G, 32]                          source dtype, or small factors
    zeros    [..., tiles, G, 32]                          uint8 for integer zero points or small factors, floating, or None
    k_order  int32 [K]                                    which column of x each stored column multiplies, or None
    outer_scales, outer_zeros  [..., tiles, S, 32]        or None

Columns are stored in `k_order` (act-order: sorted by group), K padded to K_pad, a multiple of a block of 8 columns (4, 7
and 8 bits), 16 (2 and 6) or 32 (3 and 5); groups are a multiple of 8 long, so that only the last one can be padded. N is
padded to whole tiles with rows of code 0 and scale 0. Padded columns have code 0 and meet x = 0.

A block is one plane after the other (`tiles.PLANES`), a plane of `width` bits a few 32-bit lanes a row, one after the other for
all 32 rows: 16 rows to 64 bytes. The low word of a lane holds the even columns, its high word the odd ones, lowest bits first:
of 4-bit codes k = 0, 2, 4, 6 and k = 1, 3, 5, 7. Shifting the lane right by width p leaves the pair (2 p, 2 p + 1) at the bottom
of its two words, which is what a table look-up by word (vpermw) and a dot product of bf16 pairs (vdpbf16ps) want.

3 bits do not fill a word: five of them leave a bit over. A block of 32 columns is three lanes, whose words have at bits 0, 3, 6,
9 the pairs of the octets 0, 1 and 2. Of octet 3, the pairs 0, 1 and 2 are at bit 12 of the three lanes' words, and the bits of
pair 3, lowest first, are their bits 15.

`csrc/cpu/kernels.h` states the same contract for C++. Version 1 had no planes: codes of 2 bits took 4, of 5 and 6 bits 8. Up to
version 2, codes of 3 bits took 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scheme import CODEBOOKS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES
from . import Buffers, Layout
from .tiles import PLANES, Tiles, join_planes, place, places, split_planes, stored_bits, true_bits, upgrade_of

ROWS_PER_TILE = 32
OCTET = 8  # groups begin at multiples of this


def columns(bits: int) -> int:
    """Columns of a block: as many as fill whole lanes of the narrowest plane."""
    if bits == 3:
        return 32
    return max(OCTET, 32 // min(PLANES[bits]))


def limits(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Groups that end inside an octet."""
    if scheme.num_groups(K) > 1 and scheme.group_length(K) % OCTET:
        return [f"group_size {scheme.group_size} is not a multiple of {OCTET}"]
    return []


def _lay_plane(codes: Tensor, width: int) -> Tensor:
    """[..., columns of a lane] -> [..., 4 bytes]: column k = 2 i + e is at bit width i of word e, 8 / width of them to a byte."""
    halves = codes.unflatten(-1, (2, 8 // width, 2))  # byte of the word, place in the byte, word
    return place(halves.movedim(-2, -1), width).transpose(-1, -2).flatten(-2)


def _lift_plane(lanes: Tensor, width: int) -> Tensor:
    """The inverse."""
    words = lanes.unflatten(-1, (2, 2)).transpose(-1, -2)  # byte of the word, word
    return places(words, width).movedim(-1, -2).flatten(-3)


def _lay_threes(codes: Tensor) -> Tensor:
    """Codes of 3 bits [..., 32 columns of a block] -> [..., 3 lanes, 4 bytes]"""
    octets = codes.unflatten(-1, (4, 4, 2))  # pair, word
    p, last = octets[..., :3, :, :].unbind(-2), octets[..., 3, :3, :]
    bit = torch.stack([octets[..., 3, 3, :] >> i & 1 for i in range(3)], dim=-2)
    # Of each word; what is shifted out of the low byte is in the high one.
    low, high = p[0] | p[1] << 3 | p[2] << 6, p[2] >> 2 | p[3] << 1 | last << 4 | bit << 7
    return torch.stack([low, high], dim=-1).flatten(-2)


def _lift_threes(lanes: Tensor) -> Tensor:
    """The inverse."""
    low, high = lanes.unflatten(-1, (2, 2)).unbind(-1)  # [..., 3, words]
    octets = torch.stack([low & 7, low >> 3 & 7, low >> 6 | (high & 1) << 2, high >> 1 & 7], dim=-2)
    bit = (high >> 7).unbind(-2)
    last = torch.cat([high >> 4 & 7, (bit[0] | bit[1] << 1 | bit[2] << 2).unsqueeze(-2)], dim=-2)
    return torch.cat([octets, last.unsqueeze(-3)], dim=-3).flatten(-3)


@dataclass(frozen=True)
class Lanes:
    """The order of codes in the 32-bit lanes of a row, and its inverse.

    Args:
        lay_plane, lift_plane: ([..., columns of a lane], bits of a field) <-> [..., 4 bytes]
        lay_threes, lift_threes: codes of 3 bits [..., 32 columns] <-> [..., 3 lanes, 4 bytes]
    """

    lay_plane: Callable[[Tensor, int], Tensor]
    lift_plane: Callable[[Tensor, int], Tensor]
    lay_threes: Callable[[Tensor], Tensor]
    lift_threes: Callable[[Tensor], Tensor]

    def lay(self, blocks: Tensor, bits: int) -> Tensor:
        """Codes [..., columns of a block] -> [..., lanes of a block, 4 bytes]"""
        if bits == 3:
            return self.lay_threes(blocks)
        planes = split_planes(blocks, bits)
        return torch.cat(
            [self.lay_plane(plane.unflatten(-1, (-1, 32 // width)), width) for width, plane in planes], dim=-2
        )

    def lift(self, lanes: Tensor, bits: int) -> Tensor:
        """The inverse."""
        if bits == 3:
            return self.lift_threes(lanes)
        widths = PLANES[bits]
        parts = torch.split(lanes, [columns(bits) * width // 32 for width in widths], dim=-2)
        found = [self.lift_plane(part, width).flatten(-2) for part, width in zip(parts, widths, strict=True)]
        return join_planes(found, bits)


def tiles_with(lanes: Lanes, planes: Callable[[int], int] = int) -> Tiles:
    """The tiles of a CPU layout, given the order of its lanes; `planes`: bits of a code -> as how many it is laid."""

    def lay(codes: Tensor, bits: int) -> Tensor:
        laid = planes(bits)
        return rows_inside(lanes.lay(codes.unflatten(-1, (-1, columns(laid))), laid).flatten(-3, -2))

    def lift(qweight: Tensor, K_pad: int, bits: int) -> Tensor:
        laid = planes(bits)
        block, blocks = columns(laid), K_pad // columns(laid)
        of_rows = rows_outside(qweight, K_pad * true_bits(laid) // 32)
        return lanes.lift(of_rows.unflatten(-2, (blocks, block * true_bits(laid) // 32)), laid).flatten(-2)

    return Tiles(
        ROWS_PER_TILE, lambda bits: columns(planes(bits)), lay, lift, stored_bits=lambda bits: true_bits(planes(bits))
    )


def layouts_of(lanes: Lanes) -> tuple[Tiles, dict[int, Callable[[Buffers, int, int, QuantScheme], Buffers]]]:
    """The tiles of a CPU layout, and what makes them of those of earlier versions."""
    tiles = tiles_with(lanes)
    earlier = {1: stored_bits, 2: lambda bits: 4 if bits == 3 else bits}
    return tiles, {version: upgrade_of(tiles_with(lanes, planes), tiles) for version, planes in earlier.items()}


def rows_inside(lanes: Tensor) -> Tensor:
    """[..., tiles, 32 rows, lanes of a row, 4 bytes] -> [..., tiles, lanes, rows, bytes]"""
    return lanes.movedim(-3, -2)


def rows_outside(qweight: Tensor, lanes: int) -> Tensor:
    """Bytes [..., tiles, lanes * 32 * 4] -> [..., tiles, 32 rows, lanes, 4 bytes]"""
    return qweight.reshape(*qweight.shape[:-1], lanes, ROWS_PER_TILE, 4).movedim(-2, -3)


TILES, UPGRADES = layouts_of(Lanes(_lay_plane, _lift_plane, _lay_threes, _lift_threes))
LAYOUT: Layout = Layout(
    "cpu_tile_a16", 3, "cpu", TILES.pack, TILES.unpack, TILES.shapes, true_bits, ROWS_PER_TILE,
    codebooks=tuple(CODEBOOKS), factors=tuple(FACTORS), grouped=True, scale_dtypes=SCALE_DTYPES, limits=limits, gemv_tokens=8,
    upgrades=UPGRADES,
)  # fmt: skip
