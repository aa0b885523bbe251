"""Quantizing activations to 8 bits, which A8 kernels do inside `ops.gemm`: a weight of one tile leaves little else to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernels import random_weight
from qkernels import ops
from qkernels.kernels.catalogue import KERNELS, Problem, arch_of
from qkernels.layouts import get_layout
from qkernels.scheme import QuantScheme

from .conftest import DEVICE, shape, synchronized

ROWS = 32


@pytest.mark.parametrize("scheme", ["w4a8_g32", "w8a8_channel"])
@pytest.mark.parametrize("M", [1, 16, 128])
def test_quantize_activations(benchmark, scheme, M) -> None:  # type: ignore[no-untyped-def]
    K = shape()[1]
    problem = Problem(ROWS, K, QuantScheme.parse(scheme), torch.bfloat16, arch_of(DEVICE))
    against = {spec.name: spec.reasons(problem) for spec in KERNELS}
    able = [spec for spec in KERNELS if not against[spec.name]]
    if not able:
        pytest.skip(f"no kernel quantizes activations here: {against}")
    weight = random_weight(ROWS, K, problem.scheme, torch.bfloat16)
    packed = get_layout(able[0].layout).pack(weight).items()
    buffers: dict[str, Any] = {n: None if t is None else t.to(DEVICE) for n, t in packed}
    x = torch.randn(M, K).to(DEVICE, torch.bfloat16)
    with torch.inference_mode():
        y = benchmark(
            synchronized(
                lambda: ops.gemm(able[0].layout, x, **buffers, in_features=K, out_features=ROWS, scheme=weight.scheme)
            )
        )
    assert y.shape == (M, ROWS)
