"""The ggml adapter: what its bytes mean, and the real library where there is one."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.kernels.checking import mismatch
from benchmarks.kernels.weights import random_weight
from benchmarks.peers import ggml
from qkernels.kernels.catalogue import Problem
from qkernels.scheme import QuantScheme

CPU = torch.device("cpu")
needs_ggml = pytest.mark.skipif(ggml.available(CPU) is not None, reason=f"SKIPPED: ggml {ggml.available(CPU)}")


def test_a_q4_0_block_means_what_the_format_says() -> None:
    codes = torch.arange(32) % 16
    packed = (codes[:16] | codes[16:] << 4).to(torch.uint8)
    block = torch.cat([torch.tensor([0.5], dtype=torch.float16).view(torch.uint8), packed])
    assert torch.equal(ggml.meaning(ggml.Q4_0, block, 1, 32), ((codes - 8) * 0.5)[None].float())


def test_a_q4_k_block_means_what_the_format_says() -> None:
    """6-bit factors 1, 9, … 57 and minima 2, 10, … 58: the last four of each have bits in both halves of the 12 bytes."""
    factors, minima = torch.arange(8) * 8 + 1, torch.arange(8) * 8 + 2
    low, middle = factors[:4] | (factors[4:] >> 4) << 6, minima[:4] | (minima[4:] >> 4) << 6
    high = (factors[4:] & 15) | (minima[4:] & 15) << 4
    codes = torch.arange(256).view(8, 32) * 7 % 16
    nibbles = torch.cat([codes[i] | codes[i + 1] << 4 for i in range(0, 8, 2)])
    scales = torch.tensor([0.5, 0.25], dtype=torch.float16).view(torch.uint8)
    block = torch.cat([scales, torch.cat([low, middle, high, nibbles]).to(torch.uint8)])
    expected = codes * factors[:, None] * 0.5 - minima[:, None] * 0.25
    assert torch.equal(ggml.meaning(ggml.Q4_K, block, 1, 256), expected.view(1, 256).float())


def test_problems_it_does_not_take() -> None:
    problem = Problem(64, 96, QuantScheme.parse("w4a16_g32"), torch.bfloat16)
    assert ggml.PEER_Q4_0.reason(problem) is None
    assert "K % 256" in (ggml.PEER_Q4_K.reason(problem) or "")
    eight = Problem(64, 256, QuantScheme.parse("w8a16_channel"), torch.bfloat16)
    assert "4 bits" in (ggml.PEER_Q4_0.reason(eight) or "")


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("QKERNELS_GGML_LIB", str(tmp_path))
    ggml.library.cache_clear()
    try:
        assert "failed: OSError" in (ggml.available(CPU) or "")
    finally:
        ggml.library.cache_clear()


@needs_ggml
@pytest.mark.parametrize("peer", [ggml.PEER_Q4_0, ggml.PEER_Q4_K], ids=lambda peer: peer.name)
def test_its_products_match_what_its_bytes_mean(peer: object) -> None:
    weight = random_weight(64, 512, QuantScheme.parse("w4a16_g32"), torch.bfloat16)
    made = peer.prepare(weight, torch.bfloat16, CPU)  # type: ignore[attr-defined]
    assert made.weight is not None
    for M in (1, 3, 4, 33):
        x = torch.randn(M, 512).bfloat16()
        for buffers in (made.buffers, copy.deepcopy(made.buffers)):
            y = made.run(buffers, x)
            assert mismatch(y, x, made.weight, 8) is None
            assert mismatch(y.flip(1), x, made.weight, 8) is not None
