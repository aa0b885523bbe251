"""gemlite (Apache-2.0): Triton kernels for low-bit weights; w = (code - zero) * scale, packed from uint8 codes `[N, K]`."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, integer_zeros, needs, unlike


def reason(problem: Problem) -> str | None:
    groups = (32, 64, 128, 256)
    return unlike(problem, bits=(2, 4, 8), groups=groups, zeros=("none", "int"), n_multiple=32, k_multiple=32)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    from gemlite.core import DType, GemLiteLinear

    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[dtype]
    layer = GemLiteLinear(
        weight.scheme.bits, group_size=weight.scheme.group_length(weight.K), in_features=weight.K,
        out_features=weight.N, input_dtype=kind, output_dtype=kind,
    )  # fmt: skip
    scales, zeros = (t.to(device, dtype).reshape(-1, 1) for t in (weight.scales, integer_zeros(weight)))
    # its form q * s + z rounds z = -zero * s to `dtype`, which is exact for the zero point in the middle only
    layer.pack(weight.codes.to(device), scales, zeros, None, fma_mode=weight.zeros is None)

    def run(buffers: torch.nn.Module, x: Tensor) -> Tensor:
        y: Tensor = buffers(x)
        return y

    return Prepared(layer, run, bytes_of(layer.W_q, layer.scales, layer.zeros))


PEER: Peer = Peer(
    "gemlite", needs("gemlite", "gemlite", device="cuda"), reason, prepare,
    status="never run by us; names and arguments checked against gemlite 0.6.0.post2",
)  # fmt: skip
