"""`torch.ops.qkernels`: every op's schema, argument checks, fake kernel and gradient, written once for all layouts.

    gemm_<layout>        any M; the implementation chooses its path by M
    gemv_<layout>        the decode path alone, M up to the layout's `gemv_tokens` (layouts that have one)
    dequantize_<layout>  the weight, for gradients, tests and benchmarks

C++ and Triton only implement these; an install without the compiled extension has the same ops, which then say why they
cannot run. Shapes: x `[M, K]`, result `[M, N]` in x's dtype; the buffers are those of the layout, for one 2-D weight. Schemas are
made from the layout (`ops.weight`). Gradients flow to x and bias; weights are frozen. Where a layout's kernels quantize x
(`Layout.acts`), the gradient is that of the same product without it (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from .. import extension
from ..errors import ArgumentError, UnsupportedProblem
from ..layouts import BUFFERS, LAYOUTS, X_STATIC, Layout, Shapes, outer_shape
from ..layouts.tiles import num_groups
from ..scheme import ACTIVATION_NUMBERS, ACTIVATIONS, CODEBOOK_NUMBERS, FACTOR_NUMBERS, FACTORS, FactorKind
from ..tensor import FLOAT_DTYPES
from ..text import describe, dtype_name
from . import reference
from .backends import BACKENDS, Backend
from .flops import count_flops
from .weight import (
    Product,
    Weight,
    dequantize_arguments,
    dequantize_schema,
    product_names,
    product_schema,
    read_dequantize,
    read_product,
    weight_from_buffers,
)

_SLICE_BYTES = 64 << 20  # a gradient dequantizes at most this much of the weight at a time

LIBRARY = Library("qkernels", "DEF")  # the ops live as long as this object


ACTS = list(ACTIVATION_NUMBERS)  # by number
KINDS: list[FactorKind | None] = [None, *FACTORS.values()]  # by number


class Op(NamedTuple):
    """An op of the library, which buffers it takes, in its order, and their layout."""

    run: Callable[..., Tensor]
    buffers: tuple[str, ...]
    layout: Layout


GEMM: dict[str, Op] = {}  # by layout
GEMV: dict[str, Op] = {}


# --- arguments ------------------------------------------------------------------------------------------------------------


def check_product(layout: Layout, product: Product, max_tokens: int | None = None) -> None:
    """Everything a kernel relies on, except the values inside the buffers.

    Raises:
        ArgumentError: an argument has the wrong dtype, shape, device or value.
    """
    x, weight, bias = product
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"x must be float32, bfloat16 or float16 [M, K], got {describe(x)}")
    if max_tokens is not None and x.shape[0] > max_tokens:
        name = layout.name
        raise ArgumentError(f"gemv_{name} takes M <= {max_tokens} rows of x, got {x.shape[0]}; call gemm_{name}")
    N = weight.out_features
    if bias is not None and (bias.dtype not in FLOAT_DTYPES or bias.dim() != 1 or bias.shape[0] != N):
        raise ArgumentError(f"bias must be None or floating [N] = [{N}], got {describe(bias)}")
    if check_weight(layout, weight):
        raise ArgumentError(
            f"qweight must be of one weight: stacked experts are not taken here, got {describe(weight.qweight)}"
        )
    for name, t in (("qweight", weight.qweight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ArgumentError(f"{name} must be on the device of x, {x.device}, got {t.device}; move one of them")


def check_weight(layout: Layout, weight: Weight) -> int:
    """The same for the weight alone; returns how many leading (expert) dimensions its buffers have."""
    qweight, k_order, N, K = weight.qweight, weight.k_order, weight.out_features, weight.in_features
    bits, group_size, codebook, factors = weight.bits, weight.group_size, weight.codebook, weight.factors
    if not 2 <= bits <= 8 or group_size < 1 or N < 0:
        raise ArgumentError(
            f"bits must be 2 to 8, group_size positive (group_length(K)) and out_features not negative, got bits={bits}, "
            f"group_size={group_size}, out_features={N}"
        )
    if not (0 <= codebook < len(CODEBOOK_NUMBERS) and 0 <= factors < len(FACTOR_NUMBERS)):
        raise ArgumentError(
            f"codebook must be 0 to {len(CODEBOOK_NUMBERS) - 1} and factors 0 to {len(FACTOR_NUMBERS) - 1}, got {codebook} and "
            f"{factors}"
        )
    act = weight.own.get("act", 0)
    if "act" in weight.own and not (0 <= act < len(ACTS) and ACTS[act] in layout.acts):
        known = ", ".join(str(ACTIVATION_NUMBERS[name]) for name in layout.acts)
        raise ArgumentError(f"act must be one of {known} in layout {layout.name}, got {act}")
    shapes = layout.shapes(N, K, bits, group_size)
    codes = shapes["qweight"]
    if qweight.dtype != torch.uint8 or qweight.shape[-len(codes) :] != codes:
        raise ArgumentError(
            f"qweight must be uint8 {list(codes)} in layout {layout.name} for N={N}, K={K} (x is [M, K]), bits={bits}, got "
            f"{describe(qweight)}; a weight packed for another shape or layout?"
        )
    lead = qweight.shape[: -len(codes)]
    _check_groups(layout, weight, lead, shapes["scales"])
    orders = ((K,), (*lead, K)) if layout.backend == "torch" else ((K,),)
    if k_order is not None and (k_order.dtype != torch.int32 or k_order.shape not in orders):
        raise ArgumentError(f"k_order must be None or int32 [K] = [{K}], got {describe(k_order)}")
    for buffer in BUFFERS[1:]:
        t = weight.value(buffer.name)
        if t is not None and t.device != qweight.device:
            raise ArgumentError(f"{buffer.name} must be on the device of qweight, {qweight.device}, got {t.device}")
    if weight.own:
        _check_own(layout, weight, shapes, lead)
    return len(lead)


def _check_groups(layout: Layout, weight: Weight, lead: tuple[int, ...], of_one: tuple[int, ...]) -> None:
    """The same for scales and zeros, which have the shape `of_one` for each expert, and for the outer factors beside them."""
    shape = (*lead, *of_one)
    scales, zeros, offsets, kind = weight.scales, weight.zeros, weight.zeros_are_offsets, KINDS[weight.factors]
    dtypes = layout.scale_dtypes if kind is None else (getattr(torch, kind.small),)
    if scales.dtype not in dtypes or scales.shape != shape:
        raise ArgumentError(
            f"scales must be {'floating' if kind is None else kind.small} {list(shape)} in layout {layout.name} for "
            f"N={weight.out_features}, K={weight.in_features}, group_size={weight.group_size}, got {describe(scales)}"
        )
    floating = kind is None and zeros is not None and zeros.dtype in FLOAT_DTYPES
    if zeros is None:
        if offsets:
            raise ArgumentError("zeros must be given where zeros_are_offsets is true, got None")
    elif zeros.shape != shape or not (floating or (zeros.dtype == torch.uint8 and (kind is not None or not offsets))):
        kinds = "uint8" if kind is not None else "floating" if offsets else "uint8 or floating"
        raise ArgumentError(f"zeros must be {kinds} {list(shape)} like scales, got {describe(zeros)}")
    groups = num_groups(weight.in_features, weight.group_size)
    outer = None if kind is None else (*lead, *outer_shape(of_one, kind.outer_groups(groups)))
    for name, t, expected in (
        ("outer_scales", weight.outer_scales, outer),
        ("outer_zeros", weight.outer_zeros, None if zeros is None else outer),
    ):
        fits = expected is None if t is None else t.dtype in FLOAT_DTYPES and t.shape == expected
        if not fits:
            words = "None" if expected is None else f"floating {list(expected)}"
            raise ArgumentError(f"{name} must be {words} with factors={weight.factors}, got {describe(t)}")


def _check_own(layout: Layout, weight: Weight, shapes: Shapes, lead: tuple[int, ...]) -> None:
    """The same for the buffers that this layout alone has."""
    for name, optional, dtype, tiled in layout.buffers[len(BUFFERS) :]:
        if name == "x_static":
            _check_static(weight)
            continue
        t, shape, dtype = weight.own[name], (*(lead if tiled else ()), *shapes[name]), dtype or weight.scales.dtype
        if name == "table":
            optional = weight.codebook == 0
        fits = optional if t is None else (t.dtype, t.shape, t.device) == (dtype, shape, weight.qweight.device)
        if not fits:
            raise ArgumentError(
                f"{name} must be {dtype_name(dtype)} {list(shape)} in layout {layout.name} for N={weight.out_features}, "
                f"K={weight.in_features}, on the device of qweight, {weight.qweight.device}, got {describe(t)}"
            )


def _check_static(weight: Weight) -> None:
    """Scale and zero point of x, where the activations want them."""
    t, wanted = weight.own["x_static"], ACTIVATIONS[ACTS[weight.own["act"]]].static
    if t is None:
        fits = not wanted
    else:
        fits = wanted and (t.dtype, t.shape, t.device) == (torch.float32, X_STATIC, weight.qweight.device)
    if not fits:
        raise ArgumentError(
            f"x_static must be {'float32 [2]: scale and zero point of x' if wanted else 'None'} with act={weight.own['act']}, on "
            f"the device of qweight, {weight.qweight.device}, got {describe(t)}"
        )


# --- fake kernels and gradients -------------------------------------------------------------------------------------------


def _fake_product(layout: Layout, max_tokens: int | None, *arguments: Any) -> Tensor:
    product = read_product(layout, arguments)
    check_product(layout, product, max_tokens)
    return product.x.new_empty((product.x.shape[0], product.weight.out_features))


def _fake_dequantize(layout: Layout, *arguments: Any) -> Tensor:
    weight, dtype = read_dequantize(layout, arguments)
    leading = weight.qweight.shape[: check_weight(layout, weight)]
    return weight.qweight.new_empty((*leading, weight.out_features, weight.in_features), dtype=dtype)


def _save_for_gradient(layout: Layout, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = read_product(layout, inputs)
    ctx.save_for_backward(*(weight.value(buffer.name) for buffer in layout.buffers))
    ctx.numbers = tuple(weight.value(number.name) for number in layout.numbers)
    ctx.in_features, ctx.x_dtype = weight.in_features, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(layout: Layout, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    names = product_names(layout)
    wanted = dict(zip(names, ctx.needs_input_grad, strict=True))
    found: dict[str, Tensor] = {}
    if wanted["x"]:
        weight = weight_from_buffers(layout, ctx.saved_tensors, ctx.numbers, ctx.in_features)
        found["x"] = gradient_of_x(layout, weight, dy).to(ctx.x_dtype)
    if wanted["bias"]:
        found["bias"] = dy.float().sum(0).to(ctx.bias_dtype)
    return tuple(found.get(name) for name in names)


def transformed_product(
    layout: Layout, x: Tensor, packed: Sequence[Any], bias: Tensor | None, numbers: Sequence[float]
) -> Tensor:
    """The product where torch.func or forward-mode AD looks on: in plain PyTorch, which every transform knows, on a weight that
    is dequantized for it, whole and in fp32.

    Raises:
        ArgumentError: the layout's kernels quantize x, whose derivative is a convention that only `backward` has.
    """
    if layout.acts != (None,):
        raise ArgumentError(
            f"torch.func and forward-mode AD know no derivative of activations in int8 (gemm_{layout.name}); use "
            f"backward(), or a scheme with 16-bit activations"
        )
    dequantize = getattr(torch.ops.qkernels, f"dequantize_{layout.name}")
    weight = weight_from_buffers(layout, packed, numbers, x.shape[1])
    w: Tensor = dequantize(*dequantize_arguments(layout, weight, torch.float32))
    y = x.float() @ w.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def gradient_of_x(layout: Layout, weight: Weight, dy: Tensor) -> Tensor:
    """dx = dy W in fp32, W dequantized a slice of rows at a time."""
    dequantize = getattr(torch.ops.qkernels, f"dequantize_{layout.name}")
    rows = layout.rows_per_tile
    tiles = max(1, _SLICE_BYTES // (4 * rows * max(weight.in_features, 1)))
    dx = dy.new_zeros((dy.shape[0], weight.in_features), dtype=torch.float32)
    for first in range(0, weight.qweight.shape[0], tiles):
        part = weight.tiles(layout, first, first + tiles)
        begin = first * rows
        w = dequantize(*dequantize_arguments(layout, part, torch.float32))
        dx = dx + dy[:, begin : begin + part.out_features].float() @ w
    return dx


# --- definitions ----------------------------------------------------------------------------------------------------------


def not_built(op: str, backend: Backend, *_: Any) -> Tensor:
    """What an op does whose code is not there: it says so."""
    raise UnsupportedProblem(
        f"torch.ops.qkernels.{op} is compiled code, and {backend.missing()}; build it with "
        f'`pip install . --no-build-isolation`, or allow the slow path with on_unsupported="reference"'
    )


def needs_cuda(op: str, x: Tensor, *_: Any) -> Tensor:
    raise UnsupportedProblem(
        f"torch.ops.qkernels.{op} runs on CUDA devices, got tensors on {x.device}: pack the weight for that device "
        f"(QuantLinear.to does), or move them"
    )


def _products_of(layout: Layout) -> dict[str, int | None]:
    """The names of a layout's matrix products, with the largest M that each takes (None: any)."""
    gemv = {} if layout.gemv_tokens is None else {f"gemv_{layout.name}": layout.gemv_tokens}
    return {f"gemm_{layout.name}": None} | gemv


