"""A layout that somebody else might add, as docs/adding-a-kernel.md says: this file, and one line that registers it.

    qweight  uint8 [..., N, K]    codes, last column first
    scales   [..., N, G]          source dtype
    zeros    [..., N, G]          uint8, floating, or None
    k_order  int32 [K]            the columns sorted by group, or None; the codes themselves stay in natural order
    sums     fp32 [..., N]        sum of each row's codes

The last buffer, and a number that no other layout has, are for the tests: nothing but this file knows of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from qkernels.group_index import group_index_of
from qkernels.layouts import BUFFERS, NUMBERS, Buffer, Buffers, Layout, Number, Shapes
from qkernels.ops import reference
from qkernels.ops.weight import read_product


def shapes(N: int, K: int, bits: int, group_length: int) -> Shapes:
    return {"qweight": (N, K), "scales": (N, max(1, -(-K // group_length))), "sums": (N,)}


def limits(N: int, K: int, scheme: QuantScheme) -> list[str]:
    return ["codes of 7 bits bring bad luck"] if scheme.bits == 7 else []


def arrange(weight: QuantTensor) -> dict[str, Tensor | None]:
    return {
        "qweight": weight.codes.flip(-1),
        "scales": weight.scales.contiguous(),
        "zeros": None if weight.zeros is None else weight.zeros.contiguous(),
        "k_order": weight.k_order(),
        "sums": weight.codes.float().sum(-1),
    }


def unpack(buffers: Buffers, N: int, K: int, scheme: QuantScheme) -> QuantTensor:
    qweight, scales = buffers["qweight"], buffers["scales"]
    assert qweight is not None
    assert scales is not None
    return QuantTensor(
        qweight.flip(-1), scales, buffers["zeros"], group_index_of(buffers["k_order"], K, scheme), scheme
    )


LAYOUT = Layout(
    "toy", 1, "torch", arrange, unpack, shapes, stored_bits=lambda bits: 8, rows_per_tile=1, limits=limits,
    buffers=(*BUFFERS, Buffer("sums", dtype=torch.float32)),
    numbers=(*NUMBERS, Number("most", "float", lambda N, K, scheme: K / 64)),
)  # fmt: skip


def gemm(*arguments: Any) -> Tensor:
    """A kernel of its own for `gemm_toy`, which reads the buffer and the number: no |x| above `most`, and the sums added."""
    x, weight, bias = read_product(LAYOUT, arguments)
    most, sums = weight.own["most"], weight.own["sums"]
    scheme = reference.scheme_of(weight)
    buffers = {buffer.name: weight.value(buffer.name) for buffer in LAYOUT.buffers}
    y = reference.gemm(x.clamp(-most, most), unpack(buffers, weight.out_features, weight.in_features, scheme), bias)
    return (y + sums).to(x.dtype)
