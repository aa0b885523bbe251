"""torch's own 8-bit weight-only matmul, `_weight_int8pack_mm`: int8 `[N, K]`, one scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, unlike


def reason(problem: Problem) -> str | None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return unlike(problem, bits=(8,), groups=("channel",), dtypes=dtypes, n_multiple=16, k_multiple=16)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    codes = (weight.codes.short() - 128).to(torch.int8).to(device)
    scales = weight.scales[:, 0].to(device, dtype)

    def run(buffers: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, *buffers)

    return Prepared((codes, scales), run, bytes_of(codes, scales))


PEER: Peer = Peer("torch int8pack", lambda device: None, reason, prepare)
