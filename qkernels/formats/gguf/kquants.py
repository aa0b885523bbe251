"""Super-blocks of 256: Q2_K … Q6_K and IQ4_XS, which split; Q8_K and TQ1_0, which do not.

Facts as in `basic.py`. Element e of a super-block; a row of 32 neighbours is one pass of llama.cpp's inner loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fields import gathered, half, low_high, raw, shifted, words
from .parts import Parts

_TWO_BITS = (0, 2, 4, 6)
_NIBBLES = (0, 4)
_BYTE = tuple(range(8))


def split_q2_k(blocks: Tensor) -> Parts:
    """scales[16] (low nibble scale, high nibble minimum, per 16), qs[64], d, dmin."""
    scales = blocks[:, :16]
    return Parts(_two_bits(blocks[:, 16:80]), scales & 15, scales >> 4, half(blocks, 80), half(blocks, 82))


def join_q2_k(parts: Parts) -> Tensor:
    assert parts.scales is not None and parts.minima is not None and parts.d is not None and parts.dmin is not None
    scales = parts.scales | (parts.minima << 4)
    return torch.cat([scales, _from_two_bits(parts.codes), raw(parts.d), raw(parts.dmin)], dim=1)


def split_q3_k(blocks: Tensor) -> Parts:
    """hmask[32] (bit e // 32 of byte e % 32 is the third of a code), qs[64], scales[12] (six bits each), d."""
    low = low_high(blocks[:, 96:104])
    high = shifted(blocks[:, 104:108], _TWO_BITS, 3).flatten(1)
    scales = ((low | (high << 4)) - 32).view(torch.int8)
    third = shifted(blocks[:, :32], _BYTE, 1).flatten(1)
    return Parts(_two_bits(blocks[:, 32:96]) | (third << 2), scales, d=half(blocks, 108))


def join_q3_k(parts: Parts) -> Tensor:
    assert parts.scales is not None and parts.d is not None
    scales = parts.scales.view(torch.uint8) + 32
    low = gathered((scales & 15).view(-1, 2, 8), _NIBBLES)
    high = gathered((scales >> 4).view(-1, 4, 4), _TWO_BITS)
    third = gathered((parts.codes >> 2).view(-1, 8, 32), _BYTE)
    return torch.cat([third, _from_two_bits(parts.codes & 3), low, high, raw(parts.d)], dim=1)


def split_q4_k(blocks: Tensor) -> Parts:
    """d, dmin, scales[12] (six bits each: 8 scales, 8 minima, per 32), qs[128]."""
    codes = shifted(blocks[:, 16:].reshape(-1, 32), _NIBBLES, 15).reshape(-1, 256)
    return Parts(codes, *_six_bits(blocks[:, 4:16]), half(blocks, 0), half(blocks, 2))


def join_q4_k(parts: Parts) -> Tensor:
    assert parts.d is not None and parts.dmin is not None
    codes = gathered(parts.codes.reshape(-1, 2, 32), _NIBBLES).view(-1, 128)
    return torch.cat([raw(parts.d), raw(parts.dmin), _from_six_bits(parts), codes], dim=1)


def split_q5_k(blocks: Tensor) -> Parts:
    """As Q4_K, with qh[32] before qs: bit e // 32 of byte e % 32 is the fifth of a code."""
    low = shifted(blocks[:, 48:].reshape(-1, 32), _NIBBLES, 15).reshape(-1, 256)
    fifth = shifted(blocks[:, 16:48], _BYTE, 1).flatten(1)
    return Parts(low | (fifth << 4), *_six_bits(blocks[:, 4:16]), half(blocks, 0), half(blocks, 2))


def join_q5_k(parts: Parts) -> Tensor:
    assert parts.d is not None and parts.dmin is not None
    low = gathered((parts.codes & 15).reshape(-1, 2, 32), _NIBBLES).view(-1, 128)
    fifth = gathered((parts.codes >> 4).view(-1, 8, 32), _BYTE)
    return torch.cat([raw(parts.d), raw(parts.dmin), _from_six_bits(parts), fifth, low], dim=1)


def split_q6_k(blocks: Tensor) -> Parts:
    """ql[128], qh[64], int8 scales[16], d: of each 128, 64 bytes of ql hold the low nibbles of elements 0 … 63 and 64 … 127."""
    low = shifted(blocks[:, :128].reshape(-1, 64), _NIBBLES, 15).reshape(-1, 256)
    high = shifted(blocks[:, 128:192].reshape(-1, 32), _TWO_BITS, 3).reshape(-1, 256)
    return Parts(low | (high << 4), blocks[:, 192:208].clone().view(torch.int8), d=half(blocks, 208))


def join_q6_k(parts: Parts) -> Tensor:
    assert parts.scales is not None and parts.d is not None
    low = gathered((parts.codes & 15).reshape(-1, 2, 64), _NIBBLES).view(-1, 128)
    high = gathered((parts.codes >> 4).reshape(-1, 4, 32), _TWO_BITS).view(-1, 64)
    return torch.cat([low, high, parts.scales.view(torch.uint8), raw(parts.d)], dim=1)


def split_iq4_xs(blocks: Tensor) -> Parts:
    """d, uint16 scales_h (two bits per 32), scales_l[4] (a nibble per 32), qs[128]."""
    low = shifted(blocks[:, 4:8], _NIBBLES, 15).transpose(1, 2).flatten(1)
    high = shifted(words(blocks[:, 2:4], 2), range(0, 16, 2), 3).flatten(1).to(torch.uint8)
    codes = shifted(blocks[:, 8:].reshape(-1, 16), _NIBBLES, 15).reshape(-1, 256)
    return Parts(codes, ((low | (high << 4)) - 32).view(torch.int8), d=half(blocks, 0))


def join_iq4_xs(parts: Parts) -> Tensor:
    assert parts.scales is not None and parts.d is not None
    scales = parts.scales.view(torch.uint8) + 32
    low = gathered((scales & 15).view(-1, 4, 2).transpose(1, 2), _NIBBLES)
    high = gathered((scales >> 4).view(-1, 2, 4).transpose(1, 2), _TWO_BITS)
    codes = gathered(parts.codes.reshape(-1, 2, 16), _NIBBLES).view(-1, 128)
    return torch.cat([raw(parts.d), high, low, codes], dim=1)


def decode_q8_k(blocks: Tensor) -> Tensor:
    """float32 d, int8 qs[256], int16 sums[16]. Activations; no known file holds it."""
    return blocks[:, :4].contiguous().view(torch.float32) * blocks[:, 4:260].view(torch.int8).float()


def decode_tq1_0(blocks: Tensor) -> Tensor:
    """qs[48], qh[4], d: five ternary digits a byte (four in qh), the highest first, as fractions of 256 in base 3."""
    digits = [
        (data[:, None, :].int() * torch.tensor([3**n for n in range(count)], device=blocks.device)[:, None]) & 255
        for data, count in ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    ]
    trits = torch.cat([part.flatten(1) for part in digits], dim=1) * 3 >> 8
    return half(blocks, 52).float() * (trits - 1).float()


def _two_bits(data: Tensor) -> Tensor:
    """uint8 `[n, 256]` of `[n, 64]`: of each 32 bytes, field f holds 32 neighbours."""
    return shifted(data.reshape(-1, 32), _TWO_BITS, 3).reshape(-1, 256)


def _from_two_bits(codes: Tensor) -> Tensor:
    return gathered(codes.reshape(-1, 4, 32), _TWO_BITS).view(-1, 64)


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima, uint8 `[n, 8]` each, of 12 bytes: six bits of the first four, and the upper two bits of the others
    above them; the lower nibbles of those in the last four bytes."""
    first, second, nibbles = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, (nibbles & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (nibbles >> 4) | ((second >> 6) << 4)], dim=1)
    return scales, minima


def _from_six_bits(parts: Parts) -> Tensor:
    assert parts.scales is not None and parts.minima is not None
    (scales, more_scales), (minima, more_minima) = parts.scales.chunk(2, 1), parts.minima.chunk(2, 1)
    nibbles = (more_scales & 15) | ((more_minima & 15) << 4)
    return torch.cat([scales | ((more_scales >> 4) << 6), minima | ((more_minima >> 4) << 6), nibbles], dim=1)
