"""How the buffers of a layer were packed, as a value and as a tensor beside them: safetensors stores nothing but tensors."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TensorError


class Packing(NamedTuple):
    """How the buffers were packed; travels in the state dict as JSON bytes, so that another device can re-lay them out."""

    layout: str
    version: int
    scheme: str
    shape: tuple[int, ...]


def as_tensor(packing: Packing, device: torch.device) -> Tensor:
    """The packing as JSON in a uint8 tensor."""
    return torch.tensor(list(json.dumps(packing._asdict()).encode()), dtype=torch.uint8, device=device)


def read_packing(state: Any) -> Packing | None:
    """The packing stored beside the buffers, or None where an older or hand-made state dict has none, or one on meta."""
    if state is None or (isinstance(state, Tensor) and state.is_meta):
        return None
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1 or state.numel() > 4096:
        raise TensorError("the extra state of a packed module must be JSON in a uint8 tensor of at most 4096 bytes")
    try:
        fields = json.loads(bytes(state.tolist()))
        layout, version, scheme, shape = (fields[name] for name in Packing._fields)
        sizes = tuple(int(size) for size in shape)
        if not 2 <= len(sizes) <= 3:
            raise ValueError(f"shape must be [N, K] or [E, N, K], got {len(sizes)} sizes")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TensorError(
            f"the extra state of a packed module must be JSON with {', '.join(Packing._fields)}: {error}"
        ) from None
    return Packing(str(layout), int(version), str(scheme), sizes)
