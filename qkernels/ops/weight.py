"""A packed weight as the ops take it: one named value, and the one place that knows the order of an op's arguments.

    gemm_<layout>, gemv_<layout>   x, buffers…, bias, numbers…          -> y
    dequantize_<layout>            buffers…, numbers…, dtype            -> weight; in_features follows out_features

Buffers and numbers are the layout's (`Layout.buffers`, `Layout.numbers`), in its order; a product knows in_features by x. What
implements an op takes them one by one, by position, and names them by the functions below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts import BUFFERS, NUMBERS, Buffer, Layout

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_B, _N = len(BUFFERS), len(NUMBERS)


class Weight(NamedTuple):
    """A packed weight: `BUFFERS`, then `NUMBERS` with in_features after the first, as the dequantizing ops take them.

    Args:
        qweight: uint8, codes in the layout's order.
        scales: floating.
        zeros: zero points or offsets; None: symmetric.
        k_order: None or int32 `[K]`, which column of x each stored column multiplies.
        outer_scales, outer_zeros: floating; where they are given, scales and zeros are the small factors.
        out_features, in_features: N and K.
        bits: of a code.
        group_size: `QuantScheme.group_length(K)`.
        zeros_are_offsets: whether zeros are added after scaling.
        codebook: its number, 0 for integer codes (`CODEBOOK_NUMBERS`).
        factors: the number of their kind, 0 for none (`FACTOR_NUMBERS`).
        own: what this layout has beside these, buffers and numbers by name.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    k_order: Tensor | None
    outer_scales: Tensor | None
    outer_zeros: Tensor | None
    out_features: int
    in_features: int
    bits: int
    group_size: int
    zeros_are_offsets: bool
    codebook: int
    factors: int
    own: Mapping[str, Any] = _NOTHING

    def value(self, name: str) -> Any:
        """The buffer or number of that name."""
        return self.own[name] if name in self.own else getattr(self, name)

    def tiles(self, layout: Layout, first: int, last: int) -> Weight:
        """The rows of tiles `first` … `last - 1`, as a weight."""

        def cut(buffer: Buffer) -> Tensor | None:
            tensor: Tensor | None = self.value(buffer.name)
            return tensor if tensor is None or not buffer.tiled else tensor[first:last]

        numbers = [self.value(number.name) for number in layout.numbers]
        part = weight_from_buffers(layout, [cut(b) for b in layout.buffers], numbers, self.in_features)
        rows = layout.rows_per_tile
        return part._replace(out_features=min(last * rows, self.out_features) - first * rows)


class Product(NamedTuple):
    """The arguments of `gemm_<layout>` and `gemv_<layout>`."""

    x: Tensor
    weight: Weight
    bias: Tensor | None


def read_product(layout: Layout, arguments: Sequence[Any]) -> Product:
    """An op's positional arguments by their names."""
    end = 1 + len(layout.buffers)
    x, bias = arguments[0], arguments[end]
    return Product(x, weight_from_buffers(layout, arguments[1:end], arguments[end + 1 :], x.shape[1]), bias)


def read_dequantize(layout: Layout, arguments: Sequence[Any]) -> tuple[Weight, torch.dtype]:
    """The weight and the dtype that `dequantize_<layout>` was given."""
    end = len(layout.buffers)
    out_features, in_features, *others, dtype = arguments[end:]
    return weight_from_buffers(layout, arguments[:end], [out_features, *others], in_features), dtype


def dequantize_arguments(layout: Layout, weight: Weight, dtype: torch.dtype) -> tuple[Any, ...]:
    """The inverse of `read_dequantize`."""
    return tuple(dtype if name == "dtype" else weight.value(name) for name in _dequantize_types(layout))


def product_names(layout: Layout) -> tuple[str, ...]:
    """The names of the arguments of a product, in order."""
    return tuple(_product_types(layout))


def product_schema(layout: Layout) -> str:
    """The schema of `gemm_<layout>` and `gemv_<layout>`, without a name."""
    return schema_of(_product_types(layout))


def dequantize_schema(layout: Layout) -> str:
    """The schema of `dequantize_<layout>`, without a name."""
    return schema_of(_dequantize_types(layout))


def weight_from_buffers(layout: Layout, buffers: Sequence[Any], numbers: Sequence[Any], in_features: int) -> Weight:
    """The weight of a layout's buffers and numbers, in its order."""
    qweight, scales, zeros, k_order, outer_scales, outer_zeros = buffers[:_B]
    out_features, bits, group_size, offsets, codebook, factors = numbers[:_N]
    own = _NOTHING
    if len(layout.buffers) > _B or len(layout.numbers) > _N:
        names = [*(b.name for b in layout.buffers[_B:]), *(n.name for n in layout.numbers[_N:])]
        own = dict(zip(names, [*buffers[_B:], *numbers[_N:]], strict=True))
    return Weight(
        qweight, scales, zeros, k_order, outer_scales, outer_zeros,
        out_features, in_features, bits, group_size, offsets, codebook, factors, own,
    )  # fmt: skip


def _product_types(layout: Layout) -> dict[str, str]:
    return {"x": "Tensor"} | buffer_types(layout) | {"bias": "Tensor?"} | {n.name: n.type for n in layout.numbers}


def _dequantize_types(layout: Layout) -> dict[str, str]:
    out_features, *others = layout.numbers
    numbers = {out_features.name: out_features.type, "in_features": "int"} | {n.name: n.type for n in others}
    return buffer_types(layout) | numbers | {"dtype": "ScalarType"}


def buffer_types(layout: Layout) -> dict[str, str]:
    """How a schema spells the buffers of a layout, by name."""
    return {buffer.name: "Tensor?" if buffer.optional else "Tensor" for buffer in layout.buffers}


def schema_of(types: Mapping[str, str]) -> str:
    """The schema of an op with these arguments, without a name."""
    return f"({', '.join(f'{kind} {name}' for name, kind in types.items())}) -> Tensor"
