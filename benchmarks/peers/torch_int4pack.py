"""torch's own 4-bit matmul: `_weight_int4pack_mm_for_cpu` on the CPU, `_weight_int4pack_mm` (tinygemm) on CUDA.

w = (code - 8) * scale + zero with a bf16 pair (scale, zero) a group, `[K / g, N, 2]`. Our zero point z becomes (8 - z) * scale,
which is 0 for symmetric weights and rounded to bf16 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, integer_zeros, unlike

_INNER_K_TILES = 8  # tinygemm's widest tile: K is then a multiple of 128


def reason(problem: Problem) -> str | None:
    cuda = problem.arch != "cpu"
    return unlike(
        problem, bits=(4,), groups=(32, 64, 128, 256), zeros=("none", "int"), dtypes=(torch.bfloat16,),
        n_multiple=8 if cuda else 16, k_multiple=128 if cuda else 32,
    )  # fmt: skip


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    scales = weight.scales.float()
    offsets = (8 - integer_zeros(weight)) * scales
    pairs = torch.stack([scales, offsets], -1).transpose(0, 1).to(device, torch.bfloat16).contiguous()
    group = weight.scheme.group_length(weight.K)
    if device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        codes = weight.codes.to(device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], _INNER_K_TILES)
        product = torch.ops.aten._weight_int4pack_mm

    def run(buffers: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        y: Tensor = product(x, buffers[0], group, buffers[1])
        return y

    return Prepared((packed, pairs), run, bytes_of(packed, pairs))


PEER: Peer = Peer("torch int4pack", lambda device: None, reason, prepare)
