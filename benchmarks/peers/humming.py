"""humming-kernels (Apache-2.0): a JIT-compiled GEMM with W4A16 on sm75 and later.

`HummingLayer(shape_n, shape_k, weight_config, torch_dtype)` takes GPTQ tensors under a `GPTQWeightSchema`, which is how other
projects feed it. Its zero points follow GPTQ v1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.formats import gptq
from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, needs, unlike


def reason(problem: Problem) -> str | None:
    return unlike(problem, bits=(4, 8), groups=(32, 64, 128), zeros=("none", "int"), n_multiple=64, k_multiple=32)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    from humming.layer import HummingLayer
    from humming.schema.gptq import GPTQWeightSchema

    scheme = weight.scheme
    schema = GPTQWeightSchema(bits=scheme.bits, group_size=scheme.group_size, desc_act=False, sym=scheme.symmetric)
    layer = HummingLayer(shape_n=weight.N, shape_k=weight.K, weight_config=schema, torch_dtype=dtype).to(device)
    layer.load_from_tensors({name: t.to(device) for name, t in gptq.write(1, weight).items()})
    layer.transform()

    def run(buffers: torch.nn.Module, x: Tensor) -> Tensor:
        y: Tensor = buffers(x)
        return y

    return Prepared(layer, run, bytes_of(*layer.parameters(), *layer.buffers()))


PEER: Peer = Peer(
    "humming", needs("humming-kernels", "humming", device="cuda"), reason, prepare,
    status="never run by us; names and arguments checked against humming-kernels 0.1.19",
)  # fmt: skip
