"""On a GPU: stacked experts on the CUDA kernels. `tests/cuda/test_experts.py` emulates what is done for real here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qkernels import extension
from qkernels.layouts import LAYOUTS
from qkernels.ops.grouped import Stack
from tests.cuda.calls import PATHS
from tests.triton.problems import a_block_of_experts, exact_stack, product_by_expert, rows_by_expert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not extension.status().cuda, reason="the extension has no CUDA kernels"),
]
DEVICE, LAYOUT = "cuda", "mma_tile"
BRAIN, HALF = torch.bfloat16, torch.float16


def on_gpu(stack: Stack) -> list[object]:
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in stack.arguments(LAYOUTS[LAYOUT])]


@pytest.mark.parametrize("counts", [[0] * 5, [3, 0, 9, 0, 1], [0, 0, 300, 0, 0], [40, 64, 0, 31, 500]], ids=str)
@pytest.mark.parametrize(
    "scheme", ["w4a16_g128_asym", "w4a16_g32", "w8a16_g64_fzero", "w8a16_tensor", "w4a16_g16_offset"]
)
def test_rows_are_exact(scheme: str, counts: list[int]) -> None:
    for dtype in (BRAIN, HALF):
        stack, x, weights, bias = exact_stack(scheme, 5, 200, 520, 90, dtype, name=LAYOUT)
        rows, offsets = rows_by_expert(counts, 90)
        given = [t.to(DEVICE) for t in (x, rows, offsets)]
        got = torch.ops.qkernels.grouped_gemm_mma_tile(*given, *on_gpu(stack), dtype).cpu()
        # On wgmma, which sm_90 has for many rows, weights with floating zeros are rounded to x's type.
        seen = (weights, weights.to(dtype).double())
        assert any(torch.equal(got, product_by_expert(x, rows, offsets, w, bias).to(dtype)) for w in seen)


@pytest.mark.parametrize("tokens", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("scheme", ["w4a16_g128_asym", "w4a16_g32", "w8a16_g64", "w8a16_tensor"])
def test_rows_on_wgmma_are_exact(scheme: str, tokens: int) -> None:
    """Every tile, whatever would be chosen: blocks that are full and that are not, more columns than a ring."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is sm_90a's alone")
    if tokens == 16 and scheme == "w4a16_g32":
        pytest.skip("no tile of 16 tokens scales fragments")
    for dtype, K in ((BRAIN, 520), (HALF, 2056)):
        stack, x, weights, bias = exact_stack(scheme, 5, 200, K, 90, dtype, name=LAYOUT)
        rows, offsets = rows_by_expert([40, tokens, 0, 2 * tokens + 1, 3], 90)
        given = [t.to(DEVICE) for t in (x, rows, offsets)]
        forced = torch.ops.qkernels_forced.grouped_gemm
        got = forced(*given, *on_gpu(stack), dtype, PATHS["gemm_sm90"], tokens)
        assert torch.equal(got.cpu(), product_by_expert(x, rows, offsets, weights, bias).to(dtype))


def test_blocks_of_experts() -> None:
    """All ways against the plain block on the CPU, in a graph too: no host read; and the same bits every time. On Hopper the last
    activates gate and up in their product's blocks."""
    up, x, *of_up = exact_stack("w4a16_g128_asym", 16, 1536, 512, 600, BRAIN, name=LAYOUT)
    down, _, *of_down = exact_stack("w8a16_channel", 16, 520, 768, 1, BRAIN, name=LAYOUT)
    weights = [*on_gpu(up), *on_gpu(down)]
    for T in (0, 1, 2, 4, 40, 300, 600):
        ids = torch.stack([torch.randperm(18)[:4] for _ in range(T)]) if T else torch.zeros(0, 4, dtype=torch.int64)
        routing = torch.rand(T, 4)
        given = [t.to(DEVICE) for t in (x[:T] / 16, ids, routing)]
        got = torch.ops.qkernels.experts_mma_tile(*given, *weights, 0, 0.0, 0.0)
        truth, size = a_block_of_experts(
            x[:T] / 16, ids, routing, (of_up[0], of_up[1]), (of_down[0], of_down[1]), "silu"
        )
        assert bool(((got.cpu().double() - truth).abs() <= (2.01 * 2**-8 + 1e-5) * size + 2**-8 * truth.abs()).all())
        if T == 0:
            continue
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = torch.ops.qkernels.experts_mma_tile(*given, *weights, 0, 0.0, 0.0)
        captured.replay()
        assert torch.equal(y, got)
        assert torch.equal(
            torch.ops.qkernels.experts_mma_tile(given[0], given[1].int(), given[2], *weights, 0, 0.0, 0.0), got
        )


def test_the_ops_pass_opcheck() -> None:
    up, x, *_ = exact_stack("w4a16_g64", 6, 128, 64, 9, HALF, name=LAYOUT)
    down, *_ = exact_stack("w4a16_g32", 6, 64, 64, 1, HALF, name=LAYOUT)
    rows, offsets = (t.to(DEVICE) for t in rows_by_expert([1, 0, 4, 0, 2, 2], 9))
    given = (x.to(DEVICE), rows, offsets, *on_gpu(up), HALF)
    assert set(opcheck(torch.ops.qkernels.grouped_gemm_mma_tile.default, given).values()) == {"SUCCESS"}
    ids, routing = torch.randint(6, (9, 2), device=DEVICE), torch.rand(9, 2, device=DEVICE)
    block = (x.to(DEVICE), ids, routing, *on_gpu(up), *on_gpu(down), 0, 0.0, 0.0)
    assert set(opcheck(torch.ops.qkernels.experts_mma_tile.default, block).values()) == {"SUCCESS"}
