"""`ops.gemv` of every layout that this device has."""

from __future__ import annotations

import pytest
import torch

from qkernels import ops
from qkernels.layouts import get_layout

from .conftest import DEVICE, synchronized


@pytest.mark.parametrize("M", [1, 4, 8])
def test_gemv(benchmark, spec, weight, buffers, M) -> None:  # type: ignore[no-untyped-def]
    if (get_layout(spec.layout).gemv_tokens or 0) < M:
        pytest.skip(f"gemv of {spec.layout} does not take M={M}")
    x = torch.randn(M, weight.K).to(DEVICE, torch.bfloat16)
    shape = {"in_features": weight.K, "out_features": weight.N, "scheme": weight.scheme}
    with torch.inference_mode():
        y = benchmark(synchronized(lambda: ops.gemv(spec.layout, x, **buffers, **shape)))
    assert y.shape == (M, weight.N)
