"""Experts in ggml's hands: what their bytes mean, the graph of whichever library is there, and the wrong one refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import experts
from benchmarks.peers import ggml, ggml_experts
from qkernels.errors import UnsupportedProblem
from qkernels.ops.grouped import activate
from qkernels.tensor import QuantTensor

CPU = torch.device("cpu")
needs_ggml = pytest.mark.skipif(ggml.available(CPU) is not None, reason=f"SKIPPED: ggml {ggml.available(CPU)}")
HIDDEN, WIDTH, EXPERTS = 256, 128, 6


def random_experts() -> list[tuple[QuantTensor, QuantTensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (experts.random_expert(2 * WIDTH, HIDDEN, generator), experts.random_expert(HIDDEN, WIDTH, generator))
        for _ in range(EXPERTS)
    ]


def exact(weights: list[tuple[QuantTensor, QuantTensor]], x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
    y = torch.zeros(x.shape)
    for t, row in enumerate(x.float()):
        for e, share in zip(ids[t].tolist(), routing[t].float(), strict=True):
            gate_up, down = (weight.dequantize(torch.float32) for weight in weights[e])
            y[t] += share * (activate("silu", row @ gate_up.T) @ down.T)
    return y


def test_q4_0_holds_the_codes_exactly() -> None:
    weight = random_experts()[0][0]
    rows = ggml_experts.q4_0(weight)
    assert rows.shape == (2 * WIDTH, HIDDEN // 32, 18)
    meant = ggml.meaning(ggml.Q4_0, rows, weight.N, weight.K)
    assert torch.equal(meant, weight.dequantize(torch.float32))


@needs_ggml
@pytest.mark.parametrize("repack", [True, False], ids=["repack", "rows"])
def test_a_block_of_experts_is_their_products(repack: bool) -> None:
    """8-bit activations: off by 0.01 of the norm; gate and up exchanged, or routing left out, by more than half of it."""
    weights = random_experts()
    try:
        block = ggml_experts.Block(weights, repack)
    except UnsupportedProblem as error:
        pytest.skip(f"SKIPPED: {error}")
    generator = torch.Generator().manual_seed(4)
    for T, k in ((1, 2), (5, 3)):
        x, ids, routing = experts.route(T, k, EXPERTS, HIDDEN, False, generator)
        expected = exact(weights, x, ids, routing)
        assert (block(x, ids, routing) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(("held", "asked"), [(True, "ggml"), (False, "ik")])
def test_the_other_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, held: bool, asked: str) -> None:
    monkeypatch.setattr(ggml, "available", lambda device: None)
    monkeypatch.setattr(ggml, "is_ik", lambda: held)
    assert "QKERNELS_GGML_LIB" in (experts.not_held(asked) or "")
    assert experts.not_held("ik" if held else "ggml") is None


def test_a_library_that_does_not_load_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("QKERNELS_GGML_LIB", str(tmp_path))
    ggml.library.cache_clear()
    try:
        with pytest.raises(SystemExit, match="ik: failed: OSError"):
            experts.main(["--against", "ik"])
    finally:
        ggml.library.cache_clear()
