"""Weights with the Hessians of their inputs, and what a rounding of them costs."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import QuantTensor


def problem(N: int, K: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the float64 Hessian of correlated inputs of very different magnitudes."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g)
    x = torch.randn(tokens, K, generator=g, dtype=torch.float64) @ torch.randn(K, K, generator=g, dtype=torch.float64)
    x *= torch.logspace(-1, 1, K, dtype=torch.float64)[torch.randperm(K, generator=g)]
    return w, x.T @ x * (2 / tokens)


def output_error(tensor: QuantTensor, w: Tensor, hessian: Tensor) -> float:
    difference = tensor.dequantize().double() - w.double()
    return float(((difference @ hessian) * difference).sum())
