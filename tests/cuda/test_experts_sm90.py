"""Stacked experts on wgmma, executed on the CPU (`emulator`): as `test_experts.py`, on `gemm_sm90.cuh`.

Weights are rounded once to x's type where fragments are scaled. Sums that blocks activate themselves are set against those that
are stored and activated by a kernel of their own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qkernels.ops.grouped import ACTIVATIONS
from tests.ops.helpers import integers
from tests.triton.problems import a_block_of_experts, product_by_expert, rows_by_expert

from . import calls, emulator
from .calls import DTYPES, gemm, gemm_sm90, in_room
from .calls_experts import Experts, block_call, check, grouped_call, kernels_of, result
from .emulator import SCHEDULES, Call
from .units import in_full

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
HALF, BRAIN = DTYPES
E = 5
COUNTS = ([2, 0, 9, 0, 1], [0, 35, 3, 0, 131], [0, 0, 300, 0, 0], [0] * E, [64, 128, 0, 16, 256])
SCHEMES = (
    "w4a16_g64", "w4a16_g16_asym", "w8a16_g32_fzero", "w8a16_tensor", "w4a16_g128_offset", "w4a16_channel_asym", "q6_k",
    "w3a16_g64", "iq4nl_g32",
)  # fmt: skip
GATED = [a for a in ACTIVATIONS if not a.endswith("_ungated")]


@pytest.mark.parametrize("tokens", [16, 32, 64, 128, 256])
def test_rows_of_each_expert_are_exact(tokens: int) -> None:
    """Every kind of zero and width, in groups of 16 columns to all; experts without rows, blocks that are full and that are not,
    three rows of no expert, a second strip of six rows, K that is no multiple of a step; act-order, a bias or none."""
    config = gemm_sm90(tokens)
    for number, scheme in enumerate(SCHEMES):
        dtype, counts = DTYPES[number % 2], COUNTS[(number + tokens) % 5]
        if tokens == 16 and scheme not in ("w4a16_g64", "w8a16_tensor", "w4a16_channel_asym"):
            continue  # no tile of 16 tokens scales fragments
        experts = Experts.exact(scheme, E, 70, 200, dtype, ordered=number == 3)
        if number % 3 == 2:
            experts = replace(experts, bias=None)
        x = in_room(integers(9, 200, dtype=dtype))
        rows, offsets = rows_by_expert(counts, 9)
        expected = product_by_expert(x, rows, offsets, *experts.seen(config, dtype))
        to = torch.float32 if number % 4 == 1 else dtype
        call = grouped_call(experts, x, rows, offsets, config, to)
        check(result(call, SCHEDULES[number % 4]), expected.to(to), (scheme, counts))


def test_the_ring_goes_round_with_each_blocks_own_rows() -> None:
    """23 steps in rings of 16, 10 and 6; three strips, of which the last block has one."""
    experts = Experts.exact("w4a16_g192_asym", 3, 130, 64 * 23, HALF)
    x = in_room(integers(7, 64 * 23, dtype=HALF, most=2))
    rows, offsets = rows_by_expert([5, 0, 2], 7)
    for tokens, schedule in zip((64, 128, 256), SCHEDULES):
        call = grouped_call(experts, x, rows, offsets, gemm_sm90(tokens))
        expected = product_by_expert(x, rows, offsets, *experts.seen(gemm_sm90(tokens), HALF))
        check(result(call, schedule), expected.half(), (tokens, schedule))


def test_a_sum_that_overflows_is_added_again_from_its_own_experts_weights() -> None:
    """2^125 times a code is no float, times a weight it is."""
    experts = replace(Experts.exact("w4a16_g64_asym", 3, 70, 64, BRAIN), bias=None)
    x = in_room(torch.eye(64, dtype=BRAIN)[:6] * 2.0**125)
    rows, offsets = rows_by_expert([3, 0, 9], 6)
    got = result(grouped_call(experts, x, rows, offsets, gemm_sm90(64)))
    check(got, product_by_expert(x, rows, offsets, *experts.values()).bfloat16(), "overflow")


def a_block(
    activation: str, dtype: torch.dtype, width: int, K: int = 64, T: int = 12, count: int = E
) -> tuple[Experts, Experts, Tensor, Tensor, Tensor]:
    """Of experts whose gate and up are whole strips, and where every third id is nobody's."""
    generator = torch.Generator().manual_seed(T)
    rows = width * (1 if activation.endswith("_ungated") else 2)
    up = Experts.exact("w4a16_g64_asym" if K > 64 else "w4a16_g32_asym", count, rows, K, dtype)
    down = Experts.exact("w4a16_g32", count, 40, width, dtype)
    ids = torch.randint(count, (T, 2), generator=generator)
    nobody = ids.view(-1)[::3]
    nobody[:] = torch.tensor([-1, count, 2**40])[torch.arange(len(nobody)) % 3]
    return up, down, in_room(integers(T, K, dtype=dtype) / 8), ids, torch.rand(T, 2, generator=generator)


