"""What happens to a weight: packed for a kernel when a model is loaded, dequantized for gradients and for large M."""

from __future__ import annotations

import torch

from qkernels import ops
from qkernels.layouts import get_layout

from .conftest import synchronized


def test_pack(benchmark, spec, weight) -> None:  # type: ignore[no-untyped-def]
    packed = benchmark(lambda: get_layout(spec.layout).pack(weight))
    assert packed["qweight"].numel() > 0


def test_dequantize(benchmark, spec, weight, buffers) -> None:  # type: ignore[no-untyped-def]
    shape = {"in_features": weight.K, "out_features": weight.N, "scheme": weight.scheme, "dtype": torch.bfloat16}
    full = benchmark(synchronized(lambda: ops.dequantize(spec.layout, **buffers, **shape)))
    assert torch.equal(full.cpu(), weight.dequantize(torch.bfloat16))
