"""Weights, inputs and results that the tests of the Triton kernels share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.layouts import LAYOUTS
from qkernels.ops.grouped import Stack, activate
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


def exact_stack(
    scheme: str,
    experts: int,
    N: int,
    K: int,
    rows: int,
    dtype: torch.dtype,
    act_order: bool = False,
    name: str = "kpack",
) -> tuple[Stack, Tensor, Tensor, Tensor]:
    """Stacked experts with a bias, x [rows, K], the experts' weights [E, N, K] and their biases in float64: what `exact_problem`
    says of products. `name`: of the layout."""
    weight = random_weight(scheme, N, K, act_order=act_order, exact=True, experts=(experts,))
    x, bias = integers(rows, K, dtype=dtype), integers(experts, N, dtype=dtype)
    if weight.scheme.codebook is not None:
        x, bias = torch.eye(K, dtype=dtype)[:rows], torch.zeros(experts, N, dtype=dtype)
    layout = LAYOUTS[name]
    stack = Stack(layout.pack(weight), bias, layout.numbers_of(N, K, weight.scheme), K)
    return stack, x, weight.dequantize().double(), bias.double()


def rows_by_expert(counts: list[int], tokens: int) -> tuple[Tensor, Tensor]:
    """rows and offsets of `grouped_gemm`, with three rows behind those of all experts."""
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = torch.randint(tokens, (int(offsets[-1]) + 3,), generator=torch.Generator().manual_seed(3))
    return rows, offsets


def product_by_expert(x: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """What `grouped_gemm` means, in float64."""
    y = x.new_zeros((len(rows), weights.shape[1]), dtype=torch.float64)
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        y[begin:end] = x[rows[begin:end]].double() @ weights[e].T + bias[e]
    return y


def a_block_of_experts(
    x: Tensor, ids: Tensor, routing: Tensor, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], activation: str
) -> tuple[Tensor, Tensor]:
    """What `experts` means, in float64 but for the one rounding between its products, and the sum of its terms' magnitudes.

    up, down: weights [E, N, K] and biases [E, N].
    """
    y, size = (x.new_zeros((len(x), down[0].shape[1]), dtype=torch.float64) for _ in range(2))
    for t in range(len(x)):
        for e, w in zip(ids[t].tolist(), routing[t].tolist()):
            if 0 <= e < len(up[0]):
                halves = up[0][e] @ x[t].double() + up[1][e]
                inner = activate(activation, halves, ALPHA, LIMIT).to(x.dtype).double()
                y[t] += w * (down[0][e] @ inner + down[1][e])
                size[t] += abs(w) * (down[0][e].abs() @ inner.abs() + down[1][e].abs())
    return y, size


ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss
