"""Checks of the Triton kernels of stacked experts in Triton's interpreter; `test_interpreted.py` runs this file, too.

Buffers end at guard pages, and workspaces and results start as NaN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels.kernels.triton import grouped_jit, grouped_launch
from qkernels.kernels.triton.table import Config
from qkernels.layouts import LAYOUTS
from qkernels.ops.grouped import ACTIVATIONS, Stack, sorted_by_expert
from qkernels.scheme import QuantScheme
from tests.ops.helpers import integers

from .interpreted import FLOATING, FULL, SCHEMES, nan_in_new_memory  # noqa: F401, a fixture of every test here
from .interpreter import guarded, repair
from .problems import ALPHA, LIMIT, a_block_of_experts, exact_stack, product_by_expert, rows_by_expert

repair()

E, HALF, BRAIN = 5, torch.float16, torch.bfloat16
TILE = Config("gemm", 16, 32, 64, 2, 4, 2)
ROW = Config("gemv", 1, 16, 64, 2, 4, 2)
# What a stack adds is where buffers begin: each kind of them once; in a full run all that the dense kernels are tested with.
KINDS = [
    "w4a16_g16_asym", "w8a16_tensor", "w4a16_g64_fzero", "w4a16_g128_offset", "nf4_g64", "mxfp4_g32", "fp8_block128", "q4_k",
    "q6_k", "nvfp4_g16",
]  # fmt: skip
schemes = pytest.mark.parametrize("scheme", [*SCHEMES, *FLOATING] if FULL else KINDS)
paths = pytest.mark.parametrize("config", [ROW, TILE], ids=["pairs", "sorted"])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def arguments(stack: Stack) -> list[Any]:
    given = stack.arguments(LAYOUTS["kpack"])
    return [guarded(t) if isinstance(t, Tensor) else t for t in given]


def grouped_gemm(
    x: Tensor, rows: Tensor, offsets: Tensor, stack: Stack, dtype: torch.dtype, config: Config | None = TILE
) -> Tensor:
    given = [guarded(t) for t in (x, rows, offsets)]
    return grouped_launch.grouped_gemm(*given, *arguments(stack), dtype, config=config)


def experts(
    x: Tensor, ids: Tensor, routing: Tensor, up: Stack, down: Stack, activation: str, config: Config | None
) -> Tensor:
    given = [guarded(t) for t in (x, ids, routing)]
    numbers = (ACTIVATIONS.index(activation), ALPHA, LIMIT)
    configs = None if config is None else (config, config)
    return grouped_launch.experts(*given, *arguments(up), *arguments(down), *numbers, configs=configs)


@schemes
def test_rows_of_every_scheme_are_exact_where_bits_are_exact(scheme: str) -> None:
    """Experts without rows, a block that is not full, rows of no expert; in turn with an order of columns, in each type."""
    turn = len(scheme) % 2 == 0
    dtype = HALF if turn else BRAIN
    stack, x, weights, bias = exact_stack(scheme, E, 70, 200, 9, dtype, act_order=turn)
    rows, offsets = rows_by_expert([2, 0, 17, 0, 1], 9)
    expected = product_by_expert(x, rows, offsets, weights, bias)
    assert torch.equal(grouped_gemm(x, rows, offsets, stack, dtype), expected.to(dtype))
    rows, offsets, stack = rows[:3], offsets.clamp(max=3), stack._replace(bias=None)
    wide = grouped_gemm(x, rows, offsets, stack, torch.float32)
    assert torch.equal(wide, product_by_expert(x, rows, offsets, weights.to(dtype).double(), bias * 0).float())


@pytest.mark.parametrize("counts", [[0] * 5, [1, 1, 1, 1, 1], [0, 0, 40, 0, 0], [16, 32, 0, 15, 17]], ids=str)
def test_any_counts_of_rows(counts: list[int]) -> None:
    stack, x, weights, bias = exact_stack("w4a16_g32_asym", E, 24, 64, 4, HALF)
    rows, offsets = rows_by_expert(counts, 4)
    for config in (TILE, replace(TILE, block_m=8), None):
        got = grouped_gemm(x, rows, offsets, stack, HALF, config)
        assert torch.equal(got, product_by_expert(x, rows, offsets, weights, bias).half())


@paths
@schemes
def test_a_block_of_every_scheme_is_exact_where_bits_are_exact(scheme: str, config: Config) -> None:
    """relu^2 of whole quarters: the first product, what lies between and the second are exact; ids of others add nothing.

    A codebook's entry is rounded to x's type as a weight, and its square is again: 3 u of each term's magnitude, and u of the
    result's."""
    parsed = QuantScheme.parse(scheme)
    up, x, *of_up = exact_stack(scheme, 3, 24, 256 if parsed.factors else 96, 3, BRAIN)
    down, _, *of_down = exact_stack("w2a16_g8", 3, 20, 24, 1, BRAIN)
    ids, routing = torch.tensor([[0, 2], [1, 3], [-1, 0]]), torch.tensor([[1.0, 0.5], [2.0, 1.0], [1.0, 0.25]])
    x = torch.eye(x.shape[1])[[1, 70, 90]].bfloat16()
    up, of_up[1] = up._replace(bias=None), of_up[1] * 0
    got = experts(x, ids, routing, up, down, "relu2_ungated", config)
    weights = (of_up[0], of_up[1]), (of_down[0], of_down[1])
    expected, size = a_block_of_experts(x, ids, routing, *weights, "relu2_ungated")
    if parsed.codebook is None:
        assert torch.equal(got, expected.bfloat16())
    else:
        assert bool(((got - expected).abs() <= 4.02 * 2**-8 * size).all())


