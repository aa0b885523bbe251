"""Every instruction set that this CPU has; the others are skipped by name."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from qkernels import extension

ISAS = {
    "x86_64": ("scalar", "avx2", "avx512", "avx512_bf16"),
    "aarch64": ("scalar", "neon", "neon_dotprod", "neon_i8mm", "neon_bf16"),
}.get(platform.machine(), ("scalar",))
BF16_ISAS = ("avx512_bf16", "neon_bf16")  # whose products of bf16 activations are of bf16


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    status = extension.status()
    if not status.loaded:
        pytest.skip(f"the extension is not loaded: {status.error}")
    if request.param not in status.isas:
        pytest.skip(f"this CPU has no {request.param}")
    assert status.isa is not None
    extension.use_isa(request.param)
    yield request.param
    extension.use_isa(status.isa)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialized tensors, those of C++ included, hold NaN and 255 instead of what happened to be there."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
