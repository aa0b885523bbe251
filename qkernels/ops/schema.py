"""`torch.ops.qkernels`: every op's schema, argument checks, fake kernel and gradient, written once for all layouts.

    gemm_<layout>        any M; the implementation chooses its path by M
    gemv_<layout>        the decode path alone, M up to the layout's `gemv_tokens` (layouts that have one)
    dequantize_<layout>  the weight, for gradients, tests and benchmarks

C++ and Triton only implement these; an install without the compiled extension has the same ops, which then say why they
cannot run. Shapes: x `[M, K]`, result `[M, N]` in x's dtype; the buffers are those of the layout, for one 2-D weight.
`group_size` is `QuantScheme.group_length(K)`. Gradients flow to x and bias; weights are frozen.
Where a layout's kernels quantize x to int8 (`_a8`), the gradient is that of the same product without it (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from .. import extension
from ..errors import ArgumentError, UnsupportedProblem
from ..layouts import LAYOUTS, Layout
from ..tensor import FLOAT_DTYPES
from ..text import describe
from . import reference

GEMM = (
    "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? k_order, Tensor? bias, int out_features, int bits, "
    "int group_size, bool zeros_are_offsets) -> Tensor"
)
DEQUANTIZE = (
    "(Tensor qweight, Tensor scales, Tensor? zeros, Tensor? k_order, int out_features, int in_features, int bits, "
    "int group_size, bool zeros_are_offsets, ScalarType dtype) -> Tensor"
)
TABLE_LAYOUTS = ("reference", "kpack")  # whose ops take a codebook's table in the place of zeros
_SLICE_BYTES = 64 << 20  # a gradient dequantizes at most this much of the weight at a time

LIBRARY = Library("qkernels", "DEF")  # the ops live as long as this object


# --- arguments ------------------------------------------------------------------------------------------------------------


def check_gemm(
    layout: str, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, k_order: Tensor | None,
    bias: Tensor | None, out_features: int, bits: int, group_size: int, zeros_are_offsets: bool,
    *, max_tokens: int | None = None,
) -> None:  # fmt: skip
    """Everything a kernel relies on, except the values inside the buffers.

    Raises:
        ArgumentError: an argument has the wrong dtype, shape, device or value.
    """
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"x must be float32, bfloat16 or float16 [M, K], got {describe(x)}")
    if max_tokens is not None and x.shape[0] > max_tokens:
        raise ArgumentError(f"gemv_{layout} takes M <= {max_tokens} rows of x, got {x.shape[0]}; call gemm_{layout}")
    if bias is not None and (bias.dtype not in FLOAT_DTYPES or bias.dim() != 1 or bias.shape[0] != out_features):
        raise ArgumentError(f"bias must be None or floating [N] = [{out_features}], got {describe(bias)}")
    K = x.shape[1]
    if check_weight(layout, qweight, scales, zeros, k_order, out_features, K, bits, group_size, zeros_are_offsets):
        raise ArgumentError(
            f"qweight must be of one weight: stacked experts are not taken here, got {describe(qweight)}"
        )
    for name, t in (("qweight", qweight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ArgumentError(f"{name} must be on the device of x, {x.device}, got {t.device}; move one of them")


def check_weight(
    layout: str, qweight: Tensor, scales: Tensor, zeros: Tensor | None, k_order: Tensor | None,
    out_features: int, in_features: int, bits: int, group_size: int, zeros_are_offsets: bool,
) -> int:  # fmt: skip
    """The same for the buffers alone; returns how many leading (expert) dimensions they have."""
    N, K = out_features, in_features
    if not 2 <= bits <= 8 or group_size < 1 or N < 0:
        raise ArgumentError(
            f"bits must be 2 to 8, group_size positive (group_length(K)) and out_features not negative, got bits={bits}, "
            f"group_size={group_size}, out_features={N}"
        )
    codes, groups = LAYOUTS[layout].shapes(N, K, bits, group_size)
    if qweight.dtype != torch.uint8 or qweight.shape[-len(codes) :] != codes:
        raise ArgumentError(
            f"qweight must be uint8 {list(codes)} in layout {layout} for N={N}, K={K} (x is [M, K]), bits={bits}, got "
            f"{describe(qweight)}; a weight packed for another shape or layout?"
        )
    shape = (*qweight.shape[: -len(codes)], *groups)
    if scales.dtype not in FLOAT_DTYPES or scales.shape != shape:
        raise ArgumentError(
            f"scales must be floating {list(shape)} in layout {layout} for N={N}, K={K}, group_size={group_size}, got "
            f"{describe(scales)}"
        )
    if zeros is None:
        if zeros_are_offsets:
            raise ArgumentError("zeros must be given where zeros_are_offsets is true, got None")
    elif not _is_table(layout, zeros, bits, zeros_are_offsets) and (
        zeros.shape != shape
        or not (zeros.dtype in FLOAT_DTYPES or (zeros.dtype == torch.uint8 and not zeros_are_offsets))
    ):
        kinds = "floating" if zeros_are_offsets else "uint8 or floating"
        raise ArgumentError(f"zeros must be {kinds} {list(shape)} like scales, got {describe(zeros)}")
    if k_order is not None and (k_order.dtype != torch.int32 or k_order.dim() != 1 or k_order.shape[0] != K):
        raise ArgumentError(f"k_order must be None or int32 [K] = [{K}], got {describe(k_order)}")
    for name, t in (("scales", scales), ("zeros", zeros), ("k_order", k_order)):
        if t is not None and t.device != qweight.device:
            raise ArgumentError(f"{name} must be on the device of qweight, {qweight.device}, got {t.device}")
    return qweight.dim() - len(codes)


def _is_table(layout: str, zeros: Tensor, bits: int, zeros_are_offsets: bool) -> bool:
    """Whether `zeros` is a codebook's table, which some layouts take in their place; which one, its values say."""
    shaped = zeros.dtype == torch.float32 and zeros.dim() == 1 and zeros.shape[0] == 1 << bits
    return layout in TABLE_LAYOUTS and shaped and not zeros_are_offsets


