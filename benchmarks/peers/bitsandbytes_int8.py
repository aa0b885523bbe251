"""bitsandbytes LLM.int8: int8 weights with one scale a row, x quantized to int8 a token, columns with |x| >= 6 in 16 bits.

It quantizes the dequantized weight itself (max |w| / 127 a row), so that its output is compared with what its own codes mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, needs, unlike


def reason(problem: Problem) -> str | None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return unlike(problem, bits=(8,), groups=("channel",), dtypes=dtypes, acts=("int8_outliers",))


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(weight.K, weight.N, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(
        weight.dequantize(torch.float16).cpu(), requires_grad=False, has_fp16_weights=False
    )
    layer = layer.to(device).eval()  # quantizes
    means = layer.weight.data.float() * (layer.weight.SCB.float() / 127)[:, None]

    def run(buffers: torch.nn.Module, x: Tensor) -> Tensor:
        y: Tensor = buffers(x)
        return y

    with torch.no_grad():  # its first call moves the codes from the parameter into the layer's state
        layer(torch.zeros(1, weight.K, dtype=dtype, device=device))
    return Prepared(layer, run, weight.N * (weight.K + 4), weight=means, activation_bits=8)


PEER: Peer = Peer("bitsandbytes int8", needs("bitsandbytes", "bitsandbytes"), reason, prepare)
