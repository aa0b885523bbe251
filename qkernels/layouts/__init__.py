"""Layouts: `QuantTensor` <-> the memory a kernel reads. One file each, one registration line here.

A layout is a value made of pure functions, all of which run on cpu and on meta tensors. `pack` loses nothing:
`unpack(pack(w), …)` is bit-identical to `w`. What a layout says of itself (activations, codebooks, dtypes, buffers, numbers) is
said once: the ops' schemas and checks (`qkernels.ops`) and the catalogue's reasons are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, ConversionError, TensorError
from ..scheme import (
    ACTIVATION_NUMBERS,
    ACTIVATIONS,
    CODEBOOK_NUMBERS,
    CODEBOOKS,
    FACTOR_NUMBERS,
    FACTORS,
    QuantScheme,
)
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..text import describe, dtype_name, dtype_names

Buffers = Mapping[str, Tensor | None]
Shapes = dict[str, tuple[int, ...]]
BackendName = Literal["cpu", "cuda", "triton", "torch"]


class Buffer(NamedTuple):
    """A tensor of a packed weight, and an argument of the layout's ops.

    Args:
        name: of both.
        optional: whether a weight may do without.
        dtype: its dtype; None: that of the scales.
        tiled: whether its first dimension is that of the tiles of rows, so that slices of it are weights.
    """

    name: str
    optional: bool = False
    dtype: torch.dtype | None = None
    tiled: bool = True


class Number(NamedTuple):
    """A number that the layout's ops are told beside the buffers.

    Args:
        name: of the argument.
        type: as a schema spells it.
        of: (N, K, scheme) -> its value for a weight.
    """

    name: str
    type: Literal["int", "bool", "float"]
    of: Callable[[int, int, QuantScheme], float]


# What every layout has, in the order of the ops' arguments; a layout's own follow. Where scales are products, `scales` and
# `zeros` hold the small factors, and the outer ones have buffers of their own.
BUFFERS = (
    Buffer("qweight", dtype=torch.uint8),
    Buffer("scales"),
    Buffer("zeros", optional=True),
    Buffer("k_order", optional=True, dtype=torch.int32, tiled=False),
    Buffer("outer_scales", optional=True),
    Buffer("outer_zeros", optional=True),
)
# What layouts that take static activations have beside these: scale and zero point of x.
BUFFERS_A8 = (*BUFFERS, Buffer("x_static", optional=True, dtype=torch.float32, tiled=False))
NUMBERS = (
    Number("out_features", "int", lambda N, K, scheme: N),
    Number("bits", "int", lambda N, K, scheme: scheme.bits),
    Number("group_size", "int", lambda N, K, scheme: scheme.group_length(K)),
    Number("zeros_are_offsets", "bool", lambda N, K, scheme: scheme.zeros == "offset"),
    Number("codebook", "int", lambda N, K, scheme: CODEBOOK_NUMBERS[scheme.codebook]),
    Number("factors", "int", lambda N, K, scheme: FACTOR_NUMBERS[scheme.factors]),
)
# What layouts for int8 activations have beside these: how x is rounded.
NUMBERS_A8 = (*NUMBERS, Number("act", "int", lambda N, K, scheme: ACTIVATION_NUMBERS[scheme.act]))


X_STATIC = (2,)  # the shape of `x_static`


def no_limits(N: int, K: int, scheme: QuantScheme) -> list[str]:
    """For layouts that take any shape, group and kind of zero."""
    return []


@dataclass(frozen=True)
class Layout:
    """One way to lay a weight out in memory, and what the kernels that read it take.

    Args:
        name: the suffix of its ops (`gemm_<name>`).
        version: raised whenever the bytes change meaning; stored beside packed weights.
        backend: whose kernels read it; "torch": plain PyTorch, on any device.
        arrange: weight -> buffers by name, those that are absent left out or None; called for weights without `reasons` alone.
        unpack: (buffers, N, K, scheme) -> the weight that was packed. Buffers from outside go through `unpack_checked`.
        shapes: (N, K, bits, group_length) -> the shape of each buffer but zeros (that of scales), k_order (`[K]`) and outer
            factors (`outer_shape`), without expert dimensions.
        stored_bits: bits of a code -> how many it takes up.
        rows_per_tile: rows of the weight per entry of the first dimension of tiled buffers.
        acts: the activations that the kernels take, keys of `ACTIVATIONS`.
        dtypes: of x, that the kernels take.
        codebooks: names of those that the kernels look values up in.
        factors: names of those that the kernels multiply by.
        scale_dtypes: of scales that are no factors.
        limits: (N, K, scheme) -> why a weight cannot be packed so, apart from activations and codebooks; empty if it can.
        grouped: whether there are grouped products of stacked experts (`grouped_gemm_<name>`, `experts_<name>`).
        gemv_tokens: the largest M of an op `gemv_<name>`; None: the layout has none.
        buffers: `BUFFERS`, and its own.
        numbers: `NUMBERS`, and its own.
        upgrades: of older versions that are still read: (buffers, N, K, scheme) -> the same weight's buffers in this version.
    """

    name: str
    version: int
    backend: BackendName
    arrange: Callable[[QuantTensor], dict[str, Tensor | None]]
    unpack: Callable[[Buffers, int, int, QuantScheme], QuantTensor]
    shapes: Callable[[int, int, int, int], Shapes]
    stored_bits: Callable[[int], int]
    rows_per_tile: int
    acts: tuple[str | None, ...] = (None,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    codebooks: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    scale_dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    limits: Callable[[int, int, QuantScheme], list[str]] = no_limits
    gemv_tokens: int | None = None
    grouped: bool = False
    buffers: tuple[Buffer, ...] = BUFFERS
    numbers: tuple[Number, ...] = NUMBERS
    upgrades: Mapping[int, Callable[[Buffers, int, int, QuantScheme], Buffers]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.buffers[: len(BUFFERS)] != BUFFERS or self.numbers[: len(NUMBERS)] != NUMBERS:
            raise ArgumentError(f"layout {self.name}: buffers and numbers must begin with BUFFERS and NUMBERS")

    def reasons(self, N: int, K: int, scheme: QuantScheme) -> list[str]:
        """Why an `[N, K]` weight of this scheme cannot be packed so; empty if it can."""
        why = []
        if scheme.act not in self.acts:
            why.append(f"{ACTIVATIONS[scheme.act]}: these kernels {self._activations()}")
        elif scheme.codebook is not None and scheme.codebook not in self.codebooks:
            known = (
                f"only {', '.join(self.codebooks)} and integer codes are"
                if self.codebooks
                else "only integer codes are"
            )
            why.append(f"codebook {scheme.codebook!r}: {known} supported")
        if scheme.factors is not None and scheme.factors not in self.factors:
            known = f"only those of {', '.join(self.factors)} are" if self.factors else "none are"
            why.append(f"factors {scheme.factors!r}: {known} supported")
        return why + self.limits(N, K, scheme)

    def _activations(self) -> str:
        if None in self.acts:
            return f"take {dtype_names(self.dtypes, 'and')} ones"
        example = QuantScheme(act=self.acts[0])
        return f"quantize them to {self.acts[0]}, which a scheme like {example} asks for"

    def check(self, N: int, K: int, scheme: QuantScheme) -> None:
        """Raises ConversionError where there are `reasons`."""
        if why := self.reasons(N, K, scheme):
            raise ConversionError(f"layout {self.name} cannot hold {scheme} with N={N}, K={K}: {'; '.join(why)}")

    def pack(self, weight: QuantTensor) -> dict[str, Tensor | None]:
        """Weight -> buffers by name, on the weight's device; None where one is absent. Expert dimensions stay in front.

        Raises:
            ConversionError: there are `reasons` against it, or its scales have a dtype that the kernels do not read.
        """
        self.check(weight.N, weight.K, weight.scheme)
        if weight.factors is None and weight.scales.dtype not in self.scale_dtypes:
            raise ConversionError(
                f"layout {self.name} holds scales in {dtype_names(self.scale_dtypes, 'and')}, got "
                f"{dtype_name(weight.scales.dtype)}"
            )
        if self.backend != "torch" and weight.group_index is not None and weight.group_index.dim() > 1:
            raise ConversionError(
                f"layout {self.name} holds one order of columns (act-order), got one for each of "
                f"{weight.group_index.shape[0]} experts"
            )
        made = self.arrange(weight)
        return {buffer.name: made.get(buffer.name) for buffer in self.buffers}

    def reads(self, version: object) -> bool:
        """Whether buffers of a version are this layout's, or can be made so (`upgraded`)."""
        return version in (self.version, *self.upgrades)

    def upgraded(self, version: Any, buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> Buffers:
        """Buffers of a version that it `reads`, as those of today."""
        return buffers if version == self.version else self.upgrades[version](buffers, N, K, scheme)

    def numbers_of(self, N: int, K: int, scheme: QuantScheme) -> tuple[float, ...]:
        """What the ops are told of a weight beside its buffers, in the order of `numbers`."""
        return tuple([number.of(N, K, scheme) for number in self.numbers])

    def on_meta(
        self, N: int, K: int, scheme: QuantScheme, scale_dtype: torch.dtype, ordered: bool, lead: tuple[int, ...] = ()
    ) -> Buffers:
        """Dtypes and shapes of a weight's buffers, without a weight; `lead`: its (expert) dimensions in front.

        Raises:
            ConversionError: there are `reasons` against it.
        """
        self.check(N, K, scheme)
        shapes = self.shapes(N, K, scheme.bits, scheme.group_length(K))
        kind = None if scheme.factors is None else FACTORS[scheme.factors]
        small = scale_dtype if kind is None else getattr(torch, kind.small)
        outer = None if kind is None else outer_shape(shapes["scales"], kind.outer_groups(scheme.num_groups(K)))
        dtypes = {"scales": small, "zeros": torch.uint8 if kind is not None or scheme.zeros == "int" else scale_dtype}
        static = ACTIVATIONS[scheme.act].static
        here: dict[str, tuple[int, ...] | None] = {
            "zeros": None if scheme.symmetric else shapes["scales"],
            "k_order": (K,) if ordered else None,
            "outer_scales": outer,
            "outer_zeros": None if scheme.symmetric else outer,
            "x_static": X_STATIC if static else None,
        } | ({"table": None} if scheme.codebook is None else {})
        found: dict[str, Tensor | None] = {}
        for buffer in self.buffers:
            shape = here[buffer.name] if buffer.name in here else shapes.get(buffer.name)
            dtype = buffer.dtype or dtypes.get(buffer.name, scale_dtype)
            front = lead if buffer.tiled else ()
            found[buffer.name] = None if shape is None else torch.empty((*front, *shape), dtype=dtype, device="meta")
        return found


def outer_shape(scales: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of outer factors, `count` a row, beside small ones: `[N, G]`, or `[tiles, G, rows]`."""
    return (scales[0], count, *scales[2:])


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
    lead: tuple[int, ...] = (),
) -> dict[str, Tensor | None]:
    """Buffers of the right shapes for a weight that is still to come, filled with zeros (`ordered`: with act-order)."""
    shapes = layout.on_meta(N, K, scheme, scale_dtype, ordered, lead)
    empty = {name: None if t is None else torch.zeros_like(t, device=device) for name, t in shapes.items()}
    if ordered:
        empty["k_order"] = torch.arange(K, dtype=torch.int32, device=device)
    if (static := empty.get("x_static")) is not None:
        static[0] = 1  # a scale is positive
    return empty


def unpack_checked(
    layout: Layout, buffers: Buffers, N: int, K: int, scheme: QuantScheme, lead: tuple[int, ...] = ()
) -> QuantTensor:
    """`layout.unpack` for buffers that come from outside: nothing is indexed before shapes, dtypes and column order hold.
    `lead`: (expert) dimensions in front.

    Raises:
        ConversionError: the layout cannot hold such a weight.
        TensorError: a buffer is missing, has the wrong dtype or shape, or holds values that no weight packs to.
    """
    check_buffers(layout, buffers, N, K, scheme, lead)
    return layout.unpack(buffers, N, K, scheme)


def check_buffers(
    layout: Layout, buffers: Buffers, N: int, K: int, scheme: QuantScheme, lead: tuple[int, ...] = ()
) -> None:
    """The shapes, dtypes and column order of buffers that come from outside; not their values.

    Raises:
        ConversionError, TensorError: as `unpack_checked`.
    """
    field = "scales" if scheme.factors is None else "outer_scales"
    scales, order = buffers.get(field), buffers.get("k_order")
    dtypes = layout.scale_dtypes if scheme.factors is None else FLOAT_DTYPES
    if scales is None or scales.dtype not in dtypes:
        raise TensorError(f"{field} must be a tensor of {dtype_names(dtypes, 'or')}, got {describe(scales, 'absent')}")
    for name, want in layout.on_meta(N, K, scheme, scales.dtype, order is not None, lead).items():
        got = buffers.get(name)
        if name == "k_order" and got is not None and got.dim() == 2 and layout.backend == "torch":
            want = torch.empty((*lead, K), dtype=torch.int32, device="meta")  # experts with orders of their own
        if want is None or got is None:
            fits = want is got
        else:  # zero points may be float16 beside bfloat16 scales: any floating dtype will do where one is meant
            floats = got.dtype in FLOAT_DTYPES and want.dtype in FLOAT_DTYPES
            fits = got.shape == want.shape and (got.dtype == want.dtype or floats)
        if not fits:
            raise TensorError(
                f"{name} must be {describe(want, 'absent')} in layout {layout.name} for {scheme}, N={N} K={K}, "
                f"got {describe(got, 'absent')}"
            )
    if order is not None and bool((order.long().sort(-1).values != torch.arange(K, device=order.device)).any()):
        raise TensorError(f"k_order must be a permutation of 0 … {K - 1}, got repeated or out-of-range entries")


def every_code_means_a_number(layout: Layout, N: int, K: int, scheme: QuantScheme) -> bool:
    """Whether any bytes at all are the codes of a weight `[N, K]`: none is padding, none has bits to spare, none means infinity.
    Then scales and zeros are all that can be wrong with buffers of the right shape."""
    width, values = layout.stored_bits(scheme.bits), CODEBOOKS[scheme.codebook] if scheme.codebook else (0.0,)
    shape = layout.shapes(N, K, scheme.bits, scheme.group_length(K))["qweight"]
    return width == scheme.bits and prod(shape) * 8 == N * K * width and all(isfinite(value) for value in values)
