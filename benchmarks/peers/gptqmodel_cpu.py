"""GPTQModel's W4A16 kernel for CPUs with AVX512-BF16, which it compiles at first use."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.formats import gptq
from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, needs, unlike


def reason(problem: Problem) -> str | None:
    return unlike(
        problem, bits=(4,), groups=(16, 32, 64, 128, 256, 512), dtypes=(torch.bfloat16,), n_multiple=32, k_multiple=32
    )


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear

    works, error = TorchCpuAvx512Linear.validate_once()
    if not works:
        raise RuntimeError(f"its extension is not usable: {error}")
    layer = TorchCpuAvx512Linear(
        bits=4, group_size=weight.scheme.group_size, sym=True, desc_act=False, in_features=weight.K,
        out_features=weight.N, bias=False, register_buffers=True,
    )  # fmt: skip
    # The layer asks for GPTQ v2, whose zero points are stored as they are.
    for name, tensor in gptq.write(2, weight).items():
        getattr(layer, name).data = tensor
    layer.post_init()
    layer.eval()
    layer(torch.zeros(1, weight.K, dtype=dtype))  # it packs at its first call

    def run(buffers: torch.nn.Module, x: Tensor) -> Tensor:
        y: Tensor = buffers(x)
        return y

    return Prepared(layer, run, bytes_of(layer.qweight, layer.qzeros, layer.scales))


PEER: Peer = Peer("gptqmodel cpu", needs("gptqmodel", "gptqmodel", device="cpu"), reason, prepare)
