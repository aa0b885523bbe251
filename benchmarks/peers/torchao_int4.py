"""torchao's weight-only int4 through `quantize_`: tinygemm on CUDA, its opaque CPU layout here.

torchao rounds the weight itself (the dequantized one, in groups of the same length), so that its output is compared with what its
own codes mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, needs, unlike


def reason(problem: Problem) -> str | None:
    return unlike(
        problem, bits=(4,), groups=(32, 64, 128, 256), dtypes=(torch.bfloat16,), n_multiple=32, k_multiple=128
    )


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    group = weight.scheme.group_length(weight.K)
    layer = nn.Linear(weight.K, weight.N, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.dequantize(dtype).to(device), requires_grad=False)
    if device.type == "cpu":  # the CPU's packing lives among the prototypes (torchao 0.18)
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=group)
    else:
        config = Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    quantize_(layer, config)
    # An identity matrix reads the weight back: columns of y are rows of W, and products with 1 are exact.
    with torch.no_grad():
        means = layer(torch.eye(weight.K, dtype=dtype, device=device)).T.float().contiguous()

    def run(buffers: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = buffers(x)
        return y

    nbytes = weight.N * weight.K // 2 + 4 * weight.N * (weight.K // group)
    return Prepared(layer, run, nbytes, weight=means, note="rounds the weight itself")


PEER: Peer = Peer("torchao int4", needs("torchao", "torchao"), reason, prepare)
