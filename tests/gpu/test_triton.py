"""On a GPU: the ops on layout kpack end to end, with the Triton kernels behind them. `tests/triton` is for machines
without one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton", reason="Triton is not installed")

from qkernels import QuantLinear, QuantTensor
from qkernels.layouts import LAYOUTS
from tests.ops.helpers import arguments, dequantize_arguments, exact_product, integers
from tests.strategies import random_weight
from tests.triton.problems import a_block_of_experts, exact_stack

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
schemes = pytest.mark.parametrize(
    "scheme",
    ["w2a16_g32", "w3a16_g24_asym", "w4a16_g16_asym", "w4a16_g128", "w4a16_g64_fzero", "w4a16_g128_offset",
     "w4a16_channel", "w5a16_g32", "w6a16_g64_asym", "w7a16_g16", "w8a16_g64_asym", "w8a16_channel"],
)  # fmt: skip
# Around every tile of tokens of the shipped tables.
TOKENS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300]


def on_gpu(weight: QuantTensor, x: Tensor, bias: Tensor | None = None) -> list[Any]:
    made = arguments(weight, x, bias, layout="kpack")
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in made]


def run(weight: QuantTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.qkernels.gemm_kpack(*on_gpu(weight, x, bias)).cpu()  # type: ignore[no-any-return]


@schemes
@dtypes
def test_products_are_exact_for_every_number_of_tokens(scheme: str, dtype: torch.dtype) -> None:
    weight = random_weight(scheme, 131, 520, exact=True)
    for M in TOKENS:
        x, bias = integers(M, 520, dtype=dtype, most=1), integers(131, dtype=dtype)
        assert torch.equal(run(weight, x, bias), exact_product(weight, x, bias)), M


@dtypes
@pytest.mark.parametrize("scheme", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_super_blocks(scheme: str, dtype: torch.dtype) -> None:
    """Scales that are products, over codes in planes."""
    weight = random_weight(scheme, 131, 520, exact=True)
    for M in TOKENS:
        x = integers(M, 520, dtype=dtype, most=1)
        assert torch.equal(run(weight, x), exact_product(weight, x)), M


@dtypes
def test_codebooks(dtype: torch.dtype) -> None:
    """One product a sum, of the table's entry rounded once."""
    weight = random_weight("nf4_g64", 131, 520, exact=True)
    for M in TOKENS:
        x = torch.eye(520, dtype=dtype)[:M]
        assert torch.equal(run(weight, x), weight.dequantize(dtype).T[:M]), M


@dtypes
def test_act_order_odd_columns_and_strides(dtype: torch.dtype) -> None:
    weight = random_weight("w4a16_g32_asym", 67, 333, act_order=True, exact=True)
    _, *rest = on_gpu(weight, torch.zeros(1, 333, dtype=dtype))
    for M in TOKENS:
        x = integers(M, 333, dtype=dtype, most=2)
        room = torch.full((2 * M + 1, 3 * 333), float("nan"), dtype=dtype, device=DEVICE)
        view = room[1::2, 5:338]
        view.copy_(x)
        assert torch.equal(torch.ops.qkernels.gemm_kpack(view, *rest).cpu(), exact_product(weight, x)), M


def test_large_layers_split_over_the_whole_card_the_same_way_each_time() -> None:
    weight = random_weight("w4a16_g128_asym", 4096, 4096)
    for M in (1, 16, 64, 512):
        args = on_gpu(weight, torch.randn(M, 4096).bfloat16())
        first = torch.ops.qkernels.gemm_kpack(*args)
        assert torch.isfinite(first).all()
        for _ in range(20):
            assert torch.equal(torch.ops.qkernels.gemm_kpack(*args), first), M


@schemes
def test_dequantize_is_the_definition_bit_for_bit(scheme: str) -> None:
    weight = random_weight(scheme, 150, 200, act_order=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = dequantize_arguments(weight, dtype, "kpack")
        got = torch.ops.qkernels.dequantize_kpack(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in given))
        assert torch.equal(got.cpu(), weight.dequantize(dtype))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    weight = random_weight("w4a16_g32_asym", 40, 96, act_order=True, exact=True)
    for op, M in ((torch.ops.qkernels.gemm_kpack, 5), (torch.ops.qkernels.gemv_kpack, 1)):
        x, *rest = on_gpu(weight, integers(M, 96, dtype=torch.float16))
        result = opcheck(op.default, (x.requires_grad_(grad), *rest))
        assert set(result.values()) == {"SUCCESS"}, result


def test_compiled_code_serves_every_number_of_tokens() -> None:
    weight = random_weight("w4a16_g128", 256, 256, exact=True)
    _, *rest = on_gpu(weight, torch.zeros(1, 256).bfloat16())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.ops.qkernels.gemm_kpack(x, *rest), fullgraph=True, dynamic=True)
    for M in (5, 1, 8, 64, 300):
        x = integers(M, 256, dtype=torch.bfloat16, most=1)
        assert torch.equal(compiled(x.to(DEVICE)).cpu(), exact_product(weight, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("M", [1, 16, 64, 2048])
def test_the_first_call_of_a_shape_takes_less_than_two_seconds(
    M: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilation, loading and launch; Triton itself is there already."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run(random_weight("w4a16_g64", 64, 64), torch.zeros(1, 64).half())  # the driver
    weight = random_weight("w8a16_g128_asym", 4096, 1024, seed=M)
    args = on_gpu(weight, torch.randn(M, 1024).bfloat16())
    torch.cuda.synchronize()
    begin = time.perf_counter()
    torch.ops.qkernels.gemm_kpack(*args)
    torch.cuda.synchronize()
    assert time.perf_counter() - begin < 2


def test_blocks_of_experts() -> None:
    """Both paths against the plain block on the CPU, in a graph too: no host read."""
    up, x, *of_up = exact_stack("w4a16_g128_asym", 16, 1536, 512, 300, torch.bfloat16)
    down, _, *of_down = exact_stack("w8a16_channel", 16, 520, 768, 1, torch.bfloat16)
    layout = LAYOUTS["kpack"]
    weights = [a.to(DEVICE) if isinstance(a, Tensor) else a for s in (up, down) for a in s.arguments(layout)]
    for T in (1, 3, 4, 40, 300):
        ids = torch.stack([torch.randperm(18)[:4] for _ in range(T)])
        routing = torch.rand(T, 4)
        given = [t.to(DEVICE) for t in (x[:T] / 16, ids, routing)]
        got = torch.ops.qkernels.experts_kpack(*given, *weights, 0, 0.0, 0.0)
        truth, size = a_block_of_experts(
            x[:T] / 16, ids, routing, (of_up[0], of_up[1]), (of_down[0], of_down[1]), "silu"
        )
        assert bool(
            ((got.cpu().double() - truth).abs() <= 2.01 * 2**-8 * size + 2**-8 * truth.abs() + 1e-5 * size).all()
        )
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = torch.ops.qkernels.experts_kpack(*given, *weights, 0, 0.0, 0.0)
        captured.replay()
        assert torch.equal(y, got)


def test_k_quants_need_no_reference() -> None:
    layer = QuantLinear.from_quant_tensor(random_weight("q4_k", 128, 256), device=DEVICE, dtype=torch.bfloat16)
    assert layer.layout == "kpack"
    assert torch.isfinite(layer(torch.randn(3, 256, device=DEVICE, dtype=torch.bfloat16))).all()
