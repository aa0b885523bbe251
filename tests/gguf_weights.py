"""Weights and importance that anybody can make again to the bit, for what quantizers write."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROWS, COLUMNS = 24, 1024


def made_weight() -> Tensor:
    """`[24, 1024]` float32: near Gaussian (sums of bytes); rows of zeros, of one sign, tiny, with outliers, on a coarse grid."""
    raw = hashlib.shake_256(b"weights").digest(ROWS * COLUMNS * 8)
    sums = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(ROWS, COLUMNS, 8).int().sum(-1) - 1020
    weight = sums.float() * 2.0**-14
    weight[1] = 0
    weight[2, :300] = 0
    weight[3] *= 2.0**-20
    weight[4] = weight[4].abs()
    weight[5, ::17] *= 32
    weight[6] = (weight[6] * 64).round() / 64
    weight[7] = -weight[7].abs()
    weight[8, 5] = 1000
    return weight


def made_equals() -> Tensor:
    """`[24, 1024]` float32: every 32 weights are one number, or (the last half) the whole row."""
    values = made_weight()[9:].flatten().view(-1, 1)
    groups = values[: ROWS // 2 * COLUMNS // 32].expand(-1, 32).reshape(ROWS // 2, COLUMNS)
    return torch.cat([groups, values[-ROWS // 2 :].expand(-1, COLUMNS)])


def made_importance() -> Tensor:
    """`[1024]` float32, over five powers of ten, with zeros."""
    raw = hashlib.shake_256(b"importance").digest(COLUMNS * 2)
    value = torch.frombuffer(bytearray(raw), dtype=torch.int16).float() * 2.0**-15
    importance = value * value * value * value
    importance[::50] = 0
    return importance


def digest(blocks: Tensor) -> str:
    return hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()[:16]
