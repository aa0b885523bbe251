"""The ops in plain PyTorch, on any device: what kernels are compared with, and what runs where the caller allows no kernel.

Slow on purpose: the whole weight is dequantized to fp32 on every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codebooks import INTEGER_STEPS
from ..errors import SchemeError
from ..layouts import Layout
from ..scheme import ACTIVATION_NUMBERS, CODEBOOK_NUMBERS, CODEBOOKS, FACTOR_NUMBERS, QuantScheme, ZeroKind
from ..tensor import QuantTensor
from .weight import Weight, read_dequantize, read_product


def gemm(x: Tensor, weight: QuantTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`y = x W^T + bias`, multiplied and accumulated in fp32, then rounded once to `dtype`.

    Args:
        x: floating `[M, K]`.
        weight: `[N, K]`.
        bias: None or floating `[N]`.
        dtype: that of x if None.
    """
    y = x.float() @ weight.dequantize(torch.float32).T
    return (y if bias is None else y + bias.float()).to(dtype or x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 activations, one scale a token: codes = round(x / max |x| * 127), ties to even, in fp32.

    Args:
        x: floating `[M, K]`.

    Returns:
        codes int8 `[M, K]` from -127 to 127, and scales fp32 `[M, 1]` = max |x| / 127. A row of zeros has codes and scale 0;
        a row with a NaN or an infinity has codes 0 and scale NaN, which makes its row of the product NaN.
    """
    x = x.float()
    largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    usable = largest.isfinite() & (largest > 0)
    # Divided first: 127 / max |x| would overflow where max |x| is below 2^-121.
    codes = torch.where(usable, x / torch.where(usable, largest, 1) * 127, 0).round()
    return codes.to(torch.int8), torch.where(largest.isfinite(), largest / 127, torch.nan)


def quantize_rows_wide(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 activations as compressed-tensors makes them (0.20, calculate_qparams and fake_quantize): scale = max |x| /
    127.5 and codes = round(x / scale), from -128 to 127, scale and quotient rounded to x's dtype; else as
    `quantize_rows`.
    """
    largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    scales = largest / torch.full_like(largest, 127.5)  # a number would be a product with its reciprocal on CUDA
    usable = largest.isfinite() & (scales > 0)
    codes = torch.where(usable, x / torch.where(usable, scales, 1), 0).clamp(-128, 127).round()
    return codes.to(torch.int8), torch.where(largest.isfinite(), scales, torch.nan).float()


def quantize_rows_zero(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric ones, likewise: scale = (max - min) / 255 over the range with 0, zero point = -128 - min / scale, codes =
    round(x / scale + zero point).

    Returns:
        codes and scales as `quantize_rows`; zero points fp32 `[M, 1]`, whole numbers. Rows without a range have zeros all over.
    """
    edges = torch.cat([x, x.new_zeros(x.shape[0], 1)], 1)
    low, high = edges.amin(1, keepdim=True), edges.amax(1, keepdim=True)
    scales = (high - low) / torch.full_like(low, 255)
    finite = low.isfinite() & high.isfinite() & scales.isfinite()
    usable = finite & (scales > 0)
    by = torch.where(usable, scales, 1)
    zeros = torch.where(usable, -128 - low / by, 0).clamp(-128, 127).round()
    codes = torch.where(usable, x / by + zeros, 0).clamp(-128, 127).round()
    return codes.to(torch.int8), torch.where(finite, scales, torch.nan).float(), zeros.float()


def quantize_rows_outliers(x: Tensor, threshold: float = 6.0) -> tuple[Tensor, Tensor, Tensor]:
    """int8 activations as bitsandbytes makes them for LLM.int8 (0.50, int8_vectorwise_quant): x in float16, codes = round(x *
    127 / max |x|) in fp32, 127 times the reciprocal first, the maximum of a row's entries below the threshold.

    Returns:
        codes and scales as `quantize_rows`; bool `[K]`: columns with an entry of the threshold or more in any row, which have
        codes 0 and multiply as they are. An infinity is such an entry, a NaN makes its row NaN.
    """
    half = x.half()
    outliers = half.abs() >= threshold
    marked = outliers.any(0)
    usual = torch.where(outliers, 0, half.float())
    largest = usual.abs().amax(1, keepdim=True) if x.shape[1] else usual.new_zeros(x.shape[0], 1)
    usable = (largest > 0) & ~largest.isnan()
    codes = torch.where(usable & ~marked, usual * (torch.where(usable, largest, 1).reciprocal() * 127), 0).round()
    return codes.to(torch.int8), largest / 127, marked


def quantize_rows_static(x: Tensor, x_static: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 activations under the scale and zero point that a file has for all tokens, as compressed-tensors makes them (0.20,
    fake_quantize): codes = round(x / scale + zero point), -128 to 127, scale, quotient and sum rounded to x's dtype.

    Args:
        x: floating `[M, K]`.
        x_static: fp32 `[2]`, scale and zero point.

    Returns:
        codes, scales and zero points as `quantize_rows_zero`. An infinity is the largest code, a NaN makes its row NaN. Where the
        scale rounds to 0 or infinity (float16), codes and zero points are 0.
    """
    scale, zero = x_static[:1].to(x.dtype), x_static[1:].to(x.dtype)
    usable = bool(scale.isfinite() & (scale > 0))
    scaled = x / scale if usable else torch.zeros_like(x)
    scaled += zero if usable else 0
    nan = x.isnan().any(1, keepdim=True)
    codes = torch.where(nan, 0, scaled).clamp(-128, 127).round()
    scales = torch.where(nan, torch.nan, scale.float().expand(x.shape[0], 1))
    return codes.to(torch.int8), scales, (zero.float() if usable else zero.new_zeros(1).float()).expand(x.shape[0], 1)


def gemm_a8(x: Tensor, weight: QuantTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`gemm` with int8 activations, as `weight.scheme.act` says: exact integer sums over each group, `sum_g` of (code - zero) x,
    then `y = (sum over groups of sum_g * scale_g + rest_g * sum(x)_g) * x_scale + bias` in fp32, rounded once to `dtype`.

    Integer zero points are the zero, and rest is 0. Otherwise the zero is 2^(bits-1), so that sums stay integers and small, and
    rest = (2^(bits-1) - zero_point) scale for floating zero points, 2^(bits-1) scale + offset for offsets.

    Zero points of x: the same of a row of ones, times zero point and scale, is subtracted. Outliers: what marked columns of x
    multiply is added, in fp32.

    Args:
        x: floating `[M, K]`.
        weight: `[N, K]`, of integer codes, or codes of integers times a step, which goes with the scale.
        bias: None or floating `[N]`.
        dtype: that of x if None.
    """
    act = weight.scheme.act
    if act == "int8_static":
        assert weight.x_static is not None
        codes, x_scales, _ = quantize_rows_static(x, weight.x_static)
        y = _integer_product(codes, x_scales, weight)
    elif act in ("int8_zero", "int8_static_zero"):
        made = quantize_rows_zero(x) if weight.x_static is None else quantize_rows_static(x, weight.x_static)
        codes, x_scales, x_zeros = made
        ones = codes.new_ones(1, x.shape[1])
        y = _integer_product(codes, x_scales, weight) - x_zeros * x_scales * _integer_product(
            ones, x_scales.new_ones(1, 1), weight
        )
    elif act == "int8_outliers":
        codes, x_scales, marked = quantize_rows_outliers(x)
        y = _integer_product(codes, x_scales, weight)
        if bool(marked.any()):
            y = y + x[:, marked].float() @ weight.dequantize(torch.float32)[:, marked].T
    else:
        codes, x_scales = quantize_rows_wide(x) if act == "int8_wide" else quantize_rows(x)
        y = _integer_product(codes, x_scales, weight)
    return (y if bias is None else y + bias.float()).to(dtype or x.dtype)


def _integer_product(codes: Tensor, x_scales: Tensor, weight: QuantTensor) -> Tensor:
    """fp32 `[M, N]` of int8 `[M, K]` with a scale a row; see `gemm_a8`."""
    groups, length = weight.scheme.num_groups(weight.K), weight.scheme.group_length(weight.K)
    order = weight.k_order()
    codebook = weight.scheme.codebook
    step = 1.0 if codebook is None else INTEGER_STEPS[codebook]
    table = (
        None if codebook is None else torch.tensor(CODEBOOKS[codebook], dtype=torch.float64, device=codes.device) / step
    )
    # float64 holds the sums exactly, and has a fast product
    values, integers = weight.codes.double() if table is None else table[weight.codes.long()], codes.double()
    if order is not None:
        values, integers = values[:, order.long()], integers[:, order.long()]
    mid, rests = weight.scheme.mid_code if table is None else 0, _rests(weight)
    scales = weight.scales.float() * step
    zeros = torch.full_like(scales, mid) if weight.zeros is None or rests is not None else weight.zeros
    y = x_scales.new_zeros(codes.shape[0], weight.N)
    for g in range(groups):
        part = slice(g * length, (g + 1) * length)
        sums = integers[:, part] @ (values[:, part] - zeros[:, g : g + 1].double()).T
        y = y + sums.float() * scales[:, g]
        if rests is not None:
            y = y + integers[:, part].sum(1, keepdim=True).float() * rests[:, g]
    return y * x_scales


def _rests(weight: QuantTensor) -> Tensor | None:
    """fp32 `[N, G]`: what each group of a weight with floating zeros or offsets adds for every unit of x (see `gemm_a8`)."""
    if weight.zeros is None or weight.scheme.zeros == "int":
        return None
    mid, scales, zeros = weight.scheme.mid_code, weight.scales.float(), weight.zeros.float()
    return mid * scales + zeros if weight.scheme.zeros == "offset" else (mid - zeros) * scales


_CODEBOOKS, _FACTORS = list(CODEBOOK_NUMBERS), list(FACTOR_NUMBERS)  # by number
_ACTS = list(ACTIVATION_NUMBERS)


def scheme_of(weight: Weight) -> QuantScheme:
    """The scheme that an op's arguments spell out, activations included. "channel" and "tensor" come back as one group of K,
    which means the same.

    Raises:
        SchemeError: the numbers contradict each other, or the activations need integer codes.
    """
    kind: ZeroKind
    if weight.zeros is None:
        kind = "none"
    elif weight.zeros_are_offsets:
        kind = "offset"
    else:
        kind = "int" if weight.zeros.dtype == torch.uint8 else "float"
    codebook, factors = _CODEBOOKS[weight.codebook], _FACTORS[weight.factors]
    number = weight.own.get("act", 0)
    if not 0 <= number < len(_ACTS):
        raise SchemeError(f"act must be 0 to {len(_ACTS) - 1}, got {number}")
    return QuantScheme(weight.bits, weight.group_size, kind, _ACTS[number], codebook, factors=factors)


def product_op(layout: Layout, *arguments: Any) -> Tensor:
    """`gemm_<layout>` for a layout that plain PyTorch runs: unpack, then the product with its activations.

    Raises:
        ArgumentError, SchemeError: see `scheme_of`.
    """
    x, weight, bias = read_product(layout, arguments)
    return unpacked_product(layout, x, weight, bias)


def dequantize_op(layout: Layout, *arguments: Any) -> Tensor:
    """`dequantize_<layout>` for a layout that has no faster one: unpack, then `QuantTensor.dequantize`."""
    weight, dtype = read_dequantize(layout, arguments)
    return _unpacked(layout, weight).dequantize(dtype)


def unpacked_product(
    layout: Layout, x: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """The product with one weight of a layout that plain PyTorch runs, in `dtype`, or x's."""
    whole = _unpacked(layout, weight)
    return (gemm if whole.scheme.act is None else gemm_a8)(x, whole, bias, dtype)


def _unpacked(layout: Layout, weight: Weight) -> QuantTensor:
    buffers = {buffer.name: weight.value(buffer.name) for buffer in layout.buffers}
    return layout.unpack(buffers, weight.out_features, weight.in_features, scheme_of(weight))
