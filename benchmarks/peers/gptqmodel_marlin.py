"""Marlin as GPTQModel builds it (vLLM's, with act-order): symmetric 4- and 8-bit GPTQ weights on sm80 and later."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.formats import gptq
from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, needs, unlike


def reason(problem: Problem) -> str | None:
    return unlike(problem, bits=(4, 8), groups=(32, 64, 128), n_multiple=64, k_multiple=128)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    from gptqmodel.nn_modules.qlinear import marlin

    # 7.x calls it MarlinLinear, earlier versions MarlinQuantLinear
    kind = getattr(marlin, "MarlinLinear", None) or marlin.MarlinQuantLinear
    scheme = weight.scheme
    layer = kind(
        bits=scheme.bits, group_size=scheme.group_size, desc_act=False, sym=True, in_features=weight.K,
        out_features=weight.N, bias=False, dtype=dtype,
    ).to(device)  # fmt: skip
    with torch.no_grad():
        for name, tensor in gptq.write(1, weight).items():
            getattr(layer, name).data = tensor.to(device)
    layer.post_init()
    layer.scales.data = layer.scales.data.to(dtype)

    def run(buffers: torch.nn.Module, x: Tensor) -> Tensor:
        y: Tensor = buffers(x)
        return y

    return Prepared(layer, run, bytes_of(layer.qweight, layer.scales))


PEER: Peer = Peer(
    "marlin (gptqmodel)", needs("gptqmodel", "gptqmodel", device="cuda"), reason, prepare,
    status="never run by us; names and arguments checked against GPTQModel 7.7.0",
)  # fmt: skip