@pytest.mark.parametrize(("activation", "tokens", "width", "K"), [
    ("silu", 64, 64, 64), ("gelu", 64, 192, 136), ("gelu_tanh", 128, 128, 136), ("swiglu_oai", 128, 64, 64),
    ("silu", 128, 192, 136), ("swiglu_oai", 256, 128, 64),
])  # fmt: skip
def test_gate_and_up_meet_in_one_block(activation: str, tokens: int, width: int, K: int) -> None:
    """The bits of sums that are stored and activated later, where gemm_sm80 has a tile of as many tokens; the sums are exact."""
    assert set(GATED) == {"silu", "gelu", "gelu_tanh", "swiglu_oai"}
    for dtype in DTYPES:
        up, down, x, ids, routing = a_block(activation, dtype, width, K)
        if width == 192:
            up = replace(up, bias=None)
        config = gemm_sm90(tokens)
        call = block_call(up, down, x, ids, routing, activation, (config, config), True)
        assert kernels_of(call) == ["route", "gather", "gemm_wgmma", "gemm_wgmma", "combine"]
        got = result(call, SCHEDULES[tokens // 64 % 4])
        if tokens < 256:
            apart = block_call(up, down, x, ids, routing, activation, (gemm(tokens), config), True)
            assert kernels_of(apart) == ["route", "gather", "gemm", "activate", "gemm_wgmma", "combine"]
            check(got, result(apart), (activation, dtype))
        expected, size = a_block_of_experts(x, ids, routing, up.values(), down.values(), activation)
        unit = 2.0**-9 if dtype == BRAIN else 2.0**-12
        assert bool(((got.double() - expected).abs() <= 3.02 * unit * size + 1e-6).all())
        assert bool(got.any())


def test_rows_of_gate_that_are_no_whole_strips_are_activated_behind_the_product() -> None:
    """And so are those without a gate, and those of tiles with one strip."""
    for activation, width, tokens in (("silu", 72, 64), ("relu2_ungated", 64, 64), ("silu", 64, 32)):
        config = gemm_sm90(tokens)
        up, down, x, ids, routing = a_block(activation, HALF, width)
        call = block_call(up, down, x, ids, routing, activation, (config, config), True)
        assert kernels_of(call) == ["route", "gather", "gemm_wgmma", "activate", "gemm_wgmma", "combine"]
        apart = block_call(up, down, x, ids, routing, activation, (gemm(tokens), config), True)
        check(result(call), result(apart), (activation, width))


def test_a_token_alone_and_in_parts_has_the_same_bits() -> None:
    up, down, x, ids, routing = a_block("silu", HALF, 64, 136)
    ways = (gemm_sm90(64), gemm_sm90(64))
    whole = result(block_call(up, down, x, ids, routing, "silu", ways, True))
    # Of down alone are sums: 64 a row, of two pairs a token.
    parts = result(block_call(up, down, x, ids, routing, "silu", ways, True, most_bytes=4 * 64 * 2 * 5))
    assert torch.equal(whole, parts)
    one = result(block_call(up, down, x[7:8], ids[7:8], routing[7:8], "silu", ways, True))
    assert torch.equal(one[0], whole[7])
    assert bool(one.any())


def test_infinities_and_nan_go_through_the_activation() -> None:
    up, down, x, ids, routing = a_block("silu", HALF, 64, 136)
    x, ids = x.clone(), ids * 0
    x[0, 3], x[1], x[2, 5] = torch.nan, -6e4, torch.inf
    for activation in ("silu", "swiglu_oai"):
        config = gemm_sm90(64)
        got = result(block_call(up, down, in_room(x), ids, routing, activation, (config, config), True))
        apart = result(block_call(up, down, in_room(x), ids, routing, activation, (gemm(64), config), True))
        assert bool(got[0].isnan().all())
        assert not bool(got[3].isnan().any())
        assert torch.equal(got.isnan(), apart.isnan())


def test_what_does_not_exist_is_refused() -> None:
    up, down, x, ids, routing = a_block("silu", HALF, 64)
    healthy = gemm_sm90(64)
    for wrong in (replace(healthy, splits=2), replace(healthy, tokens=24), replace(healthy, stages=1)):
        call = block_call(up, down, x, ids, routing, "silu", (healthy, healthy), True)
        changed = {f"up_{name}": value for name, value in wrong.integers().items()}
        with pytest.raises(RuntimeError, match="experts returned error 1"):
            emulator.run(calls.UNIT, Call(call.launcher, call.buffers, {**call.integers, **changed}))
    # Pairs as they come have no table.
    call = block_call(up, down, x, ids, routing, "silu", (healthy, healthy), False)
    with pytest.raises(RuntimeError, match="experts returned error 1"):
        emulator.run(calls.UNIT, call)


# --- sanitizers, and what is planted -------------------------------------------------------------------------------------------


def small_grouped() -> tuple[Call, Tensor]:
    """An expert of two blocks; the last has few rows for its tile, and behind them lies nothing of ours."""
    experts = Experts.exact("w4a16_g64_asym", 4, 70, 136, HALF)
    x = in_room(integers(9, 136, dtype=HALF))
    rows, offsets = torch.arange(84) % 9, torch.tensor([0, 3, 3, 73, 84])
    expected = product_by_expert(x, rows, offsets, *experts.values())
    return grouped_call(experts, x, rows, offsets, gemm_sm90(64)), expected.half()


def small_block() -> tuple[Call, Tensor]:
    """Two strips of gate, and two of up."""
    config = gemm_sm90(64)
    up, down, x, ids, routing = a_block("silu", HALF, 128, T=7, count=2)
    call = block_call(up, down, x, ids, routing, "silu", (config, config), True)
    apart = block_call(up, down, x, ids, routing, "silu", (gemm(64), config), True)
    return call, result(apart)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_find_nothing(flavour: emulator.Flavour) -> None:
    for call, expected in (small_grouped(), small_block()):
        done = emulator.replay(calls.UNIT, call, flavour, "random")
        assert done.status == 0, done.report[-2000:]
        assert torch.equal(done.buffers["y"], expected)


@pytest.mark.parametrize(
    "bug",
    [
        "WGMMA_EXPERTS_WRONG_STRIPS",
        pytest.param("WGMMA_EXPERTS_WRONG_ROWS", marks=in_full),
        pytest.param("WGMMA_EXPERTS_READ_ON", marks=in_full),
        pytest.param("WGMMA_GATE_BESIDE_GATE", marks=in_full),
    ],
)
def test_other_rows_and_strips_would_be_seen(bug: str) -> None:
    done = [
        (emulator.replay(calls.UNIT, call, schedule="descending", bug=bug), y)
        for call, y in (small_grouped(), small_block())
    ]
    assert any(d.status != 0 or not torch.equal(d.buffers["y"], y) for d, y in done), bug


@in_full
def test_rows_of_two_blocks_and_gate_that_is_not_waited_for_are_races() -> None:
    for bug, call in (
        ("WGMMA_EXPERTS_PAST_THE_END", small_grouped()[0]),
        ("WGMMA_GATE_UP_NO_BARRIER", small_block()[0]),
    ):
        assert "data race" in emulator.replay(calls.UNIT, call, "tsan", bug=bug).report, bug
