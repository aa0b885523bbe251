"""Blocks with one scale, or one scale and a minimum: Q4_0 … Q8_1, IQ4_NL, MXFP4, NVFP4, Q1_0, Q2_0, TQ2_0. All of them split.

Facts: ggml-common.h and ggml-quants.c of llama.cpp (version 0.25.3 of ggml); element e of a block, byte order as listed there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fields import from_low_high, gathered, half, low_high, raw, shifted
from .parts import Parts

_BYTE = tuple(range(8))
_TWO_BITS = (0, 2, 4, 6)


def split_q4_0(blocks: Tensor) -> Parts:
    """d, qs[16]: element j is the low nibble of byte j, element j + 16 the high one. IQ4_NL likewise."""
    return Parts(low_high(blocks[:, 2:]), d=half(blocks, 0))


def join_q4_0(parts: Parts) -> Tensor:
    assert parts.d is not None
    return torch.cat([raw(parts.d), from_low_high(parts.codes)], dim=1)


def split_q4_1(blocks: Tensor) -> Parts:
    """d, m, qs[16]."""
    return Parts(low_high(blocks[:, 4:]), d=half(blocks, 0), dmin=half(blocks, 2))


def join_q4_1(parts: Parts) -> Tensor:
    assert parts.d is not None and parts.dmin is not None
    return torch.cat([raw(parts.d), raw(parts.dmin), from_low_high(parts.codes)], dim=1)


def split_q5_0(blocks: Tensor) -> Parts:
    """d, qh[4] (bit j is the fifth of element j), qs[16]."""
    return Parts(low_high(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4), d=half(blocks, 0))


def join_q5_0(parts: Parts) -> Tensor:
    assert parts.d is not None
    return torch.cat([raw(parts.d), _bytes(parts.codes >> 4), from_low_high(parts.codes)], dim=1)


def split_q5_1(blocks: Tensor) -> Parts:
    """d, m, qh[4], qs[16]."""
    return Parts(low_high(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4), d=half(blocks, 0), dmin=half(blocks, 2))


def join_q5_1(parts: Parts) -> Tensor:
    assert parts.d is not None and parts.dmin is not None
    return torch.cat([raw(parts.d), raw(parts.dmin), _bytes(parts.codes >> 4), from_low_high(parts.codes)], dim=1)


def split_q8_0(blocks: Tensor) -> Parts:
    """d, int8 qs[32]: codes are qs + 128."""
    return Parts(blocks[:, 2:] ^ 128, d=half(blocks, 0))


def join_q8_0(parts: Parts) -> Tensor:
    assert parts.d is not None
    return torch.cat([raw(parts.d), parts.codes ^ 128], dim=1)


def split_mxfp4(blocks: Tensor) -> Parts:
    """e (e8m0), qs[16]."""
    return Parts(low_high(blocks[:, 1:]), blocks[:, :1].clone())


def join_mxfp4(parts: Parts) -> Tensor:
    assert parts.scales is not None
    return torch.cat([parts.scales, from_low_high(parts.codes)], dim=1)


def split_nvfp4(blocks: Tensor) -> Parts:
    """d[4] (unsigned e4m3, one per 16), qs[32]: of each 16, elements j and j + 8 share a byte."""
    return Parts(low_high(blocks[:, 4:].reshape(-1, 8)).view(-1, 64), blocks[:, :4].clone())


def join_nvfp4(parts: Parts) -> Tensor:
    assert parts.scales is not None
    return torch.cat([parts.scales, from_low_high(parts.codes.reshape(-1, 16)).view(-1, 32)], dim=1)


def split_q1_0(blocks: Tensor) -> Parts:
    """d, qs[16]: bits, the lowest first. Codes 0 and 1 mean -d and d."""
    return Parts(_bits(blocks[:, 2:]), d=half(blocks, 0))


def join_q1_0(parts: Parts) -> Tensor:
    assert parts.d is not None
    return torch.cat([raw(parts.d), _bytes(parts.codes)], dim=1)


def split_q2_0(blocks: Tensor) -> Parts:
    """d, qs[16]: four 2-bit fields a byte, the lowest first."""
    return Parts(shifted(blocks[:, 2:], _TWO_BITS, 3).transpose(1, 2).flatten(1), d=half(blocks, 0))


def join_q2_0(parts: Parts) -> Tensor:
    assert parts.d is not None
    fields = parts.codes.view(len(parts.codes), -1, 4).transpose(1, 2)
    return torch.cat([raw(parts.d), gathered(fields, _TWO_BITS)], dim=1)


def split_tq2_0(blocks: Tensor) -> Parts:
    """qs[64], d: of each 32 bytes, field f holds 32 neighbours."""
    return Parts(shifted(blocks[:, :64].reshape(-1, 32), _TWO_BITS, 3).reshape(-1, 256), d=half(blocks, 64))


def join_tq2_0(parts: Parts) -> Tensor:
    assert parts.d is not None
    return torch.cat([gathered(parts.codes.reshape(-1, 4, 32), _TWO_BITS).view(-1, 64), raw(parts.d)], dim=1)


def decode_q8_1(blocks: Tensor) -> Tensor:
    """d, s, int8 qs[32]. Activations; no known file holds it."""
    return half(blocks, 0).float() * blocks[:, 4:].view(torch.int8).float()


def _bits(data: Tensor) -> Tensor:
    """uint8 `[n, 8 W]` of `[n, W]`: each bit, the lowest of a byte first."""
    return shifted(data, _BYTE, 1).transpose(1, 2).flatten(1)


def _bytes(bits: Tensor) -> Tensor:
    return gathered(bits.view(len(bits), -1, 8).transpose(1, 2), _BYTE)
