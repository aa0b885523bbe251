"""Rows of a packed weight by number, as an embedding wants them: `rows_<layout>` of the CPU's layouts.

Values are those of `dequantize_<layout>`, bit for bit. No gradient, and no place in a compiled graph, where PyTorch's own
operators do the same (`nn.QuantEmbedding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library, register_fake

from ..layouts import LAYOUTS, Layout
from .weight import dequantize_schema, read_dequantize

_LIBRARY: Final = Library("qkernels", "FRAGMENT")  # csrc/cpu/bindings_rows.cpp implements it for the CPU
ROWS: Final[dict[str, Callable[..., Tensor]]] = {}  # by layout


def _twin(layout: Layout, ids: Tensor, *arguments: Any) -> Tensor:
    dequantize: Callable[..., Tensor] = getattr(torch.ops.qkernels, f"dequantize_{layout.name}")
    return dequantize(*arguments)[ids]


def _fake(layout: Layout, ids: Tensor, *arguments: Any) -> Tensor:
    weight, dtype = read_dequantize(layout, arguments)
    return ids.new_empty((ids.shape[0], weight.in_features), dtype=dtype)


def rows(
    layout: Layout,
    ids: Tensor,
    buffers: Sequence[Tensor | None],
    in_features: int,
    numbers: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Rows `[n, K]` of a weight of one matrix.

    Args:
        ids: int64 `[n]`, contiguous, each 0 … N - 1.
        buffers: of the layout, in its order.
        numbers: `Layout.numbers_of`.
        dtype: of the result, floating.

    Raises:
        RuntimeError: an id lies outside.
    """
    out_features, *others = numbers
    return ROWS[layout.name](ids, *buffers, out_features, in_features, *others, dtype)


def _define(layout: Layout) -> None:
    op = f"rows_{layout.name}"
    _LIBRARY.define(
        op + dequantize_schema(layout).replace("(", "(Tensor ids, ", 1), tags=(torch.Tag.pt2_compliant_tag,)
    )
    register_fake(f"qkernels::{op}", partial(_fake, layout), lib=_LIBRARY)
    _LIBRARY.impl(op, partial(_twin, layout), "CompositeExplicitAutograd")
    ROWS[layout.name] = getattr(torch.ops.qkernels, op).default


for _layout in LAYOUTS.values():
    if _layout.backend == "cpu":
        _define(_layout)
