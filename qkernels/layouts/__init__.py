"""Layouts: `QuantTensor` <-> the memory a kernel reads. One file each, one registration line here.

A layout is a value made of pure functions, all of which run on cpu and on meta tensors. `pack` loses nothing:
`unpack(pack(w), …)` is bit-identical to `w`. Packing a meta tensor gives the shapes and dtypes of the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, TensorError
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from ..text import describe

Buffers = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Layout:
    """One way to lay a weight out in memory.

    Args:
        name: the suffix of its ops (`gemm_<name>`).
        version: raised whenever the bytes change meaning; stored beside packed weights.
        reasons: (N, K, scheme) -> why a weight cannot be packed so; empty if it can.
        pack: weight -> buffers by name ("qweight", "scales", "zeros", "k_order"; None where absent).
        unpack: (buffers, N, K, scheme) -> the weight that was packed. Buffers from outside go through `unpack_checked`.
        shapes: (N, K, bits, group_length) -> shapes of qweight and of scales (zeros likewise), without expert dimensions.
        rows_per_tile: rows of the weight per entry of the buffers' first dimension, so that slices of it are weights.
        gemv_tokens: the largest M of an op `gemv_<name>`; None: the layout has none.
        device: the device type whose kernels read it, "cpu" or "cuda"; None: plain PyTorch, on any.
        compiled: whether its kernels live in the compiled extension.
    """

    name: str
    version: int
    reasons: Callable[[int, int, QuantScheme], list[str]]
    pack: Callable[[QuantTensor], dict[str, Tensor | None]]
    unpack: Callable[[Buffers, int, int, QuantScheme], QuantTensor]
    shapes: Callable[[int, int, int, int], tuple[tuple[int, ...], tuple[int, ...]]]
    rows_per_tile: int
    gemv_tokens: int | None = None
    device: str | None = None
    compiled: bool = False


from . import canonical, cpu_tile_a8, cpu_tile_a16, kpack, mma_tile  # noqa: E402  (they need Layout)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        canonical.LAYOUT,
        canonical.LAYOUT_A8,
        cpu_tile_a16.LAYOUT,
        cpu_tile_a8.LAYOUT,
        mma_tile.LAYOUT,
        mma_tile.LAYOUT_A8,
        kpack.LAYOUT,
    )
}


def get_layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in LAYOUTS:
        raise ArgumentError(f"layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def empty_buffers(
    layout: Layout,
    N: int,
    K: int,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    ordered: bool,
    device: torch.device | str,
) -> dict[str, Tensor | None]:
    """Buffers of the right shapes for a weight that is still to come, filled with zeros (`ordered`: with act-order)."""
    shapes = layout.pack(_meta_weight(N, K, scheme, scale_dtype, ordered))
    empty = {name: None if t is None else torch.zeros_like(t, device=device) for name, t in shapes.items()}
    if ordered:
        empty["k_order"] = torch.arange(K, dtype=torch.int32, device=device)
    return empty


def unpack_checked(layout: Layout, buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    """`layout.unpack` for buffers that come from outside: nothing is indexed before shapes, dtypes and column order hold.

    Raises:
        TensorError: a buffer is missing, has the wrong dtype or shape, or holds values that no weight packs to.
    """
    scales, order = buffers.get("scales"), buffers.get("k_order")
    if scales is None or not scales.dtype.is_floating_point:
        raise TensorError(f"scales must be a floating tensor, got {describe(scales, 'absent')}")
    expected = layout.pack(_meta_weight(N, K, scheme, scales.dtype, order is not None))
    for name, want in expected.items():
        got = buffers.get(name)
        if want is None or got is None:
            fits = want is got
        else:  # zero points may be float16 beside bfloat16 scales: any floating dtype will do where one is meant
            floats = got.dtype.is_floating_point and want.dtype.is_floating_point
            fits = got.shape == want.shape and (got.dtype == want.dtype or floats)
        if not fits:
            raise TensorError(
                f"{name} must be {describe(want, 'absent')} in layout {layout.name} for {scheme}, N={N} K={K}, "
                f"got {describe(got, 'absent')}"
            )
    if order is not None and not torch.equal(order.long().sort().values, torch.arange(K, device=order.device)):
        raise TensorError(f"k_order must be a permutation of 0 … {K - 1}, got repeated or out-of-range entries")
    return layout.unpack(buffers, N, K, scheme)


def _meta_weight(N: int, K: int, scheme: QuantScheme, scale_dtype: torch.dtype, ordered: bool) -> QuantTensor:
    G = scheme.num_groups(K)
    zero_dtype = torch.uint8 if scheme.zeros == "int" else scale_dtype
    return QuantTensor(
        codes=torch.empty(N, K, dtype=torch.uint8, device="meta"),
        scales=torch.empty(N, G, dtype=scale_dtype, device="meta"),
        zeros=None if scheme.symmetric else torch.empty(N, G, dtype=zero_dtype, device="meta"),
        group_index=torch.empty(K, dtype=torch.int32, device="meta") if ordered else None,
        scheme=scheme,
    )
