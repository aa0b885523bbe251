"""Typed front of `torch.ops.qkernels`: arguments are checked here, in the user's words, before an op sees them.

`schema` defines the ops, `reference` has their plain-PyTorch meaning. Importing this loads the compiled extension, if there
is one (`extension`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layouts import LAYOUTS, get_layout
from ..scheme import QuantScheme
from . import schema

__all__ = ["dequantize", "gemm", "gemv"]


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
) -> Tensor:
    """`y = x W^T + bias`.

    Args:
        layout: how the weight was packed, a key of `layouts.LAYOUTS`.
        x: float32, bfloat16 or float16 `[M, K]`, any strides, any M.
        qweight, scales, zeros, k_order: the buffers that `Layout.pack` made of one `[N, K]` weight.
        bias: None or floating `[N]`.
        in_features, out_features: K and N.
        scheme: the weight's.

    Returns:
        `[M, N]` in x's dtype, on x's device.

    Raises:
        ArgumentError: an argument has the wrong dtype, shape, device or value.
        UnsupportedProblem: the layout's kernels are compiled, and the extension is not loaded.
    """
    return _run("gemm", layout, None, x, qweight, scales, zeros, k_order, bias, in_features, out_features, scheme)


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
) -> Tensor:
    """The decode path of `gemm` alone, for tests and benchmarks: M up to the layout's `gemv_tokens`.

    Arguments, result and errors are those of `gemm`.
    """
    tokens = get_layout(layout).gemv_tokens
    if tokens is None:
        some = [name for name, value in LAYOUTS.items() if value.gemv_tokens is not None]
        raise ArgumentError(f"gemv takes layout {' or '.join(some)}, got {layout!r}; call gemm")
    return _run("gemv", layout, tokens, x, qweight, scales, zeros, k_order, bias, in_features, out_features, scheme)


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
) -> Tensor:
    """The weight `[..., N, K]` in `dtype`, equal to `QuantTensor.dequantize(dtype)` of what was packed.

    Arguments and errors are those of `gemm`; leading (expert) dimensions are taken.
    """
    get_layout(layout)
    group_size, offsets = scheme.group_length(in_features), scheme.zeros == "offset"
    weight = (qweight, scales, zeros, k_order, out_features, in_features, scheme.bits, group_size, offsets)
    schema.check_weight(layout, *weight)
    op: Callable[..., Tensor] = getattr(torch.ops.qkernels, f"dequantize_{layout}")
    return op(*weight, dtype)


def _run(
    kind: str, layout: str, max_tokens: int | None, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None,
    k_order: Tensor | None, bias: Tensor | None, in_features: int, out_features: int, scheme: QuantScheme,
) -> Tensor:  # fmt: skip
    get_layout(layout)
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ArgumentError(f"x must be [M, K] with K = in_features = {in_features}, got {list(x.shape)}")
    table = scheme.codebook is not None  # the reference op takes it in the place of zeros
    if (zeros is None) != (scheme.symmetric and not table):
        raise ArgumentError(f"zeros must {'be given' if table or not scheme.symmetric else 'be None'} for {scheme}")
    group_size, offsets = scheme.group_length(in_features), scheme.zeros == "offset"
    args = (x, qweight, scales, zeros, k_order, bias, out_features, scheme.bits, group_size, offsets)
    schema.check_gemm(layout, *args, max_tokens=max_tokens)
    return call(f"{kind}_{layout}", *args)


def call(
    name: str, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, k_order: Tensor | None,
    bias: Tensor | None, *numbers: int,
) -> Tensor:  # fmt: skip
    """The op `name` on arguments that were checked before: in `gemm` and `gemv`, or when a `QuantLinear` was packed or loaded.

    The checks of `gemm` take 4 us a call in Python, twice as long as all that a small decode step's op does; the compiled ops
    check their arguments in any case, in fewer words.

    Args:
        numbers: out_features, bits, group_size and zeros_are_offsets.
    """
    op = _OPS[name]
    # In inference mode nothing of autograd is in the way; torch.compile refuses to be asked about it.
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or records_gradient(x, bias):
        return op(x, qweight, scales, zeros, k_order, bias, *numbers)
    # The autograd kernel of an op registered from Python costs about 4 us a call, wanted or not, which is more than a small
    # decode step. torch.library's own kernel enters this guard too, once it finds that no gradient is wanted.
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, qweight, scales, zeros, k_order, bias, *numbers)


def records_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd would record a product with x; a packed weight has no gradient."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


_OPS: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch.ops.qkernels, name).default
    for layout, value in LAYOUTS.items()
    for name in (f"gemm_{layout}", *([f"gemv_{layout}"] if value.gemv_tokens is not None else []))
}