@pytest.mark.parametrize(("config", "dtype"), [(ROW, BRAIN), (TILE, HALF)], ids=["pairs", "sorted"])
@activations
def test_a_block_is_what_its_products_are(activation: str, config: Config, dtype: torch.dtype) -> None:
    """The first product is exact. What lies between it and the second, in fp32, is off by a few of its steps, which may move it
    across one of x's type, whose distance is 2 u: errors are at most 2 u of the terms' magnitudes, and u of the result."""
    width = 20  # no multiple of a tile's columns
    up, x, *of_up = exact_stack(
        "w4a16_g32_asym", E, width * (1 if activation.endswith("_ungated") else 2), 64, 4, dtype
    )
    down, _, *of_down = exact_stack("w8a16_g8", E, 40, width, 1, dtype)
    x = x / 4
    ids = torch.stack([torch.randperm(E + 2)[:2] for _ in range(4)])
    ids[2, 1] = -1
    routing = torch.rand(4, 2)
    got = experts(x, ids, routing, up, down, activation, config)
    weights = (of_up[0], of_up[1]), (of_down[0], of_down[1])
    truth, size = a_block_of_experts(x, ids, routing, *weights, activation)
    u = torch.finfo(dtype).eps / 2
    assert bool(((got.double() - truth).abs() <= 2.01 * u * size + u * truth.abs() + 1e-6 * size).all())
    nobody = experts(x[:1], torch.full_like(ids[:1], E), routing[:1] * torch.nan, up, down, activation, config)
    assert not nobody.any()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@activations
def test_what_is_not_finite_stays_so(activation: str) -> None:
    """NaN and infinities between the products, as plain PyTorch has them."""
    gated = not activation.endswith("_ungated")
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e30, -1e30, 3.0, -100.0])
    up, _, _, _ = exact_stack("w8a16_channel", 1, 64 if gated else 32, 16, 1, BRAIN)
    down, _, of_down, _ = exact_stack("w8a16_channel", 1, 8, 32, 1, BRAIN)
    bias = special.repeat(8 if gated else 4)[None]
    if gated:
        bias[0, :32] = special.repeat_interleave(4)
    x = torch.zeros(1, 16, dtype=BRAIN)
    up, down = up._replace(bias=bias.contiguous()), down._replace(bias=None)
    got = experts(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), up, down, activation, TILE)
    zeros = torch.zeros(1, up.numbers[0], 16, dtype=torch.float64)  # type: ignore[call-overload]
    truth, _ = a_block_of_experts(
        x,
        torch.zeros(1, 1).int(),
        torch.ones(1, 1),
        (zeros, bias.double()),
        (of_down, torch.zeros(1, 8).double()),
        activation,
    )
    assert torch.equal(got.isnan(), truth.isnan())
    assert bool(got.isnan().all())  # a NaN among the terms of each


@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_any_number_of_tokens_with_the_shipped_table(tokens: int, ids_dtype: torch.dtype) -> None:
    up, x, *of_up = exact_stack("w4a16_g32", E, 24, 64, tokens, HALF)
    down, _, *of_down = exact_stack("w8a16_channel", E, 40, 24, 1, HALF)
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(tokens)]) if tokens else torch.zeros(0, 2)
    routing = torch.ones(tokens, 2, dtype=HALF)
    x = (torch.eye(64) * 2).half()[:tokens]
    up, of_up[1] = up._replace(bias=None), of_up[1] * 0
    got = experts(x, ids.to(ids_dtype), routing, up, down, "relu2_ungated", None)
    truth, _ = a_block_of_experts(x, ids, routing, (of_up[0], of_up[1]), (of_down[0], of_down[1]), "relu2_ungated")
    assert torch.equal(got, truth.half())


def test_strided_inputs_and_a_bias_of_another_type() -> None:
    stack, x, weights, bias = exact_stack("w4a16_g32", E, 24, 64, 6, HALF)
    rows, offsets = rows_by_expert([2, 0, 3, 1, 0], 6)
    given = stack.arguments(LAYOUTS["kpack"])
    place = given.index(stack.bias) if stack.bias is None else len(LAYOUTS["kpack"].buffers)
    given[place] = given[place].float()
    wide = torch.stack([rows, rows], 1)[:, 0]
    got = grouped_launch.grouped_gemm(x.T.contiguous().T, wide, offsets, *given, HALF, config=TILE)
    assert torch.equal(got, product_by_expert(x, rows, offsets, weights, bias).half())


