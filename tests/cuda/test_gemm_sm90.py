"""Hopper's kernel on the emulator: wgmma, TMA and mbarriers happen as late as the manual allows (tests/cuda/host/async_host.h).

Against our reading of the PTX manual.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qkernels import QuantTensor
from tests.cuda import calls, emulator
from tests.cuda.bounds import ZEROS, bound
from tests.cuda.calls import DTYPES, Config, gemm_sm90, in_room, multiply, rounding_of_fragments, scales_fragments
from tests.cuda.emulator import SCHEDULES
from tests.cuda.units import in_full
from tests.ops.helpers import exact_product, integers
from tests.strategies import random_weight

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DATA_RACE = "WARNING: ThreadSanitizer: data race"


TOKENS = (16, 32, 64, 128, 256)  # of a tile; the first two with 64 rows, the others with 128


def check(
    weight: QuantTensor, x: Tensor, config: Config, bias: Tensor | None = None, schedule: str = "ascending"
) -> None:
    """Bit for bit: the exact product, of weights that are rounded once to x's type where fragments are scaled."""
    seen = weight.dequantize()
    seen = seen.to(x.dtype).double() if scales_fragments(weight, config) else seen.double()
    exact_product(weight, x)  # no sum is too large to be exact
    expected = (x.double() @ seen.T + (0 if bias is None else bias.double())).to(x.dtype)
    y = multiply(weight, x, config, bias, schedule)
    wrong = (y != expected).nonzero()
    assert len(wrong) == 0, f"{config}: {len(wrong)} of {y.numel()} differ, the first at [m, n] = {wrong[0].tolist()}"


