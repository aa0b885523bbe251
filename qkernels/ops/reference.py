"""The ops in plain PyTorch, on any device: what kernels are compared with, and what runs where the caller allows no kernel.

Slow on purpose: the whole weight is dequantized to fp32 on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..codebooks import INTEGER_STEPS
from ..layouts import Layout
from ..scheme import CODEBOOK_NUMBERS, CODEBOOKS, FACTOR_NUMBERS, QuantScheme, ZeroKind
from ..tensor import QuantTensor
from .weight import Weight, read_dequantize, read_product


def gemm(x: Tensor, weight: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + bias`, multiplied and accumulated in fp32, then rounded once to x's dtype.

    Args:
        x: floating `[M, K]`.
        weight: `[N, K]`.
        bias: None or floating `[N]`.
    """
    y = x.float() @ weight.dequantize(torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


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


def gemm_a8(x: Tensor, weight: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """`gemm` with int8 activations (`quantize_rows`): exact integer sums over each group, `sum_g` of (code - zero) x, then
    `y = (sum over groups of sum_g * scale_g + rest_g * sum(x)_g) * x_scale + bias` in fp32, rounded once to x's dtype.

    Integer zero points are the zero, and rest is 0. Otherwise the zero is 2^(bits-1), so that sums stay integers and small, and
    rest = (2^(bits-1) - zero_point) scale for floating zero points, 2^(bits-1) scale + offset for offsets.

    Args:
        x: floating `[M, K]`.
        weight: `[N, K]`, of integer codes, or codes of integers times a step, which goes with the scale.
        bias: None or floating `[N]`.
    """
    codes, x_scales = quantize_rows(x)
    groups, length = weight.scheme.num_groups(weight.K), weight.scheme.group_length(weight.K)
    order = weight.k_order()
    codebook = weight.scheme.codebook
    step = 1.0 if codebook is None else INTEGER_STEPS[codebook]
    table = None if codebook is None else torch.tensor(CODEBOOKS[codebook], dtype=torch.float64, device=x.device) / step
    # float64 holds the sums exactly, and has a fast product
    values, integers = weight.codes.double() if table is None else table[weight.codes.long()], codes.double()
    if order is not None:
        values, integers = values[:, order.long()], integers[:, order.long()]
    mid, rests = weight.scheme.mid_code if table is None else 0, _rests(weight)
    scales = weight.scales.float() * step
    zeros = torch.full_like(scales, mid) if weight.zeros is None or rests is not None else weight.zeros
    y = x.new_zeros(x.shape[0], weight.N, dtype=torch.float32)
    for g in range(groups):
        part = slice(g * length, (g + 1) * length)
        sums = integers[:, part] @ (values[:, part] - zeros[:, g : g + 1].double()).T
        y = y + sums.float() * scales[:, g]
        if rests is not None:
            y = y + integers[:, part].sum(1, keepdim=True).float() * rests[:, g]
    y = y * x_scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _rests(weight: QuantTensor) -> Tensor | None:
    """fp32 `[N, G]`: what each group of a weight with floating zeros or offsets adds for every unit of x (see `gemm_a8`)."""
    if weight.zeros is None or weight.scheme.zeros == "int":
        return None
    mid, scales, zeros = weight.scheme.mid_code, weight.scales.float(), weight.zeros.float()
    return mid * scales + zeros if weight.scheme.zeros == "offset" else (mid - zeros) * scales


_CODEBOOKS, _FACTORS = list(CODEBOOK_NUMBERS), list(FACTOR_NUMBERS)  # by number
PRODUCTS: dict[str | None, Callable[[Tensor, QuantTensor, Tensor | None], Tensor]] = {None: gemm, "int8": gemm_a8}
"""The product with each of `ACTIVATIONS`."""


def scheme_of(weight: Weight, act: str | None = None) -> QuantScheme:
    """The scheme that an op's arguments spell out. "channel" and "tensor" come back as one group of K, which means the same.

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
    return QuantScheme(weight.bits, weight.group_size, kind, act, codebook, factors=factors)


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


def unpacked_product(layout: Layout, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product with one weight of a layout that plain PyTorch runs, in x's dtype."""
    act = layout.acts[0]
    return PRODUCTS[act](x, _unpacked(layout, weight, act), bias)


def _unpacked(layout: Layout, weight: Weight, act: str | None = None) -> QuantTensor:
    buffers = {buffer.name: weight.value(buffer.name) for buffer in layout.buffers}
    return layout.unpack(buffers, weight.out_features, weight.in_features, scheme_of(weight, act))