def test_empty_weights_and_tokens() -> None:
    for N, K in ((0, 64), (5, 0)):
        stack, x, weights, bias = exact_stack("w4a16_g32_asym", E, N, K, 2, HALF)
        rows, offsets = rows_by_expert([1, 0, 1, 0, 0], 2)
        expected = product_by_expert(x, rows, offsets, weights, bias).half()
        assert torch.equal(grouped_gemm(x, rows, offsets, stack, HALF), expected)


def test_rows_and_offsets_from_outside_read_nothing_past_the_end() -> None:
    """Offsets rise, and are those of plain clamping where they did so before; rows of none are 0."""
    stack, x, weights, _ = exact_stack("w4a16_g32", E, 24, 64, 4, HALF)
    stack = stack._replace(bias=None)
    rows = torch.tensor([0, 3, 1])
    for offsets in ([0, 9, -4, 2**40, 7, 3], [5, 5, 5, 5, 5, 5], [-1, 0, 1, 2, 3, 99], [1, 1, 1, 2, 2, 2]):
        got = grouped_gemm(x, rows, torch.tensor(offsets), stack, torch.float32)
        rising = torch.tensor(offsets).clamp(0, 3).cummax(0).values
        assert torch.equal(got, product_by_expert(x, rows, rising, weights, torch.zeros(E, 24)).float())
    got = grouped_gemm(x, torch.tensor([10**15, -5, 0]), torch.tensor([0, 3, 3, 3, 3, 3]), stack, torch.float32)
    clamped = torch.tensor([3, 0, 0])
    assert torch.equal(got, (x[clamped].double() @ weights[0].T).float())


@pytest.mark.parametrize("counts", [[0, 3, 0, 8, 9], [1] * 7, [0], [64], [5, 0, 0, 0]], ids=str)
def test_blocks_hold_each_row_once_and_one_expert(counts: list[int]) -> None:
    total = sum(counts) + 2
    offsets = torch.tensor([0, *counts]).cumsum(0)
    begin, end, expert = grouped_launch._aligned(offsets, total, 8).tolist()
    owner = [0] * total
    for first, last, e in zip(begin, end, expert):
        for row in range(first, min(first + 8, last)):
            owner[row] += 1
            assert e == next((i for i, n in enumerate(offsets[1:].tolist()) if row < n), len(counts))
    assert owner == [1] * total


def test_sorting_keeps_the_order_of_tokens_and_puts_the_ids_of_others_last() -> None:
    order, rows, offsets = sorted_by_expert(torch.tensor([[2, 7], [0, 2], [-1, 0]]), 3)
    assert order.tolist() == [2, 5, 0, 3, 1, 4]
    assert rows.tolist() == [1, 2, 0, 1, 0, 2]
    assert offsets.tolist() == [0, 2, 2, 4]


def test_a_token_has_the_same_bits_alone_and_among_others() -> None:
    """Nothing of a row's sum hangs on its neighbours, as long as the tile is the same."""
    up, *_ = exact_stack("w4a16_g32", E, 48, 64, 1, BRAIN)
    down, *_ = exact_stack("w4a16_g8", E, 64, 24, 1, BRAIN)
    x, routing = torch.randn(21, 64).bfloat16(), torch.rand(21, 2)
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(21)])
    together = experts(x, ids, routing, up, down, "silu", TILE)
    for t in (0, 20):
        alone = experts(x[t : t + 1], ids[t : t + 1], routing[t : t + 1], up, down, "silu", TILE)
        assert torch.equal(alone[0], together[t])


# --- controls: each of the checks above can fail ------------------------------------------------------------------------------


def test_an_expert_that_is_another_is_noticed() -> None:
    stack, x, weights, bias = exact_stack("w4a16_g32", E, 24, 64, 4, HALF)
    rows, offsets = rows_by_expert([2, 1, 1, 0, 2], 4)
    expected = product_by_expert(x, rows, offsets, weights.roll(1, 0), bias)
    assert not torch.equal(grouped_gemm(x, rows, offsets, stack, HALF), expected.half())


def test_the_numbers_of_activations_are_those_of_the_op() -> None:
    names = [name.upper() for name in ACTIVATIONS]
    assert [getattr(grouped_jit, name).value for name in names] == list(range(len(names)))
    assert [name.endswith("_UNGATED") for name in names] == [
        getattr(grouped_jit, name).value >= grouped_jit.RELU2_UNGATED.value for name in names
    ]


def test_integers_are_whole() -> None:
    """Control of the problems: what is called exact is."""
    assert torch.equal(integers(3, 4), integers(3, 4).round())
