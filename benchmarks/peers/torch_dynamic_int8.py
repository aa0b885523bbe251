"""torch's dynamic int8 linear (x86 engine): int8 weights with one scale a row, fp32 activations quantized per tensor to 8 bits.

It changes the numerics (W8A8): set against 8-bit weights with 16-bit activations it is faster for computing less exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, unlike


def available(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "runs on cpu only"
    if torch.backends.quantized.engine not in ("x86", "onednn", "fbgemm"):
        return f"torch's quantized engine here is {torch.backends.quantized.engine!r}"
    return None


def reason(problem: Problem) -> str | None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return unlike(problem, bits=(8,), groups=("channel",), dtypes=dtypes, acts=(None, "int8"))


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    codes = weight.codes.short() - 128
    scales = weight.scales[:, 0].double()
    quantized = torch._make_per_channel_quantized_tensor(
        codes.to(torch.int8), scales, torch.zeros(weight.N, dtype=torch.int64), 0
    )
    packed = torch.ops.quantized.linear_prepack(quantized, None)

    def run(buffers: object, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic(x.float(), buffers)
        return y.to(x.dtype)

    nbytes = bytes_of(codes) // 2 + 4 * weight.N
    return Prepared(packed, run, nbytes, activation_bits=8, note="quantizes activations to 8 bits")


PEER: Peer = Peer("torch dynamic int8", available, reason, prepare)
