"""The ops on layout kpack with the Triton kernels behind them, in Triton's interpreter: opcheck, gradients, torch.compile.

`test_interpreted.py` runs this file. The ops' CPU implementation, which only says that they need CUDA, is replaced by the
launcher, which takes CPU tensors for the interpreter's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library, opcheck

from qkernels import ops
from qkernels.kernels.triton import grouped_launch, launch
from qkernels.layouts import LAYOUTS
from qkernels.nn import QuantExperts
from qkernels.nn.experts import QuantStack
from qkernels.ops import grouped
from tests.moe_models import tiny_moe
from tests.ops.helpers import arguments, dequantize_arguments, integers
from tests.strategies import random_weight

from .interpreter import repair
from .problems import exact_stack, product_by_expert, rows_by_expert

repair()

N, K = 40, 96
HALF = torch.float16
schemes = pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a16_channel", "w3a16_g24_offset", "nf4_g64"])


@pytest.fixture(scope="module", autouse=True)
def launcher_behind_the_ops() -> Iterator[None]:
    library = Library("qkernels", "IMPL")
    library.impl("gemm_kpack", launch.gemm, "CPU", allow_override=True)
    library.impl("gemv_kpack", launch.gemm, "CPU", allow_override=True)
    library.impl("dequantize_kpack", launch.dequantize, "CPU", allow_override=True)
    library.impl("grouped_gemm_kpack", grouped_launch.grouped_gemm, "CPU", allow_override=True)
    library.impl("experts_kpack", grouped_launch.experts, "CPU", allow_override=True)
    yield
    library._destroy()


@schemes
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(scheme: str, grad: bool) -> None:
    weight = random_weight(scheme, N, K, act_order=grad, exact=True)
    for op, M in ((torch.ops.qkernels.gemm_kpack, 5), (torch.ops.qkernels.gemv_kpack, 1)):
        bias = integers(N, dtype=HALF).requires_grad_(grad)
        args = arguments(weight, integers(M, K, dtype=HALF).requires_grad_(grad), bias, "kpack")
        result = opcheck(op.default, args)
        assert set(result.values()) == {"SUCCESS"}, result


@schemes
def test_opcheck_of_dequantize(scheme: str) -> None:
    weight = random_weight(scheme, N, K, act_order=True)
    args = dequantize_arguments(weight, torch.bfloat16, "kpack")
    assert set(opcheck(torch.ops.qkernels.dequantize_kpack.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("M", [5, 600])  # a tile, and slices of a dequantized weight
def test_gradients_are_those_of_the_plain_product(M: int) -> None:
    weight = random_weight("w4a16_g32_asym", N, K, act_order=True, exact=True)
    x, bias = integers(M, K, dtype=HALF).requires_grad_(), integers(N, dtype=HALF).requires_grad_()
    dy = integers(M, N, dtype=HALF)
    torch.ops.qkernels.gemm_kpack(*arguments(weight, x, bias, "kpack")).backward(dy)
    assert torch.equal(x.grad, (dy.double() @ weight.dequantize().double()).half())  # type: ignore[arg-type]
    assert torch.equal(bias.grad, dy.sum(0))  # type: ignore[arg-type]


def compile_and_count(
    run: Callable[[Tensor], Tensor], tokens: tuple[int, ...], dynamic: bool | None, grad: bool
) -> list[int]:
    """How many graphs there are after each number of tokens; each result equals the one without compilation."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    counts = []
    for M in tokens:
        x = integers(M, K, dtype=HALF).requires_grad_(grad)
        assert torch.equal(compiled(x), run(x))
        counts.append(len(graphs))
    torch._dynamo.reset()
    return counts


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_no_number_of_tokens_compiles_again(grad: bool) -> None:
    """torch's default (dynamic=None) takes the first number as fixed, makes a second graph, and stays with it. One token is its
    own graph: torch never makes a size of 1 dynamic."""
    weight = random_weight("w4a16_g32_asym", N, K, exact=True)
    scheme, packed = weight.scheme, LAYOUTS["kpack"].pack(weight)

    def run(x: Tensor) -> Tensor:
        return ops.gemm("kpack", x * 2, **packed, in_features=K, out_features=N, scheme=scheme) + 1  # type: ignore[arg-type]

    assert compile_and_count(run, (5, 7, 64, 8, 17, 33), True, grad) == [1, 1, 1, 1, 1, 1]
    assert compile_and_count(run, (5, 7, 64, 8, 17, 33, 1, 1, 9), None, grad) == [1, 2, 2, 2, 2, 2, 3, 3, 3]


