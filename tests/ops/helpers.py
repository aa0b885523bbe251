"""Weights to op arguments, inputs without rounding, and the references that kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import QuantLinear, QuantTensor
from qkernels.layouts import get_layout
from qkernels.tensor import FLOAT_DTYPES

DTYPES = FLOAT_DTYPES
LAYOUT = "cpu_tile_a16"


def arguments(weight: QuantTensor, x: Tensor, bias: Tensor | None = None, layout: str = LAYOUT) -> tuple[object, ...]:
    """The arguments of `gemm_<layout>`."""
    value = get_layout(layout)
    packed = value.pack(weight)
    buffers = (packed[buffer.name] for buffer in value.buffers)
    return (x, *buffers, bias, *value.numbers_of(weight.N, weight.K, weight.scheme))


def dequantize_arguments(weight: QuantTensor, dtype: torch.dtype, layout: str = LAYOUT) -> tuple[object, ...]:
    """The arguments of `dequantize_<layout>`."""
    value = get_layout(layout)
    packed = value.pack(weight)
    out_features, *numbers = value.numbers_of(weight.N, weight.K, weight.scheme)
    return (*(packed[buffer.name] for buffer in value.buffers), out_features, weight.K, *numbers, dtype)


def multiply(weight: QuantTensor, x: Tensor, bias: Tensor | None = None, op: str = f"gemm_{LAYOUT}") -> Tensor:
    result = getattr(torch.ops.qkernels, op)(*arguments(weight, x, bias))
    assert isinstance(result, Tensor)
    return result


def layer_in(
    layout: str, weight: QuantTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> QuantLinear:
    """A layer on the CPU whose weight lies in that layout, whichever the catalogue would choose there."""
    chosen = QuantLinear.from_quant_tensor(weight, bias, dtype=dtype, on_unsupported="reference")
    layer = QuantLinear(
        weight.K, weight.N, bias is not None,
        scheme=weight.scheme, dtype=chosen.dtype, ordered=weight.group_index is not None, layout=layout,
    )  # fmt: skip
    layer.load_state_dict(chosen.state_dict())
    return layer


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, most: int = 3) -> Tensor:
    """Random whole numbers from -most to most."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def magnitudes(weight: QuantTensor) -> Tensor:
    """float64 [N, K]: the sum of the magnitudes of the terms that make up each weight in the kernels: |w|, or where zeros are
    floating |code - mid| |scale| + |rest|, with rest = (mid - zero) scale or mid scale + offset, whose two terms meet x one by
    one where scales are products."""
    if weight.zeros is None or weight.scheme.zeros == "int":
        return weight.dequantize().double().abs()
    groups = weight.column_groups()
    mid = weight.scheme.mid_code
    scale, zero = weight.scales.double()[:, groups], weight.zeros.double()[:, groups]
    rest = (mid * scale + zero if weight.scheme.zeros == "offset" else (mid - zero) * scale).abs()
    if weight.factors is not None:
        rest = (mid * scale).abs() + zero.abs()
    return ((weight.codes.double() - mid) * scale).abs() + rest


def exact_product(weight: QuantTensor, x: Tensor, bias: Tensor | None = None, unit: float = 1 / 8) -> Tensor:
    """The product where no partial sum of any order is rounded: all terms are multiples of `unit`, and the sum of their
    magnitudes is below 2^22 units (checked). Only the output is rounded, once."""
    terms = x.double().abs() @ magnitudes(weight).T
    assert float(terms.max() if terms.numel() else 0) / unit < 2**22, "the inputs are too large to be exact"
    y = x.double() @ weight.dequantize().double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def assert_like_a_float_layer(y: Tensor, weight: QuantTensor, x: Tensor, bias: Tensor | None = None) -> None:
    """Infinities and NaN at the same places as those of a float layer with this weight, and the rest near its values."""
    w = weight.dequantize(torch.float32).double()
    truth = x.double() @ w.T + (0 if bias is None else bias.double())
    assert torch.equal(y.isnan(), truth.isnan())
    expected = truth.to(torch.float32).to(x.dtype)
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[y.isinf()])
    # Floating zero points are multiplied apart from the codes, each up to all steps of the group: see the numerics' bounds.
    steps = weight.scales.double().abs()[:, weight.column_groups()] * 2**weight.scheme.bits
    size = x.double().abs() @ (w.abs() + steps).T + 1
    usual = y.isfinite()
    bound = 1e-2 if x.dtype == torch.bfloat16 else 1e-3
    assert bool(((y.double() - truth).abs() <= bound * size)[usual].all())
