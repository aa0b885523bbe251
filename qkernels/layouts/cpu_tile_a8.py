"""Tiles for the CPU kernels with int8 activations: those of cpu_tile_a16 (same buffers, shapes and padding), but for the order
of the codes in a lane. Dot products of bytes (vpdpbusd, vpmaddubsw) want four neighbours along K in the four bytes of a lane:

    4 bit  byte j of an octet's lane holds code j in its low nibble and code 4 + j in its high one
    8 bit  byte j of a quad's lane holds code j

`csrc/cpu/kernels.h` states the same contract for C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codebooks import INTEGER_STEPS
from ..scheme import FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES
from . import Layout, cpu_tile_a16
from .cpu_tile_a16 import COLUMNS, ROWS_PER_TILE, rows_inside, rows_outside
from .tiles import Tiles, stored_bits

# So many products fit an int32 sum: of |x| <= 127 with |code - 2^(bits-1)| <= 128, or with |code - zero| <= 255, whatever the
# byte that a file has for a zero point: 2^17 * 127 * 128 = 0.992 * 2^31, 2^16 * 127 * 255 = 0.988 * 2^31. Floating zeros and
# offsets leave the integers of a symmetric weight, and add sum(x) * rest in fp32: |sum(x)| <= 127 * 2^17 < 2^24 is exact there.
LONGEST_GROUP = 1 << 17
LONGEST_GROUP_WITH_ZERO_POINTS = 1 << 16


def limits(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Groups that end inside an octet, or whose sum of products could overflow."""
    why = cpu_tile_a16.limits(N, K, scheme)
    longest = LONGEST_GROUP_WITH_ZERO_POINTS if scheme.zeros == "int" else LONGEST_GROUP
    if min(K, scheme.group_length(K)) > longest:
        why.append(f"groups of {scheme.group_length(K)} could overflow an int32 sum: at most {longest}")
    return why


def _lay(codes: Tensor, width: int) -> Tensor:
    *lead, columns = codes.shape
    if width == 4:
        octets = codes.reshape(*lead, columns // 8, 8)
        return rows_inside(octets[..., :4] | (octets[..., 4:] << 4))
    return rows_inside(codes.reshape(*lead, columns // 4, 4))


def _lift(qweight: Tensor, columns: int, width: int) -> Tensor:
    lanes = rows_outside(qweight, columns * width // 32)
    return torch.cat([lanes & 15, lanes >> 4], dim=-1) if width == 4 else lanes


TILES = Tiles(ROWS_PER_TILE, COLUMNS, _lay, _lift)
LAYOUT: Layout = Layout(
    "cpu_tile_a8", 1, "cpu", TILES.pack, TILES.unpack, TILES.shapes, stored_bits, ROWS_PER_TILE,
    acts=("int8",), codebooks=tuple(INTEGER_STEPS), factors=tuple(FACTORS), scale_dtypes=SCALE_DTYPES,
    limits=limits, gemv_tokens=8,
)  # fmt: skip