def test_a_graph_for_each_number_of_tokens_would_be_counted() -> None:
    """Control: static shapes."""
    run = torch.nn.Linear(K, N, dtype=torch.float16)
    assert compile_and_count(run, (5, 7, 64), False, False) == [1, 2, 3]


def test_opcheck_of_grouped_products() -> None:
    layout = LAYOUTS["kpack"]
    stack, x, _, _ = exact_stack("w4a16_g32_asym", 3, N, K, 4, HALF)
    rows, offsets = rows_by_expert([2, 0, 1], 4)
    bias = stack.bias.requires_grad_()  # type: ignore[union-attr]
    given = (x.requires_grad_(), rows, offsets, *stack._replace(bias=bias).arguments(layout), torch.float32)
    result = opcheck(torch.ops.qkernels.grouped_gemm_kpack.default, given)
    assert set(result.values()) == {"SUCCESS"}, result
    up, x, *_ = exact_stack("w4a16_g32", 3, 80, K, 4, HALF)
    down, *_ = exact_stack("nf4_g8", 3, K, 40, 1, HALF)
    ids, routing = torch.tensor([[0, 3], [1, 0], [2, 1], [-1, 2]]), torch.rand(4, 2)
    arguments_ = (x, ids, routing, *up.arguments(layout), *down.arguments(layout), 0, 0.0, 0.0)
    result = opcheck(torch.ops.qkernels.experts_kpack.default, arguments_)
    assert set(result.values()) == {"SUCCESS"}, result


def test_gradients_of_grouped_products_are_those_of_plain_ones() -> None:
    stack, x, weights, bias = exact_stack("w4a16_g32_asym", 3, N, K, 4, HALF, act_order=True)
    rows, offsets = rows_by_expert([2, 0, 3], 4)
    x.requires_grad_()
    y = grouped.grouped_gemm("kpack", x, rows, offsets, stack, torch.float32)
    assert torch.equal(y, product_by_expert(x, rows, offsets, weights, bias).float())
    dy = integers(*y.shape)
    y.backward(dy)
    expected = torch.zeros(4, K, dtype=torch.float64)
    for r, e in enumerate([0, 0, 2, 2, 2]):
        expected[rows[r]] += dy[r].double() @ weights[e]
    assert torch.equal(x.grad, expected.half())  # type: ignore[arg-type]


def test_no_number_of_tokens_compiles_experts_again() -> None:
    """What lies above the op, and `block`, which takes any activation: one graph each. (The first number is no size of a buffer,
    which torch would take for the same symbol.)"""
    up, *_ = exact_stack("w4a16_g32", 4, 80, K, 1, HALF)
    down, *_ = exact_stack("w4a16_g8", 4, K, 40, 1, HALF)
    up, down = up._replace(bias=None), down._replace(bias=None)

    def routed(x: Tensor) -> tuple[Tensor, Tensor]:
        routing, ids = x[:, :4].float().softmax(-1).topk(2)
        return ids, routing

    def op(x: Tensor) -> Tensor:
        return grouped.experts("kpack", x * 2, *routed(x), up, down, "silu") + 1

    def composed(x: Tensor) -> Tensor:
        between = lambda halves: grouped.activate("silu", halves)  # noqa: E731
        return grouped.block(("kpack", "kpack"), x * 2, *routed(x), up, down, between) + 1

    for run in (op, composed):
        assert compile_and_count(run, (7, 6, 12), True, False) == [1, 1, 1]


def test_a_module_of_experts_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss' experts, with biases and a gate of their own: those of the layout are those of the reference, within the rounding
    of what lies between the products."""
    experts = next(m for m in tiny_moe("gpt_oss").to(torch.bfloat16).modules() if type(m).__name__ == "GptOssExperts")
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    hidden, count = experts.hidden_size, experts.num_experts
    x, ids = torch.randn(6, hidden).bfloat16(), torch.stack([torch.randperm(count)[:2] for _ in range(6)])
    made = []
    for layout in ("reference", "kpack"):
        monkeypatch.setattr(QuantStack, "_select", lambda *_, layout=layout: layout)
        made.append(QuantExperts.from_experts(experts, "w4a16_g8"))
    assert [m.up_stack.layout for m in made] == ["reference", "kpack"]
    with torch.no_grad():
        expected, got = (m(x, ids, torch.full((6, 2), 0.5).bfloat16()).float() for m in made)
    assert float((got - expected).abs().max()) <= 2**-7 * float(expected.abs().max())
    assert float(expected.abs().max()) > 0.1
