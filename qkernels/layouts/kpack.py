"""Rows packed along K for the Triton kernels: one row's codes are contiguous, in natural order but for the nibbles.

    qweight  uint8 [..., strips, 64, K_pad * width / 8]   width 4 (codes of 2 to 4 bits) or 8 (5 to 8 bits)
    scales   [..., strips, G, 64]                         source dtype, or small factors
    zeros    [..., strips, G, 64]                         uint8 for integer zero points or small factors, floating, or None
    k_order  int32 [K]                                    which column of x each stored column multiplies, or None
    outer_scales, outer_zeros  [..., strips, S, 64]       or None
    table    fp32 [2^bits]                                the values of a codebook, or None

A strip is 64 rows of the weight; N and K are padded to multiples of 64 with code 0. Padded rows have scale 0 and are never
stored to the result, padded columns meet x = 0. Columns are stored in `k_order` (act-order: sorted by group); groups may have
any length.

What the two widths cost: codes of 2 bits take twice the bytes of a dense packing, of 3 bits 4/3, of 5 bits 8/5, of 6 bits 4/3
and of 7 bits 8/7. A [4096, 4096] weight in w2a16_g128 is 8.25 MiB here and would be 4.25 MiB; a decoder, which is bound by
bytes, gains nothing from 2 or 3 bits over 4 on these kernels.

Width 4: of every 64 columns, byte j holds column j in its low nibble and column j + 32 in its high one. A tile of bytes is
then two tiles of columns (`byte & 15` and `byte >> 4`) that multiply two plain tiles of x: no interleaving, which in Triton is
a change of register layout. Width 8: byte j is column j. Scales of 64 rows lie next to each other, since threads of a warp
take neighbouring rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import CODEBOOKS, FACTORS, QuantScheme
from ..tensor import SCALE_DTYPES, QuantTensor
from . import BUFFERS, Buffer, Buffers, Layout, Shapes
from .tiles import Tiles, stored_bits

ROWS_PER_TILE = 64  # rows of a strip, the first dimension of every buffer
COLUMNS = 64  # K is padded to a multiple of this
GEMV_TOKENS = 8


def _lay(codes: Tensor, bits: int) -> Tensor:
    if stored_bits(bits) == 8:
        return codes
    *lead, columns = codes.shape
    halves = codes.reshape(*lead, columns // COLUMNS, 2, COLUMNS // 2)
    return halves[..., 0, :] | (halves[..., 1, :] << 4)


def _lift(qweight: Tensor, columns: int, bits: int) -> Tensor:
    if stored_bits(bits) == 8:
        return qweight
    blocks = qweight.reshape(*qweight.shape[:-1], columns // COLUMNS, COLUMNS // 2)
    return torch.stack([blocks & 15, blocks >> 4], dim=-2)


TILES = Tiles(ROWS_PER_TILE, lambda bits: COLUMNS, _lay, _lift, rows_apart=True)


def shapes(N: int, K: int, bits: int, group_length: int) -> Shapes:
    """See `Layout.shapes`."""
    return TILES.shapes(N, K, bits, group_length) | {"table": (1 << bits,)}


def arrange(weight: QuantTensor) -> dict[str, Tensor | None]:
    """See `Layout.arrange`. Triton kernels look values up in memory: a kernel's constants are no tensors there."""
    codebook = weight.scheme.codebook
    values = None if codebook is None else torch.tensor(CODEBOOKS[codebook], dtype=torch.float32, device=weight.device)
    return TILES.pack(weight) | {"table": values}


def _with_table(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> Buffers:
    """Version 1 kept a codebook's values where zeros are."""
    return buffers if scheme.codebook is None else {**buffers, "zeros": None, "table": buffers.get("zeros")}


LAYOUT: Layout = Layout(
    "kpack", 2, "triton", arrange, TILES.unpack, shapes, stored_bits, ROWS_PER_TILE,
    dtypes=(torch.bfloat16, torch.float16), codebooks=tuple(CODEBOOKS), factors=tuple(FACTORS), grouped=True,
    scale_dtypes=SCALE_DTYPES, gemv_tokens=GEMV_TOKENS,
    buffers=(*BUFFERS, Buffer("table", optional=True, dtype=torch.float32, tiled=False)), upgrades={1: _with_table},
)  # fmt: skip
