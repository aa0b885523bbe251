"""ARK, the kernels of auto-round (auto-round-lib): 4-bit weights in groups with fp32 activations in and out.

It is given fp32 x, as transformers' auto-round models give it; what it computes in is its own choice ("auto").
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, needs, unlike


def reason(problem: Problem) -> str | None:
    return unlike(problem, bits=(4,), groups=(32, 64, 128), k_multiple=32)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    import auto_round_kernel as ark

    group, N, K = weight.scheme.group_length(weight.K), weight.N, weight.K
    codes = (weight.codes.to(torch.int8) - weight.scheme.mid_code).t().contiguous()
    none = torch.empty(0, dtype=torch.int8)
    packed = ark.repack_quantized_weight(
        codes, weight.scales.float().t().contiguous(), none, group, "auto", "int4", "fp32", False
    )

    def run(buffers: Tensor, x: Tensor) -> Tensor:
        y: Tensor = ark.woqgemm(x, buffers, torch.empty(0), N, K, group, "auto", "int4", "fp32", False)
        return y

    return Prepared(
        packed,
        lambda b, x: run(b, x.float()),
        bytes_of(packed),
        activation_bits=8,
        note="fp32 x and y; computes as it likes",
    )


PEER: Peer = Peer("ark", needs("auto-round-lib", "auto_round_kernel", device="cpu"), reason, prepare)
