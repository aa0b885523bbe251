"""Blocks that a `QuantScheme` holds without loss, as `QuantTensor`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ...scheme import QuantScheme
from ...tensor import QuantTensor
from .types import block_type, parts_of

# Types whose blocks have one scale, or one scale and a minimum, and codes on an integer grid.
EXACT_SCHEMES: Final = {
    "Q4_0": QuantScheme(4, 32),
    "Q4_1": QuantScheme(4, 32, zeros="offset"),
    "Q5_0": QuantScheme(5, 32),
    "Q5_1": QuantScheme(5, 32, zeros="offset"),
    "Q8_0": QuantScheme(8, 32),
    "Q2_0": QuantScheme(2, 64, zeros="int"),
    "TQ2_0": QuantScheme(2, 256, zeros="int"),
}


def weight_of(blocks: Tensor, type: str) -> QuantTensor:
    """The weight of GGUF blocks, equal bit for bit when dequantized.

    Args:
        blocks: uint8 `[N, bytes of a row]`.
        type: a key of `EXACT_SCHEMES`.

    Raises:
        TensorError: a scale is NaN or infinite.
    """
    scheme, meaning = EXACT_SCHEMES[type], block_type(type).meaning
    parts = parts_of(blocks, type)
    assert parts.d is not None and meaning is not None
    zeros = parts.dmin
    if scheme.zeros == "int":
        zeros = torch.full(parts.d.shape, meaning.zero, dtype=torch.uint8, device=blocks.device)
    return QuantTensor(parts.codes, parts.d, zeros, None, scheme)
