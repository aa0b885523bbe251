"""The ops on layout kpack as the rest of the package meets them: catalogue, fakes, gradients. No Triton needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from qkernels import QuantScheme, ops
from qkernels.errors import ArgumentError, UnsupportedProblem
from qkernels.kernels.catalogue import Problem, list_kernels
from qkernels.layouts import LAYOUTS
from qkernels.ops import backends, grouped
from tests.strategies import random_weight


def call(scheme: str, x: torch.Tensor, *, device: str = "cpu", op: Any = ops.gemm) -> torch.Tensor:
    weight = random_weight(scheme, 40, 96)
    packed = LAYOUTS["kpack"].pack(weight)
    buffers = {name: None if t is None else t.to(device) for name, t in packed.items()}
    return op("kpack", x, **buffers, in_features=96, out_features=40, scheme=weight.scheme)


def reasons(scheme: str = "w4a16_g128", dtype: torch.dtype = torch.bfloat16, arch: str = "sm90") -> str:
    rows = dict(list_kernels(Problem(64, 256, QuantScheme.parse(scheme), dtype, arch)).rows)
    return "; ".join(rows["triton.kpack"])


def test_the_catalogue_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing_triton", lambda: None)
    for scheme in ("w4a16_g128", "w3a16_g24_asym", "nf4_g64", "w8a16_channel"):
        assert not reasons(scheme)
    assert "8.0" in reasons(arch="sm75")
    assert "runs on CUDA devices" in reasons(arch="cpu")
    assert "bfloat16 or float16" in reasons(dtype=torch.float32)
    assert "8-bit activations" in reasons("w4a8_g128")
    monkeypatch.setattr(backends, "missing_triton", lambda: "Triton is not installed (pip install triton)")
    assert "not installed" in reasons()


def test_too_old_a_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "version", lambda _: "3.1.0")
    backends.missing_triton.cache_clear()
    try:
        assert "3.1.0" in (backends.missing_triton() or "")
    finally:
        backends.missing_triton.cache_clear()


def test_cpu_tensors_and_many_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedProblem, match="runs on CUDA devices"):
        call("w4a16_g32", torch.zeros(1, 96))
    with pytest.raises(ArgumentError, match="M <= 8"):
        call("w4a16_g32", torch.zeros(9, 96), op=ops.gemv)


def test_experts_refuse_cpu_tensors_and_have_fakes() -> None:
    layout = LAYOUTS["kpack"]
    stacks = []
    for N, K in ((80, 96), (96, 40)):
        weight = random_weight("w4a16_g8", N, K, experts=(3,))
        stacks.append(grouped.Stack(layout.pack(weight), None, layout.numbers_of(N, K, weight.scheme), K))
    x, ids, routing = torch.zeros(2, 96), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    offsets = torch.tensor([0, 1, 2, 2])
    with pytest.raises(UnsupportedProblem, match="experts_kpack runs on CUDA devices"):
        grouped.experts("kpack", x, ids, routing, *stacks, "silu")
    with pytest.raises(UnsupportedProblem, match="grouped_gemm_kpack runs on CUDA devices"):
        grouped.grouped_gemm("kpack", x, offsets[:2], offsets, stacks[0], torch.float32)
    on_meta = [
        s._replace(buffers={k: None if t is None else t.to("meta") for k, t in s.buffers.items()}) for s in stacks
    ]
    given = [t.to("meta") for t in (x.bfloat16(), ids, routing)]
    y = grouped.experts("kpack", *given, *on_meta, "silu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 96), torch.bfloat16, "meta")


@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "nf4_g64"])
def test_fakes_have_the_shape_and_dtype(scheme: str) -> None:
    y = call(scheme, torch.zeros(7, 96, dtype=torch.float16, device="meta"), device="meta")
    assert (y.shape, y.dtype) == ((7, 40), torch.float16)


def test_traces_into_one_graph_for_any_number_of_tokens() -> None:
    """On the meta device, where the fake runs: one compilation serves every M."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call_packed(x * 2) + 1, fullgraph=True, dynamic=True, backend=backend)
    weight = random_weight("w4a16_g32", 40, 96).to("meta")
    packed = LAYOUTS["kpack"].pack(weight)
    buffers = tuple(packed[buffer.name] for buffer in LAYOUTS["kpack"].buffers)

    def call_packed(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.qkernels.gemm_kpack(x, *buffers, None, 40, 4, 32, False, 0, 0)

    for M in (7, 5, 64):  # the first is no size of a buffer, which torch would take for the same symbol
        assert compiled(torch.zeros(M, 96, device="meta")).shape == (M, 40)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, qkernels.kernels.triton; assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
