"""Rows packed along K for the Triton kernels: one row's codes are contiguous, in natural order but for the fields of a byte.

    qweight  uint8 [..., strips, 64, K_pad * bits / 8]    7-bit codes take 8
    scales   [..., strips, G, 64]                         source dtype, or small factors
    zeros    [..., strips, G, 64]                         uint8 for integer zero points or small factors, floating, or None
    k_order  int32 [K]                                    which column of x each stored column multiplies, or None
    outer_scales, outer_zeros  [..., strips, S, 64]       or None
    table    fp32 [2^bits]                                the values of a codebook, or None

A strip is 64 rows of the weight; N is padded to multiples of 64, K to K_pad, a multiple of a block of 64 columns (2, 4, 6 to 8
bits) or 128 (3 and 5), with code 0. Padded rows have scale 0 and are never stored to the result, padded columns meet x = 0.
Columns are stored in `k_order` (act-order: sorted by group); groups may have any length.

Codes lie in planes (`tiles.GPU_PLANES`): 3 bits are 2 + 1, 5 are 4 + 1, 6 are 4 + 2. The narrowest plane of a code has F fields
of that width in a byte (8 bits 1, 4 bits 2, 2 and 6 bits 4, 3 and 5 bits 8), and a block is F runs of columns: byte j of the
narrowest plane holds column j of each run, the first run's lowest. Byte j of a plane of twice the width holds those of half as
many runs, so that it has two lines of bytes, one of four times the width four. A block is the lines of its planes, lowest plane
first, one behind the other, each of as many bytes as a run has columns:

    bits   columns of a block   F, of so many columns   lines of bytes
    8, 7   64                   1 of 64                 1 of 64
    4      64                   2 of 32                 1 of 32: byte j has column j in its low nibble, column j + 32 above
    2      64                   4 of 16                 1 of 16
    6      64                   4 of 16                 2 of 16 of nibbles (runs 0 and 1, runs 2 and 3), 1 of 16 of bit pairs
    5      128                  8 of 16                 4 of 16 of nibbles, 1 of 16 of single bits
    3      128                  8 of 16                 2 of 16 of bit pairs, 1 of 16 of single bits

Tiles of all lines have one shape, so that a code is put together, and meets a plain tile of x, place by place: nothing moves
between threads, which in Triton is a change of register layout. A line of a row is 16 bytes at least, one load of a thread.
Scales of 64 rows lie next to each other, since threads of a warp take neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..scheme import CODEBOOKS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES, QuantTensor
from . import BUFFERS, Buffer, Buffers, Layout, Shapes
from .tiles import GPU_PLANES, Tiles, Widths, join_planes, place, places, split_planes, upgrade_of

ROWS_PER_TILE = 64  # rows of a strip, the first dimension of every buffer
LINE = 16  # bytes of a line, and columns of a run: as many at least
COLUMNS = 64  # of a block, at least
GEMV_TOKENS = 8


def fields_of(widths: tuple[int, ...]) -> int:
    """F: fields of the narrowest plane in a byte, and runs of columns in a block."""
    return 8 // widths[-1]


def run_of(fields: int) -> int:
    """Columns of a run."""
    return max(COLUMNS // fields, LINE)


def _tiles(planes: Mapping[int, tuple[int, ...]]) -> Tiles:
    """Bits of a code -> the widths of its planes."""

    def columns(bits: int) -> int:
        fields = fields_of(planes[bits])
        return fields * run_of(fields)

    def lay(codes: Tensor, bits: int) -> Tensor:
        fields = fields_of(planes[bits])
        runs = codes.unflatten(-1, (codes.shape[-1] // columns(bits), fields, run_of(fields)))
        lines = [
            place(plane.unflatten(-2, (fields * width // 8, 8 // width)).transpose(-1, -2), width)
            for width, plane in split_planes(runs, bits, planes)
        ]
        return torch.cat(lines, dim=-2).flatten(-3)

    def lift(qweight: Tensor, K_pad: int, bits: int) -> Tensor:
        fields, widths = fields_of(planes[bits]), planes[bits]
        counts = [fields * width // 8 for width in widths]
        lines = qweight.unflatten(-1, (K_pad // columns(bits), sum(counts), run_of(fields)))
        parts = torch.split(lines, counts, dim=-2)
        runs = [
            places(part, width).transpose(-1, -2).flatten(-3, -2) for part, width in zip(parts, widths, strict=True)
        ]
        return join_planes(runs, bits, planes).flatten(-3)

    return Tiles(ROWS_PER_TILE, columns, lay, lift, rows_apart=True, stored_bits=lambda bits: sum(planes[bits]))


_PLANES_2: Widths = {bits: (4,) if bits <= 4 else (8,) for bits in GPU_PLANES}  # of versions 1 and 2
TILES, _TILES_2 = _tiles(GPU_PLANES), _tiles(_PLANES_2)


def shapes(N: int, K: int, bits: int, group_length: int) -> Shapes:
    """See `Layout.shapes`."""
    return TILES.shapes(N, K, bits, group_length) | {"table": (1 << bits,)}


def arrange(weight: QuantTensor) -> dict[str, Tensor | None]:
    """See `Layout.arrange`. Triton kernels look values up in memory: a kernel's constants are no tensors there."""
    codebook = weight.scheme.codebook
    values = None if codebook is None else torch.tensor(CODEBOOKS[codebook], dtype=torch.float32, device=weight.device)
    return TILES.pack(weight) | {"table": values}


_with_planes = upgrade_of(_TILES_2, TILES)


def _with_table(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> Buffers:
    """Version 1 kept a codebook's values where zeros are, and had no planes either."""
    tabled = buffers if scheme.codebook is None else {**buffers, "zeros": None, "table": buffers.get("zeros")}
    return _with_planes(tabled, N, K, scheme)


LAYOUT: Layout = Layout(
    "kpack", 3, "triton", arrange, TILES.unpack, shapes, TILES.stored_bits, ROWS_PER_TILE,
    dtypes=(torch.bfloat16, torch.float16), codebooks=tuple(CODEBOOKS), factors=tuple(FACTORS), grouped=True,
    scale_dtypes=SCALE_DTYPES, gemv_tokens=GEMV_TOKENS,
    buffers=(*BUFFERS, Buffer("table", optional=True, dtype=torch.float32, tiled=False)),
    upgrades={1: _with_table, 2: _with_planes},
)  # fmt: skip
