"""Weights, inputs and results that the tests of the Triton kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.layouts import LAYOUTS
from tests.ops.helpers import integers
from tests.strategies import random_weight

BUFFERS = tuple(buffer.name for buffer in LAYOUTS["kpack"].buffers)


def numbers(weight: QuantTensor) -> tuple[float, ...]:
    """The launcher's numbers behind out_features (and in_features)."""
    return LAYOUTS["kpack"].numbers_of(weight.N, weight.K, weight.scheme)[1:]


def exact_problem(
    scheme: str, M: int, N: int, K: int, dtype: torch.dtype, act_order: bool = False
) -> tuple[QuantTensor, Tensor, Tensor, Tensor]:
    """weight, x and bias whose products and sums fp32 holds exactly, and the result, rounded once.

    Entries of a codebook are no short fractions: with one, each sum is one product, of the rounded entry.
    """
    weight = random_weight(scheme, N, K, act_order=act_order, exact=True)
    x, bias = integers(M, K, dtype=dtype), integers(N, dtype=dtype)
    if weight.scheme.codebook is not None:
        x, bias = torch.eye(K, dtype=dtype)[:M], torch.zeros(N, dtype=dtype)
    return weight, x, bias, (x.double() @ weight.dequantize().double().T + bias.double()).to(dtype)
