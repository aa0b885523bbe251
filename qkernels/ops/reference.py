"""The ops in plain PyTorch, on any device: what kernels are compared with, and what runs where the caller allows no kernel.

Slow on purpose: the whole weight is dequantized to fp32 on every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..layouts import get_layout
from ..scheme import CODEBOOKS, QuantScheme, ZeroKind
from ..tensor import QuantTensor, group_index_of


def gemm(x: Tensor, weight: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + bias`, multiplied and accumulated in fp32, then rounded once to x's dtype.

    Args:
        x: floating `[M, K]`.
        weight: `[N, K]`.
        bias: None or floating `[N]`.
    """
    y = x.float() @ weight.dequantize(torch.float32).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def scheme_of(zeros: Tensor | None, bits: int, group_size: int, zeros_are_offsets: bool) -> QuantScheme:
    """The scheme that an op's arguments spell out. "channel" and "tensor" come back as one group of K, which means the same.

    Raises:
        ArgumentError: zeros `[2^bits]` are the table of no codebook.
    """
    if zeros is not None and zeros.dim() == 1:
        return QuantScheme(bits, group_size, codebook=_codebook_of(zeros))
    kind: ZeroKind
    if zeros is None:
        kind = "none"
    elif zeros_are_offsets:
        kind = "offset"
    else:
        kind = "int" if zeros.dtype == torch.uint8 else "float"
    return QuantScheme(bits, group_size, kind)


def _codebook_of(table: Tensor) -> str:
    for name, values in CODEBOOKS.items():
        if torch.equal(table, torch.tensor(values, dtype=torch.float32, device=table.device)):
            return name
    raise ArgumentError(
        f"zeros must be the table of {' or '.join(CODEBOOKS)} where they are one-dimensional, got {table[:4].tolist()} …"
    )


def gemm_op(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, k_order: Tensor | None, bias: Tensor | None,
    out_features: int, bits: int, group_size: int, zeros_are_offsets: bool,
) -> Tensor:  # fmt: skip
    """The op `gemm_reference`; arguments as in `schema`."""
    scheme = scheme_of(zeros, bits, group_size, zeros_are_offsets)
    zeros = None if scheme.codebook is not None else zeros
    return gemm(x, QuantTensor(qweight, scales, zeros, group_index_of(k_order, x.shape[1], scheme), scheme), bias)


def dequantize_op(
    layout: str, qweight: Tensor, scales: Tensor, zeros: Tensor | None, k_order: Tensor | None,
    out_features: int, in_features: int, bits: int, group_size: int, zeros_are_offsets: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`dequantize_<layout>` for a layout that has no faster one: unpack, then `QuantTensor.dequantize`."""
    buffers = {"qweight": qweight, "scales": scales, "zeros": zeros, "k_order": k_order}
    scheme = scheme_of(zeros, bits, group_size, zeros_are_offsets)
    return get_layout(layout).unpack(buffers, out_features, in_features, scheme).dequantize(dtype)