def define_op(op: str, schema: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make an op known, with its fake kernel."""
    LIBRARY.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    register_fake(f"qkernels::{op}", fake, lib=LIBRARY)
    defined: Callable[..., Tensor] = getattr(torch.ops.qkernels, op).default
    return defined


def _define(layout: Layout) -> None:
    buffers = tuple(buffer.name for buffer in layout.buffers)
    for op, max_tokens in _products_of(layout).items():
        run = define_op(op, product_schema(layout), partial(_fake_product, layout, max_tokens))
        save = partial(_save_for_gradient, layout)
        register_autograd(f"qkernels::{op}", partial(_gradient, layout), setup_context=save, lib=LIBRARY)
        if layout.backend == "torch":
            LIBRARY.impl(op, partial(reference.product_op, layout), "CompositeExplicitAutograd")
        count_flops(op)
        (GEMM if max_tokens is None else GEMV)[layout.name] = Op(run, buffers, layout)
    op = f"dequantize_{layout.name}"
    define_op(op, dequantize_schema(layout), partial(_fake_dequantize, layout))
    LIBRARY.impl(op, partial(reference.dequantize_op, layout), "CompositeExplicitAutograd")


def _refuse_what_is_not_there(layout: Layout) -> None:
    backend = BACKENDS[layout.backend]
    for op in _products_of(layout):
        if backend.device == "cuda":
            LIBRARY.impl(op, partial(needs_cuda, op), "CPU")
        if backend.device is not None and not backend.built():
            LIBRARY.impl(op, partial(not_built, op, backend), backend.device.upper())


def register(layout: Layout) -> None:
    """Make a layout of one's own known, with its ops: what a line in `layouts/__init__.py` does for those of this package.

    Args:
        layout: of backend "torch" it runs in plain PyTorch from then on; for the others, its kernels implement its ops
            (`LIBRARY.impl`, or an extension of one's own).

    Raises:
        ArgumentError: there is a layout of that name.
    """
    if layout.name in LAYOUTS:
        raise ArgumentError(f"layout {layout.name!r} is there already; give the new one another name")
    _define(layout)
    _refuse_what_is_not_there(layout)
    LAYOUTS[layout.name] = layout


for _layout in LAYOUTS.values():
    _define(_layout)
extension.load()
for _layout in LAYOUTS.values():
    _refuse_what_is_not_there(_layout)
