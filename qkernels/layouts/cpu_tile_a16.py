"""Tiles for the CPU kernels with floating activations: 32 rows, k in octets; the same bytes for AVX-512, AVX2 and scalar code.

    qweight  uint8 [..., tiles, K_pad * 32 * bits / 8]    3-bit codes take 4, 7-bit ones 8
    scales   [..., tiles, G, 32]                          source dtype, or small factors
    zeros    [..., tiles, G, 32]                          uint8 for integer zero points or small factors, floating, or None
    k_order  int32 [K]                                    which column of x each stored column multiplies, or None
    outer_scales, outer_zeros  [..., tiles, S, 32]        or None

Columns are stored in `k_order` (act-order: sorted by group), K padded to K_pad, a multiple of a block of 8 columns (3, 4
and 7, 8 bits), 16 (2 and 6) or 32 (5); groups are a multiple of 8 long, so that only the last one can be padded. N is padded to
whole tiles with rows of code 0 and scale 0. Padded columns have code 0 and meet x = 0.

A block is one plane after the other (`tiles.PLANES`), a plane of `width` bits a few 32-bit lanes a row, one after the other for
all 32 rows: 16 rows to 64 bytes. The low word of a lane holds the even columns, its high word the odd ones, lowest bits first:
of 4-bit codes k = 0, 2, 4, 6 and k = 1, 3, 5, 7. Shifting the lane right by width p leaves the pair (2 p, 2 p + 1) at the bottom
of its two words, which is what a table look-up by word (vpermw) and a dot product of bf16 pairs (vdpbf16ps) want.
`csrc/cpu/kernels.h` states the same contract for C++. Version 1 had no planes: codes of 2 bits took 4, of 5 and 6 bits 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..scheme import CODEBOOKS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES
from . import Layout
from .tiles import PLANES, Tiles, join_planes, place, places, split_planes, stored_bits, true_bits, upgrade_of

ROWS_PER_TILE = 32
OCTET = 8  # groups begin at multiples of this


def columns(bits: int) -> int:
    """Columns of a block: as many as fill whole lanes of the narrowest plane."""
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


def lay_with(
    lay_plane: Callable[[Tensor, int], Tensor], planes: Callable[[int], int]
) -> Callable[[Tensor, int], Tensor]:
    """`Tiles.lay` in blocks of planes, given the order of a lane; `planes`: bits of a code -> as how many it is laid."""

    def lay(codes: Tensor, bits: int) -> Tensor:
        bits = planes(bits)
        block = columns(bits)
        blocks = codes.unflatten(-1, (codes.shape[-1] // block, block))
        lanes = [
            lay_plane(plane.unflatten(-1, (block * width // 32, 32 // width)), width)
            for width, plane in split_planes(blocks, bits)
        ]
        return rows_inside(torch.cat(lanes, dim=-2).flatten(-3, -2))

    return lay


def lift_with(
    lift_plane: Callable[[Tensor, int], Tensor], planes: Callable[[int], int]
) -> Callable[[Tensor, int, int], Tensor]:
    """The inverse of `lay_with`."""

    def lift(qweight: Tensor, K_pad: int, bits: int) -> Tensor:
        bits = planes(bits)
        block = columns(bits)
        lanes = rows_outside(qweight, K_pad * sum(PLANES[bits]) // 32).unflatten(
            -2, (K_pad // block, block * sum(PLANES[bits]) // 32)
        )
        counts = [block * width // 32 for width in PLANES[bits]]
        parts = torch.split(lanes, counts, dim=-2)
        found = [lift_plane(part, width).flatten(-2) for part, width in zip(parts, PLANES[bits], strict=True)]
        return join_planes(found, bits)

    return lift


def tiles_with(
    lay_plane: Callable[[Tensor, int], Tensor], lift_plane: Callable[[Tensor, int], Tensor], old: bool = False
) -> Tiles:
    """The tiles of a CPU layout, given the order of a lane; `old`: those of version 1."""
    planes = stored_bits if old else int
    return Tiles(
        ROWS_PER_TILE, lambda bits: columns(planes(bits)), lay_with(lay_plane, planes), lift_with(lift_plane, planes),
        stored_bits=stored_bits if old else true_bits,
    )  # fmt: skip


def rows_inside(lanes: Tensor) -> Tensor:
    """[..., tiles, 32 rows, lanes of a row, 4 bytes] -> [..., tiles, lanes, rows, bytes]"""
    return lanes.movedim(-3, -2)


def rows_outside(qweight: Tensor, lanes: int) -> Tensor:
    """Bytes [..., tiles, lanes * 32 * 4] -> [..., tiles, 32 rows, lanes, 4 bytes]"""
    return qweight.reshape(*qweight.shape[:-1], lanes, ROWS_PER_TILE, 4).movedim(-2, -3)


TILES, _TILES_1 = tiles_with(_lay_plane, _lift_plane), tiles_with(_lay_plane, _lift_plane, old=True)
LAYOUT: Layout = Layout(
    "cpu_tile_a16", 2, "cpu", TILES.pack, TILES.unpack, TILES.shapes, true_bits, ROWS_PER_TILE,
    codebooks=tuple(CODEBOOKS), factors=tuple(FACTORS), grouped=True, scale_dtypes=SCALE_DTYPES, limits=limits, gemv_tokens=8,
    upgrades={1: upgrade_of(_TILES_1, TILES)},
)  # fmt: skip
