"""pytest-benchmark files: wall time of single operations, for following one change closely. `pytest benchmarks/kernels/micro`.

Weights are warm here and host time is included, so these are not the numbers of the tables: use `python -m benchmarks` for those.
QKERNELS_BENCH_SHAPE=N,K makes them smaller. `--benchmark-json FILE` keeps what `environment.describe` says of the place.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.kernels.shapes import find_layer
from benchmarks.kernels.weights import random_weight
from benchmarks.method import environment
from qkernels.kernels.catalogue import KERNELS, KernelSpec, Problem, arch_of
from qkernels.layouts import get_layout
from qkernels.scheme import QuantScheme
from qkernels.tensor import QuantTensor

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
SCHEMES = ("w4a16_g128", "w8a16_channel", "w4a8_g128", "w8a8_channel")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(environment.describe(DEVICE))


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    commit_info.clear()  # the place has the commit; the folder and branch that it was checked out in say nothing


def shape() -> tuple[int, int]:
    """N, K"""
    given = os.environ.get("QKERNELS_BENCH_SHAPE")
    layer = find_layer("llama-3-8b", "o")
    return tuple(map(int, given.split(","))) if given else (layer.N, layer.K)  # type: ignore[return-value]


@pytest.fixture(params=SCHEMES)
def weight(request: pytest.FixtureRequest) -> QuantTensor:
    return random_weight(*shape(), QuantScheme.parse(request.param), torch.bfloat16)


@pytest.fixture(params=KERNELS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest, weight: QuantTensor) -> KernelSpec:
    found: KernelSpec = request.param
    if reasons := found.reasons(Problem(weight.N, weight.K, weight.scheme, torch.bfloat16, arch_of(DEVICE))):
        pytest.skip("; ".join(reasons))
    return found


@pytest.fixture
def buffers(spec: KernelSpec, weight: QuantTensor) -> dict[str, torch.Tensor | None]:
    return {name: None if t is None else t.to(DEVICE) for name, t in get_layout(spec.layout).pack(weight).items()}


def synchronized(call):  # type: ignore[no-untyped-def]
    """`call`, waited for on CUDA."""

    def run():  # type: ignore[no-untyped-def]
        result = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return run
