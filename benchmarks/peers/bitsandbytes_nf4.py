"""bitsandbytes NF4 (16 quantile levels, one absmax a block), set against our NF4 and against 4-bit groups of the same length.

The dequantized weight is quantized again to NF4, so that its output is compared with what its own codes mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, needs, unlike


def reason(problem: Problem) -> str | None:
    scheme = problem.scheme
    if scheme.codebook == "nf4" and scheme.group_size in (64, 128, 256):
        return f"takes K % 64 == 0, got K={problem.K}" if problem.K % 64 else None
    return unlike(problem, bits=(4,), groups=(64, 128, 256), zeros=("none", "int"), k_multiple=64)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    import bitsandbytes as bnb
    from bitsandbytes import functional

    block = weight.scheme.group_length(weight.K)
    # .to() packs on CUDA and does nothing on the CPU, where the module packs at its first call: it is therefore called once here
    layer = bnb.nn.Linear4bit(
        weight.K, weight.N, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.dequantize(dtype).to("cpu"), requires_grad=False, quant_type="nf4", blocksize=block,
        compress_statistics=False, module=layer,
    )  # fmt: skip
    layer = layer.to(device).eval()  # in training mode it never packs for the CPU
    means = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().reshape(weight.N, weight.K)
    with torch.no_grad():
        layer(torch.zeros(1, weight.K, dtype=dtype, device=device))

    def run(buffers: torch.nn.Module, x: Tensor) -> Tensor:
        y: Tensor = buffers(x)
        return y

    nbytes = weight.N * weight.K // 2 + 4 * weight.N * (weight.K // block)
    return Prepared(
        layer, run, nbytes, weight=means, note="" if weight.scheme.codebook else "NF4: another 4-bit format"
    )


PEER: Peer = Peer("bitsandbytes nf4", needs("bitsandbytes", "bitsandbytes"), reason, prepare)
