"""Quantizing activations to 8 bits, which A8 kernels do inside `ops.gemm`, so that it has no time of its own.

Timed is the product with a weight of 4 tiles. A product with twice the rows takes the same quantization and twice the rest, so
`quantize_us` among the extra figures, twice the one time less the other, is what quantizing takes together with the call itself.
Even a weight of one tile would leave a third of the time to the product (2 cores of a Zen 5, M=128, K=4096: 33 of 52 µs).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.weights import random_weight
from benchmarks.method.statistics import median_interval
from benchmarks.method.timing import WallClock, interleaved
from qkernels import ops
from qkernels.kernels.catalogue import KERNELS, Problem, arch_of
from qkernels.layouts import get_layout
from qkernels.scheme import QuantScheme

from .conftest import DEVICE, shape, synchronized

ROWS, ROUNDS = 128, 25


def product(layout: str, scheme: QuantScheme, N: int, x: Tensor) -> Callable[[], Tensor]:
    """y of a random weight of N rows, waited for."""
    weight = random_weight(N, x.shape[1], scheme, torch.bfloat16)
    buffers: dict[str, Any] = {
        n: None if t is None else t.to(DEVICE) for n, t in get_layout(layout).pack(weight).items()
    }
    call = partial(ops.gemm, layout, x, **buffers, in_features=x.shape[1], out_features=N, scheme=scheme)
    return synchronized(call)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["w4a8_g32", "w8a8_channel"])
@pytest.mark.parametrize("M", [1, 16, 128])
def test_quantize_activations(benchmark, scheme, M) -> None:  # type: ignore[no-untyped-def]
    K = shape()[1]
    problem = Problem(ROWS, K, QuantScheme.parse(scheme), torch.bfloat16, arch_of(DEVICE))
    against = {spec.name: spec.reasons(problem) for spec in KERNELS}
    able = [spec for spec in KERNELS if not against[spec.name]]
    if not able:
        pytest.skip(f"no kernel quantizes activations here: {against}")
    x = torch.randn(M, K).to(DEVICE, torch.bfloat16)
    with torch.inference_mode():
        calls = {N: product(able[0].layout, problem.scheme, N, x) for N in (ROWS, 2 * ROWS)}
        samples = interleaved({str(N): WallClock(1e-3).prepare([call]) for N, call in calls.items()}, ROUNDS)
        extra = [2 * one - two for one, two in zip(samples[str(ROWS)], samples[str(2 * ROWS)], strict=True)]
        found = median_interval(extra)
        benchmark.extra_info["quantize_us"] = [round(1e6 * s, 2) for s in (found.median, found.low, found.high)]
        y = benchmark(calls[ROWS])
    assert y.shape == (M, ROWS)
