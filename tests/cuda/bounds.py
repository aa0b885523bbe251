"""How far the CUDA kernels may be from float64, and the kinds of zero that each test of them goes through."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import QuantTensor
from tests.ops.helpers import magnitudes

ZEROS = ["", "_asym", "_fzero", "_offset"]


def bound(weight: QuantTensor, x: Tensor, splits: int, warps_k: int) -> Tensor:
    """float64 [M, N]: the largest error, with u = 2^-24, and 2 u per addition inside a tensor core, which may truncate.

    Code - zero is exact and the products are, too. One term meets at most 64 additions in the partial sum of its 64 columns (2 u
    each), 1 fused multiply-add with the scale per partial sum (2 K / 64 of them where zeros are floating; four times as many
    for short groups), warps_k + splits + 1 additions where parts and bias meet; `rest` and its sum of x meet 130 more, and the
    reference rounds twice. Then the output is rounded once.
    """
    parts = -(-weight.K // 64) * (4 if weight.scheme.group_length(weight.K) < 64 else 1)
    floating = weight.scheme.zeros in ("float", "offset")
    c = 128 + parts * (2 if floating else 1) + warps_k + splits + 1 + (130 if floating else 0) + 2
    error = c * 2.0**-24 * (x.double().abs() @ magnitudes(weight).T)
    y = (x.double() @ weight.dequantize().double().T).abs() + error
    smallest = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}[x.dtype]
    return error + torch.finfo(x.dtype).eps / 2 * y + smallest