@dtypes
@pytest.mark.parametrize("scheme", ["w4a16_g128_asym", "w8a16_g64", "w4a16_g16_fzero"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_edge_of_the_tiles(tokens: int, scheme: str, dtype: torch.dtype) -> None:
    """Odd N, a second strip of 7 rows, of one or none, K that is no multiple of a step, one token more than a tile."""
    if tokens == 16 and "fzero" in scheme:
        pytest.skip("no tile of 16 tokens scales fragments")
    for M, N in [(1, 71), (tokens // 2 + 1, 129), (tokens - 1, 1), (tokens, 64), (tokens + 1, 40)]:
        weight = random_weight(scheme, N, 136, exact=True)
        check(weight, in_room(integers(M, 136, dtype=dtype)), gemm_sm90(tokens), integers(N, dtype=dtype))


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("group", ["g16", "g32", "g64", "g128", "g192", "channel", "tensor"])
def test_every_group_and_kind_of_zero(group: str, zeros: str) -> None:
    """With random act-order and odd K (x is copied), in both types and both widths, over splits of K."""
    for (bits, dtype), (M, tokens) in zip(itertools.product((4, 8), DTYPES), ((5, 32), (20, 64), (3, 32), (12, 256))):
        weight = random_weight(f"w{bits}a16_{group}{zeros}", 67, 333, seed=bits, act_order=M != 12, exact=True)
        x = integers(M, 333, dtype=dtype, most=2)
        check(weight, x, gemm_sm90(tokens, splits=2 if M != 20 else 1))


@dtypes
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_dtype_of_scales_zeros_and_bias(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for zeros, bias_dtype in zip(ZEROS, (None, torch.float16, torch.bfloat16, torch.float32)):
        weight = random_weight(f"w4a16_g64{zeros}", 40, 136, dtype=scale_dtype, exact=True)
        bias = None if bias_dtype is None else integers(40, dtype=bias_dtype)
        check(weight, in_room(integers(2, 136, dtype=dtype)), gemm_sm90(64), bias)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("tokens", "steps"), [(16, 35), (64, 35), (128, 23), (256, 15)])
def test_every_schedule_of_the_threads(tokens: int, steps: int, schedule: str) -> None:
    """The ring of 16, 16, 10 or 6 goes round twice, groups end at even and at odd steps."""
    K = 64 * steps
    weight = random_weight("w4a16_g192_asym", 66, K, exact=True)
    check(weight, in_room(integers(3, K, dtype=torch.float16, most=2)), gemm_sm90(tokens), None, schedule)
    x = in_room(integers(20, 448, dtype=torch.float16, most=2))
    check(random_weight("w4a16_g192_asym", 130, 448, exact=True), x, gemm_sm90(tokens, splits=3), None, schedule)


def test_strides_that_tma_refuses_are_copied() -> None:
    """Rows that overlap (expand), columns picked out of more, an unaligned start."""
    weight = random_weight("w4a16_g64", 40, 96, exact=True)
    room = integers(10, 3 * 96 + 8, dtype=torch.float16)
    for view in (room[:1, :96].expand(10, 96), room[:, 1:97], room[:, : 3 * 96 : 3], room[::2, 8:104]):
        check(weight, view, gemm_sm90(64))


def test_no_columns_leave_the_bias() -> None:
    weight, bias = random_weight("w4a16_g32", 40, 0), integers(40, dtype=torch.float16)
    x = torch.zeros(3, 0, dtype=torch.float16)
    assert torch.equal(multiply(weight, x, gemm_sm90(64), bias), bias.expand(3, 40))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parts_of_k_meet_in_a_cluster_or_in_a_workspace(schedule: str) -> None:
    """2, 3, 4 and 8 parts in a cluster, whose blocks read each other's totals; 6 in the workspace. 5 steps: some have none.
    Odd N, more rows of x than a tile, and a bias that is added once."""
    weight = random_weight("w4a16_g64", 71, 320, exact=True)
    bias = integers(71, dtype=torch.float16)
    for tokens, M, splits in [(16, 17, 2), (64, 3, 8), (128, 5, 4), (256, 7, 3), (64, 66, 6)]:
        x = in_room(integers(M, 320, dtype=torch.float16, most=2))
        call = calls.multiply_call(weight, x, gemm_sm90(tokens, splits))
        workspace = call.buffers["workspace"]
        assert workspace is not None
        assert (workspace.numel() == 0) == (splits != 6)
        check(weight, x, gemm_sm90(tokens, splits), bias, schedule)


@dtypes
@pytest.mark.parametrize(
    ("scheme", "tokens"), [("w4a16_g16_asym", 32), ("w4a16_g128", 64), ("w8a16_g64_fzero", 64), ("w4a16_g128", 256)]
)
def test_random_inputs_stay_within_the_bound(scheme: str, tokens: int, dtype: torch.dtype) -> None:
    """What `bound` counts, of 64 columns, and 2 u for each addition of the columns that stay in the tensor core: a group,
    or a split. Scaled fragments are rounded once, to nearest: half a unit of the last bit, or of the smallest number."""
    weight = random_weight(scheme, 70, 328, seed=3, dtype=torch.float32)
    x = torch.randn(20, 328, generator=torch.Generator().manual_seed(0)).to(dtype)
    W = weight.dequantize().double()
    exact = x.double() @ W.T
    config = gemm_sm90(tokens, 3)
    error = (multiply(weight, in_room(x), config).double() - exact).abs()
    scaled = scales_fragments(weight, config)
    more = 2 * (128 if scaled else 64) * 2.0**-24 * (x.double().abs() @ W.abs().T)  # a third of 6 steps: 128 columns
    assert (error <= bound(weight, x, 3, 1) + more + rounding_of_fragments(weight, x, config)).all()


# ---- sanitizers and negative controls ----


def call_of(M: int = 20, tokens: int = 64, splits: int = 1) -> tuple[emulator.Call, torch.Tensor]:
    """20 steps in a ring of 16 (128 tokens: 10, 256: 6); weights are exact in fp16."""
    weight = random_weight("w4a16_g128_asym", 130, 1280, exact=True)
    x = integers(M, 1280, dtype=torch.float16, most=2)
    return calls.multiply_call(weight, x, gemm_sm90(tokens, splits)), exact_product(weight, x)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize(
    ("tokens", "splits"),
    [pytest.param(16, 1, marks=in_full), pytest.param(64, 1, marks=in_full), (64, 2), (256, 1)],
)
def test_sanitizers_find_nothing(flavour: emulator.Flavour, tokens: int, splits: int) -> None:
    """The first of its sanitizer waits for all kernels to be compiled under it: half a minute on two cores."""
    for schedule in ("random", "warp_ahead"):
        call, expected = call_of(tokens=tokens, splits=splits)
        done = emulator.replay(calls.UNIT, call, flavour, schedule)
        assert done.status == 0, done.report[-2000:]
        assert torch.equal(done.buffers["y"], expected)


def found(flavour: emulator.Flavour, bug: str, schedule: str = "ascending") -> str:
    call, expected = call_of(tokens=256 if "SCALED" in bug else 64, splits=2 if "CLUSTER" in bug else 1)
    done = emulator.replay(calls.UNIT, call, flavour, schedule, bug=bug)
    return done.report if done.status != 0 else "" if torch.equal(done.buffers["y"], expected) else "wrong"


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("WGMMA_NO_WAIT", "wrong"),
        ("WGMMA_SCALED_NO_WAIT", "wrong"),
        ("WGMMA_SHORT_WAIT", "wrong"),
        ("WGMMA_WRONG_PHASE", "more arrivals at an mbarrier"),
        ("WGMMA_WRONG_SWIZZLE", "wrong"),
        ("WGMMA_PRODUCER_DOES_NOT_WAIT", "more arrivals at an mbarrier"),
        ("WGMMA_STALE_SCALES", "wrong"),
        ("WGMMA_NO_FENCE", "wgmma without wgmma.fence"),
        ("WGMMA_NO_PROXY_FENCE", "fence.proxy.async"),
        ("WGMMA_NO_CLUSTER_BARRIER", "wrong"),
        ("WGMMA_NO_LAST_CLUSTER_BARRIER", "a block that has ended"),
    ],
)
def test_what_is_asynchronous_is_waited_for(bug: str, report: str) -> None:
    assert report in found("program", bug)


@pytest.mark.parametrize(
    "bug",
    [
        "WGMMA_EARLY_RELEASE",
        "WGMMA_NO_BARRIER_BEFORE_EXCHANGE",
        pytest.param("WGMMA_NO_CLUSTER_BARRIER", marks=in_full),
    ],
)
def test_a_missing_barrier_is_a_race(bug: str) -> None:
    assert DATA_RACE in found("tsan", bug)


@pytest.mark.parametrize("bug", [pytest.param("WGMMA_NO_ROW_MASK", marks=in_full), "WGMMA_CLUSTER_NO_ROW_MASK"])
def test_a_missing_mask_is_an_overflow(bug: str) -> None:
    assert "heap-buffer-overflow" in found("asan", bug)
