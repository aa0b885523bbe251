"""The bound on rounding errors of the CPU kernels on random inputs, against float64, and how it is derived.

With u = 2^-24, one y[m, n] is computed in fp32 as follows. Columns are summed in runs of at most 128 (`kRun`), each run's sum is
scaled and added to the total; floating zeros add rest * sum(x) per group, then comes the bias. A term meets at most

    n          roundings inside its run (a fused multiply-add rounds once; the scalar code rounds product and sum: n + 1;
               aarch64's bfdot the sum of each two products, and adding that, to odd and so by up to 2 u: n + 1 where n is odd)
    1          for the scale (0 if fused)
    R          additions into the total, R = number of runs
    G          more where zeros are floating, and 2 for rest
    L/16 + 5   in the sum of x over a group of L columns, where zeros are floating
    1          bias
    2          in `dequantize`, which is the reference and rounds code - zero and the product

Where scales are products, sums of the groups of a span meet the small factors and the outer one when the span ends: G is then at
least groups of a span + spans - 1. With offsets, codes are multiplied as they are stored, which are no larger than the two terms
|code - mid| + mid that T has for them.

so that |y32 - y| <= c u T with c the sum of these and T the sum of the magnitudes of all terms (`helpers.magnitudes`). The
output is then rounded once to its dtype: u_out |y32|, or half a subnormal step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels import QuantTensor
from tests.ops.helpers import magnitudes, multiply

RUN = 128
HALF_STEP = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}  # of subnormal outputs


def bound(weight: QuantTensor, x: Tensor, bias: Tensor) -> Tensor:
    """float64 [M, N]: the largest error of y that the derivation above allows."""
    length = min(weight.scheme.group_length(weight.K), weight.K)
    runs = weight.G * -(-length // RUN)
    c = (min(length, RUN) + 1) + 1 + runs + 1 + 2
    if weight.scheme.zeros in ("float", "offset"):
        c += weight.G + 2 + -(-length // 16) + 5
    if weight.factors is not None:
        c += 3  # of the sums of spans, and of those of offsets, one more than groups; the product of offsets
    terms = x.double().abs() @ magnitudes(weight).T + bias.double().abs()
    error = c * 2.0**-24 * terms
    y = (x.double() @ weight.dequantize().double().T + bias.double()).abs() + error
    return error + torch.finfo(x.dtype).eps / 2 * y + HALF_STEP[x.dtype]


def errors(weight: QuantTensor, x: Tensor, bias: Tensor) -> Tensor:
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    return (multiply(weight, x, bias).double() - exact).abs()


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