# --- fake kernels and gradients -------------------------------------------------------------------------------------------


def _fake_gemm(layout: str, max_tokens: int | None, x: Tensor, *weight: Any) -> Tensor:
    check_gemm(layout, x, *weight, max_tokens=max_tokens)
    return x.new_empty((x.shape[0], weight[5]))


def _fake_dequantize(layout: str, qweight: Tensor, *rest: Any) -> Tensor:
    *weight, dtype = rest
    leading = check_weight(layout, qweight, *weight)
    out_features, in_features = weight[3], weight[4]
    return qweight.new_empty((*qweight.shape[:leading], out_features, in_features), dtype=dtype)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, zeros, k_order, bias, *numbers = inputs
    ctx.save_for_backward(qweight, scales, zeros, k_order)
    ctx.numbers = numbers
    ctx.in_features, ctx.x_dtype = x.shape[1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(layout: str, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _gradient_of_x(layout, ctx.in_features, dy, *ctx.saved_tensors, *ctx.numbers).to(ctx.x_dtype)
    if ctx.needs_input_grad[5]:
        dbias = dy.float().sum(0).to(ctx.bias_dtype)
    return (dx, None, None, None, None, dbias, None, None, None, None)


def _gradient_of_x(
    layout: str, in_features: int, dy: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, k_order: Tensor | None,
    out_features: int, bits: int, group_size: int, zeros_are_offsets: bool,
) -> Tensor:  # fmt: skip
    """dx = dy W in fp32, W dequantized a slice of rows at a time."""
    dequantize = getattr(torch.ops.qkernels, f"dequantize_{layout}")
    rows = LAYOUTS[layout].rows_per_tile
    tiles = max(1, _SLICE_BYTES // (4 * rows * max(in_features, 1)))
    dx = dy.new_zeros((dy.shape[0], in_features), dtype=torch.float32)
    for first in range(0, qweight.shape[0], tiles):
        part = slice(first, first + tiles)
        begin, end = first * rows, min((first + tiles) * rows, out_features)
        weight = dequantize(
            qweight[part], scales[part], zeros if zeros is None or zeros.dim() == 1 else zeros[part], k_order,
            end - begin, in_features, bits, group_size, zeros_are_offsets, torch.float32,
        )  # fmt: skip
        dx = dx + dy[:, begin:end].float() @ weight
    return dx


# --- definitions ----------------------------------------------------------------------------------------------------------


def _not_built(op: str, *_: Any) -> Tensor:
    status = extension.status()
    raise UnsupportedProblem(
        f"torch.ops.qkernels.{op} is compiled code, and {_why_not_built(status)}; build it with "
        f'`pip install . --no-build-isolation`, or allow the slow path with on_unsupported="reference"'
    )


def _why_not_built(status: extension.ExtensionStatus) -> str:
    return "the extension was built without CUDA" if status.loaded else f"the extension is not loaded: {status.error}"


def _needs_cuda(op: str, x: Tensor, *_: Any) -> Tensor:
    raise UnsupportedProblem(
        f"torch.ops.qkernels.{op} runs on CUDA devices, got tensors on {x.device}: pack the weight for that device "
        f"(QuantLinear.to does), or move them"
    )


def _built_for(device: str) -> bool:
    status = extension.status()
    return status.cuda if device == "cuda" else bool(status.isas)


def _ops_of(layout: Layout) -> dict[str, int | None]:
    """The names of a layout's matrix products, with the largest M that each takes (None: any)."""
    gemv = {} if layout.gemv_tokens is None else {f"gemv_{layout.name}": layout.gemv_tokens}
    return {f"gemm_{layout.name}": None} | gemv


def _define(op: str, schema: str, fake: Callable[..., Tensor]) -> None:
    LIBRARY.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    register_fake(f"qkernels::{op}", fake, lib=LIBRARY)


def _define_all() -> None:
    for layout, value in LAYOUTS.items():
        for op, max_tokens in _ops_of(value).items():
            _define(op, GEMM, partial(_fake_gemm, layout, max_tokens))
            register_autograd(
                f"qkernels::{op}", partial(_gradient, layout), setup_context=_save_for_gradient, lib=LIBRARY
            )
        op = f"dequantize_{layout}"
        _define(op, DEQUANTIZE, partial(_fake_dequantize, layout))
        LIBRARY.impl(op, partial(reference.dequantize_op, layout), "CompositeExplicitAutograd")
    LIBRARY.impl("gemm_reference", reference.gemm_op, "CompositeExplicitAutograd")
    LIBRARY.impl("gemm_reference_a8", reference.gemm_a8_op, "CompositeExplicitAutograd")
    extension.load()
    for value in LAYOUTS.values():
        for op in _ops_of(value):
            if value.device == "cuda":
                LIBRARY.impl(op, partial(_needs_cuda, op), "CPU")
            if value.device is not None and value.compiled and not _built_for(value.device):
                LIBRARY.impl(op, partial(_not_built, op), value.device.upper())


_define_all()
