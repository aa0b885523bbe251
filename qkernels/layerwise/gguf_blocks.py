"""GPTQ in GGUF's types: the sweep of `quantizers.gptq_blocks` on the scales that `formats.gguf` searches."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..errors import ArgumentError
from ..formats.gguf import WRITABLE_TYPES, BlockGrid, block_type
from ..quantizers.gptq_blocks import BlockOrder, gptq_blocks


def gguf_gptq(
    weight: Tensor,
    hessian: Tensor,
    type: str,
    order: BlockOrder = "natural",
    damping: float = 0.01,
    rounds: int = 3,
    name: str = "weight",
) -> Tensor:
    """A weight `[N, K]` in blocks of a GGUF type, by GPTQ.

    Args:
        hessian: float32 or float64 `[K, K]`, `InputStatistics.hessian`.
        type: of `WRITABLE_TYPES`.
        order, damping, rounds: as of `gptq_blocks`; docs/quality.md compares the orders.

    Returns:
        uint8 `[N, bytes of a row]`.

    Raises:
        ArgumentError, CalibrationError: as `gptq_blocks` and `gguf_blocks`.

    >>> import torch
    >>> from qkernels.layerwise.gguf_blocks import gguf_gptq
    >>> gguf_gptq(torch.randn(8, 256), torch.eye(256), "Q4_K").shape
    torch.Size([8, 144])
    """
    if type not in WRITABLE_TYPES:
        raise ArgumentError(f"GGUF types that can be written are {', '.join(WRITABLE_TYPES)}, got {type!r:.40}")
    search = partial(BlockGrid.search, type=type)
    return gptq_blocks(
        weight, hessian, lambda columns, cost: search(columns, importance=cost), block_type(type).ggml.elements,
        order, damping, rounds, name,
    )  # fmt: skip
