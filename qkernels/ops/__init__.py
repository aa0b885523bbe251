"""Typed front of `torch.ops.qkernels`: arguments are checked here, in the user's words, before an op sees them.

`schema` defines the ops, `reference` has their plain-PyTorch meaning. Importing this loads the compiled extension, if there
is one (`extension`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ArgumentError
from ..layouts import Layout, get_layout
from ..scheme import QuantScheme
from . import grouped, schema
from .schema import GEMM, GEMV, Op, register
from .weight import Product, Weight, dequantize_arguments, weight_from_buffers

__all__ = ["GEMM", "Weight", "call", "dequantize", "gemm", "gemv", "grouped", "records_gradient", "register"]


def gemm(
    layout: str,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    k_order: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
    scheme: QuantScheme,
    **own: Tensor | None,
) -> Tensor:
    """`y = x W^T + bias`.

    Args:
        layout: how the weight was packed, a key of `layouts.LAYOUTS`.
        x: float32, bfloat16 or float16 `[M, K]`, any strides, any M.
        qweight, scales, zeros, k_order: the buffers that `Layout.pack` made of one `[N, K]` weight; a layout that has more
            takes them by name.
        bias: None or floating `[N]`.
        in_features, out_features: K and N.
        scheme: the weight's.

    Returns:
        `[M, N]` in x's dtype, on x's device.

    Raises:
        ArgumentError: an argument has the wrong dtype, shape, device or value.
        UnsupportedProblem: the layout's kernels are compiled, and the extension is not loaded.
    """
    buffers = {"qweight": qweight, "scales": scales, "zeros": zeros, "k_order": k_order, **own}
    return _product(GEMM, None, get_layout(layout), x, buffers, bias, in_features, out_features, scheme)


def gemv(
    layout: str,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    k_order: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
    scheme: QuantScheme,
    **own: Tensor | None,
) -> Tensor:
    """The decode path of `gemm` alone, for tests and benchmarks: M up to the layout's `gemv_tokens`.

    Arguments, result and errors are those of `gemm`.
    """
    value = get_layout(layout)
    if value.gemv_tokens is None:
        raise ArgumentError(f"gemv takes layout {' or '.join(GEMV)}, got {layout!r}; call gemm")
    buffers = {"qweight": qweight, "scales": scales, "zeros": zeros, "k_order": k_order, **own}
    return _product(GEMV, value.gemv_tokens, value, x, buffers, bias, in_features, out_features, scheme)


def dequantize(
    layout: str,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    k_order: Tensor | None = None,
    *,
    in_features: int,
    out_features: int,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.float32,
    **own: Tensor | None,
) -> Tensor:
    """The weight `[..., N, K]` in `dtype`, equal to `QuantTensor.dequantize(dtype)` of what was packed.

    Arguments and errors are those of `gemm`; leading (expert) dimensions are taken.
    """
    value = get_layout(layout)
    buffers = {"qweight": qweight, "scales": scales, "zeros": zeros, "k_order": k_order, **own}
    in_order = [buffers[buffer.name] for buffer in value.buffers]
    numbers = value.numbers_of(out_features, in_features, scheme)
    weight = weight_from_buffers(value, in_order, numbers, in_features)
    schema.check_weight(value, weight)
    op: Callable[..., Tensor] = getattr(torch.ops.qkernels, f"dequantize_{layout}")
    return op(*dequantize_arguments(value, weight, dtype))


def _product(
    ops: Mapping[str, Op], max_tokens: int | None, layout: Layout, x: Tensor, buffers: Mapping[str, Tensor | None],
    bias: Tensor | None, in_features: int, out_features: int, scheme: QuantScheme,
) -> Tensor:  # fmt: skip
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ArgumentError(f"x must be [M, K] with K = in_features = {in_features}, got {list(x.shape)}")
    if (buffers["zeros"] is None) != scheme.symmetric:
        raise ArgumentError(f"zeros must be {'None' if scheme.symmetric else 'given'} for {scheme}")
    numbers = layout.numbers_of(out_features, in_features, scheme)
    op = ops[layout.name]
    weight = weight_from_buffers(layout, [buffers[name] for name in op.buffers], numbers, in_features)
    schema.check_product(layout, Product(x, weight, bias), max_tokens)
    return call(op, x, buffers, bias, numbers)


def call(
    op: Op, x: Tensor, buffers: Mapping[str, Tensor | None], bias: Tensor | None, numbers: Sequence[float]
) -> Tensor:
    """An op on arguments that were checked before: in `gemm` and `gemv`, or when a `QuantLinear` was packed or loaded.

    The checks of `gemm` take 4 us a call in Python, twice as long as all that a small decode step's op does; the compiled ops
    check their arguments in any case, in fewer words.

    Args:
        op: `GEMM[layout]`.
        buffers: by name; the op takes its own.
        numbers: `Layout.numbers_of`.
    """
    run, names, layout = op
    packed = [buffers[name] for name in names]
    # In inference mode nothing of autograd is in the way; torch.compile refuses to be asked about it.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return run(x, *packed, bias, *numbers)
    if transforms_are_active():
        return schema.transformed_product(layout, x, packed, bias, numbers)
    if records_gradient(x, bias):
        return run(x, *packed, bias, *numbers)
    # The autograd kernel of an op registered from Python costs about 4 us a call, wanted or not, which is more than a small
    # decode step. torch.library's own kernel enters this guard too, once it finds that no gradient is wanted.
    with torch._C._AutoDispatchBelowAutograd():
        return run(x, *packed, bias, *numbers)


def transforms_are_active() -> bool:
    """Whether a derivative may be wanted that `requires_grad` says nothing of: inside torch.func's transforms, vmap included, or
    forward-mode AD."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def records_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd would record a product with x; a packed weight has no gradient."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
