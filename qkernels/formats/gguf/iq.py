"""The IQ types that look weights up in grids: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S. Decoded only.

A super-block has 256 weights in 32 rows of 8 (of a row of IQ3, two patterns of 4). Facts: gguf-py 0.19.0, quants.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fields import half, shifted, words
from .grids import grid, signs

_NIBBLES = (0, 4)
_TWO_BITS = (0, 2, 4, 6)
_BYTE = tuple(range(8))
_DELTA = 0.125  # by which the weights of IQ1 lie off their grid


def decode_iq2_xxs(blocks: Tensor) -> Tensor:
    """d, then per 32 weights: four indices, and a word of four times 7 bits of signs and 4 of scale."""
    fields = words(blocks[:, 2:], 4).view(-1, 8, 2)
    indices = blocks[:, 2:].reshape(-1, 8, 8)[:, :, :4]
    return _signed(
        _quarter(half(blocks, 0), fields[..., 1] >> 28), _looked_up("IQ2_XXS", indices), _seven(fields[..., 1])
    )


def decode_iq2_xs(blocks: Tensor) -> Tensor:
    """d, 32 words of 9 bits of index and 7 of signs, scales[8] (a nibble per 16)."""
    fields = words(blocks[:, 2:66], 2)
    scales = shifted(blocks[:, 66:74], _NIBBLES, 15).transpose(1, 2).flatten(1)
    return _signed(_quarter(half(blocks, 0), scales), _looked_up("IQ2_XS", fields & 511), _table(signs(), fields >> 9))


def decode_iq2_s(blocks: Tensor) -> Tensor:
    """d, qs[32], signs[32], qh[8] (two more bits of each index), scales[8] (a nibble per 16)."""
    high = shifted(blocks[:, 66:74], _TWO_BITS, 3).transpose(1, 2).flatten(1)
    indices = blocks[:, 2:34].long() | (high.long() << 8)
    scales = shifted(blocks[:, 74:82], _NIBBLES, 15).transpose(1, 2).flatten(1)
    return _signed(_quarter(half(blocks, 0), scales), _looked_up("IQ2_S", indices), _eight(blocks[:, 34:66]))


def decode_iq3_xxs(blocks: Tensor) -> Tensor:
    """d, qs[64], then per 32 weights a word of four times 7 bits of signs and 4 of scale."""
    fields = words(blocks[:, 66:98], 4)
    scales = half(blocks, 0).float() * (0.5 + (fields >> 28).float()) * 0.5
    return _signed(scales, _looked_up("IQ3_XXS", blocks[:, 2:66]), _seven(fields))


def decode_iq3_s(blocks: Tensor) -> Tensor:
    """d, qs[64], qh[8] (one more bit of each index), signs[32], scales[4] (a nibble per 32)."""
    high = shifted(blocks[:, 66:74], _BYTE, 1).transpose(1, 2).flatten(1)
    indices = blocks[:, 2:66].long() | (high.long() << 8)
    scales = shifted(blocks[:, 106:110], _NIBBLES, 15).transpose(1, 2).flatten(1)
    scales = half(blocks, 0).float() * (1 + 2 * scales.float())
    return _signed(scales, _looked_up("IQ3_S", indices), _eight(blocks[:, 74:106]))


def decode_iq1_s(blocks: Tensor) -> Tensor:
    """d, qs[32], then per 32 weights a word: four times 3 more bits of index, 3 of scale, 1 of which side of the grid."""
    fields = words(blocks[:, 34:50], 2)
    high = shifted(fields, (0, 3, 6, 9), 7).transpose(1, 2).flatten(1)
    scales = half(blocks, 0).float() * (2 * ((fields >> 12) & 7) + 1).float()
    delta = torch.where((fields >> 15) == 0, _DELTA, -_DELTA)
    weights = _looked_up("IQ1_S", blocks[:, 2:34].long() | (high << 8)).view(-1, 8, 32)
    return (scales[..., None] * (weights + delta[..., None])).flatten(1)


def decode_iq1_m(blocks: Tensor) -> Tensor:
    """qs[32], qh[16] (per 8 weights 3 more bits of index, 1 of which side of the grid), then four words of four times 3 bits of
    scale (per 16), whose top nibbles together are d."""
    fields = words(blocks[:, 48:56], 2)
    d = torch.zeros_like(fields[:, :1])
    for i in range(4):
        d |= (fields[:, i : i + 1] >> 12) << (4 * i)
    d_bits = torch.where(d >= 2**15, d - 2**16, d).to(torch.int16)
    scales = shifted(fields, (0, 3, 6, 9), 7).transpose(1, 2).flatten(1)
    scales = d_bits.view(torch.float16).float() * (2 * scales + 1).float()
    high = shifted(blocks[:, 32:48], _NIBBLES, 15).transpose(1, 2).flatten(1).long()
    delta = torch.where((high & 8) == 0, _DELTA, -_DELTA)
    weights = _looked_up("IQ1_S", blocks[:, :32].long() | ((high & 7) << 8)).view(-1, 32, 8) + delta[..., None]
    return (scales[..., None] * weights.view(-1, 16, 16)).flatten(1)


def _looked_up(name: str, indices: Tensor) -> Tensor:
    """float32 `[n, 256]`."""
    return _table(grid(name), indices)


def _table(table: Tensor, indices: Tensor) -> Tensor:
    return table.to(indices.device)[indices.long()].reshape(len(indices), -1)


def _quarter(d: Tensor, scales: Tensor) -> Tensor:
    """float32 `[n, S]`: the scale of the IQ2 types, d (s + 1/2) / 4."""
    return d.float() * (0.5 + scales.float()) * 0.25


def _seven(fields: Tensor) -> Tensor:
    """float32 `[n, 256]`: signs of four times 7 bits in each word."""
    return _table(signs(), shifted(fields, (0, 7, 14, 21), 127).transpose(1, 2))


def _eight(data: Tensor) -> Tensor:
    """float32 `[n, 256]`: a sign a bit."""
    return 1.0 - 2.0 * shifted(data, _BYTE, 1).transpose(1, 2).flatten(1).float()


def _signed(scales: Tensor, weights: Tensor, sign: Tensor) -> Tensor:
    return (scales[..., None] * weights.view(*scales.shape, -1)).flatten(1) * sign
