"""`ops.gemm` of every layout that this device has."""

from __future__ import annotations

import pytest
import torch

from qkernels import ops

from .conftest import DEVICE, synchronized


@pytest.mark.parametrize("M", [1, 16, 128])
def test_gemm(benchmark, spec, weight, buffers, M) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(M, weight.K).to(DEVICE, torch.bfloat16)
    shape = {"in_features": weight.K, "out_features": weight.N, "scheme": weight.scheme}
    with torch.inference_mode():
        y = benchmark(synchronized(lambda: ops.gemm(spec.layout, x, **buffers, **shape)))
    assert y.shape == (M, weight.N)
