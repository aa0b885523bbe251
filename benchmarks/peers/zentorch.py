"""zentorch, AMD's plug-in for PyTorch on EPYC: 4-bit weights in groups with 16-bit activations, and with int8 ones.

Symmetric codes, scales in bf16. Calls as in zentorch 2.13.0.2, which says nothing of them in its documentation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, bytes_of, needs, unlike


def reason(problem: Problem) -> str | None:
    return unlike(problem, bits=(4,), groups=(32, 64, 128), dtypes=(torch.bfloat16,), acts=(None, "int8"), n_multiple=8)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    import zentorch  # noqa: F401  (its ops)

    ops: Any = torch.ops.zentorch
    codes = (weight.codes.to(torch.int8) - weight.scheme.mid_code).contiguous()
    scales = weight.scales.to(torch.bfloat16).t().contiguous()
    packed = ops.zentorch_woq_repack_weight(codes)
    nbytes = bytes_of(packed, scales)
    if weight.scheme.act is None:
        return Prepared((packed.t(), scales), lambda b, x: ops.zentorch_woq_linear(x, b[0], b[1], None, None), nbytes)

    def run(buffers: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        y: Tensor = ops.zentorch_dynamic_qlinear(x, buffers[0], buffers[1], None)
        return y

    return Prepared((packed.view(torch.int8), scales), run, nbytes, activation_bits=8)


PEER: Peer = Peer("zentorch", needs("zentorch", "zentorch", device="cpu"), reason, prepare)
