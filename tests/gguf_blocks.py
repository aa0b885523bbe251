"""Blocks of every GGUF type that anybody can make again, and the bits of their weights: what golden hashes are made of."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from qkernels.storage.gguf_types import GGML_TYPES

RANDOM_BLOCKS = 512


def of_type(name: str) -> Tensor:
    """As `tests/golden/gguf/make_blocks.py`: random bytes, and each byte alone."""
    size = GGML_TYPES[name].nbytes
    random = torch.frombuffer(
        bytearray(hashlib.shake_256(name.encode()).digest(RANDOM_BLOCKS * size)), dtype=torch.uint8
    )
    return torch.cat([random.view(-1, size), torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, size)])


def bits_of(values: Tensor) -> Tensor:
    """int32: the bits of float32 numbers; every NaN alike."""
    return torch.where(torch.isnan(values), 0x7FC00000, values.view(torch.int32)).to(torch.int32)
