"""Tiles for the CPU kernels with int8 activations: those of cpu_tile_a16 (same buffers, shapes and padding), but for the order
of the codes in a lane. Dot products of bytes (vpdpbusd, vpmaddubsw) want four neighbours along K in the four bytes of a lane:

    4 bit  byte j of an octet's lane holds code j in its low nibble and code 4 + j in its high one
    8 bit  byte j of a quad's lane holds code j

`csrc/cpu/kernels.h` states the same contract for C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConversionError
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from . import Buffers, Layout
from .cpu_tile_a16 import COLUMNS, ROWS_PER_TILE, buffer_shapes, pack_tiles, unpack_tiles

# So many products fit an int32 sum: of |x| <= 127 with |code - 2^(bits-1)| <= 128, or with |code - zero| <= 255, whatever the
# byte that a file has for a zero point: 2^17 * 127 * 128 = 0.992 * 2^31, 2^16 * 127 * 255 = 0.988 * 2^31. Floating zeros and
# offsets leave the integers of a symmetric weight, and add sum(x) * rest in fp32: |sum(x)| <= 127 * 2^17 < 2^24 is exact there.
LONGEST_GROUP = 1 << 17
LONGEST_GROUP_WITH_ZERO_POINTS = 1 << 16


def reasons(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """Why an [N, K] weight of this scheme has no such tiles."""
    why = []
    if scheme.act != "int8":
        why.append("16-bit activations: these kernels quantize them to int8, which a scheme like w4a8_g128 asks for")
    if scheme.num_groups(K) > 1 and scheme.group_length(K) % COLUMNS:
        why.append(f"group_size {scheme.group_size} is not a multiple of {COLUMNS}")
    longest = LONGEST_GROUP_WITH_ZERO_POINTS if scheme.zeros == "int" else LONGEST_GROUP
    if min(K, scheme.group_length(K)) > longest:
        why.append(f"groups of {scheme.group_length(K)} could overflow an int32 sum: at most {longest}")
    return why


def pack(qt: QuantTensor) -> dict[str, Tensor | None]:
    """Weight -> buffers; leading (expert) dimensions stay in front of qweight, scales and zeros.

    Raises:
        ConversionError: the scheme has a reason (see `reasons`).
    """
    if why := reasons(qt.N, qt.K, qt.scheme):
        raise ConversionError(f"layout cpu_tile_a8 cannot hold {qt.scheme} with N={qt.N}, K={qt.K}: {'; '.join(why)}")
    return pack_tiles(qt, _lanes)


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """The weight that was packed, bit for bit. Buffers from outside go through `layouts.unpack_checked`."""
    return unpack_tiles(buffers, N, K, scheme, _codes)


def _lanes(codes: Tensor, width: int) -> Tensor:
    *lead, octets, _ = codes.shape
    if width == 4:
        return codes[..., :4] | (codes[..., 4:] << 4)
    return codes.reshape(*lead, octets * 2, 4)


def _codes(lanes: Tensor, width: int) -> Tensor:
    return torch.cat([lanes & 15, lanes >> 4], dim=-1) if width == 4 else lanes


LAYOUT: Layout = Layout(
    "cpu_tile_a8", 1, reasons, pack, unpack, buffer_shapes, ROWS_PER_TILE, gemv_tokens=8, device="cpu", compiled=True,
)  # fmt: skip
