"""int8 activations on Hopper's wgmma, on the emulator: products against 64-bit integers, bit for bit.

Against our reading of the PTX manual.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import calls, emulator
from tests.cuda.calls import DTYPES, in_room
from tests.cuda.calls_a8 import check, expected, multiply_call, noise
from tests.cuda.emulator import SCHEDULES, Call
from tests.cuda.units import in_full
from tests.ops.helpers import integers
from tests.strategies import random_weight

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DATA_RACE = "WARNING: ThreadSanitizer: data race"
SM90 = "gemm_a8_sm90"


@dtypes
@pytest.mark.parametrize("scheme", ["w4a8_g64", "w8a8_channel"])
def test_every_edge_of_the_token_tiles(scheme: str, dtype: torch.dtype) -> None:
    """Odd N, a second strip of 7 rows, of two or none, K that is no multiple of a step; M over one, two and three blocks."""
    for M, N in [
        (1, 71),
        (8, 129),
        (63, 71),
        (64, 64),
        (65, 130),
        (127, 71),
        (128, 128),
        (129, 40),
        (255, 66),
        (257, 8),
    ]:
        weight = random_weight(scheme, N, 136, exact=True)
        x, bias = in_room(noise(M, 136, dtype)), integers(N, dtype=dtype)
        tokens = 64 if M <= 64 else 256 if M > 128 and scheme == "w8a8_channel" else 128
        check(weight, x, bias, tokens, path=SM90)


@pytest.mark.parametrize("group", ["g32", "g64", "g128", "g192", "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_every_group_and_width(bits: int, group: str) -> None:
    """With random act-order and odd K (x is gathered), in both types, over splits of K."""
    for dtype, N, splits in zip(DTYPES, (67, 130), (2, 1)):
        weight = random_weight(f"w{bits}a8_{group}", N, 333, seed=bits, act_order=splits == 2, exact=True)
        check(weight, noise(5, 333, dtype), None, 64, splits, path=SM90)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("scheme", "tokens"), [("w4a8_g192", 64), ("w5a8_g32", 128), ("w4a8_channel", 256)])
def test_every_schedule_of_the_threads(scheme: str, tokens: int, schedule: str) -> None:
    """35 steps: the ring of 10 to 16 goes round twice, groups of three steps end everywhere in it."""
    weight = random_weight(scheme, 130, 2240, exact=True)
    check(weight, in_room(noise(20, 2240, torch.float16)), None, tokens, 1, schedule, SM90)
    check(weight, in_room(noise(20, 2240, torch.float16)), None, tokens, 3, schedule, SM90)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_dtype_of_scales_and_bias(scale_dtype: torch.dtype) -> None:
    for group, tokens in [("g32", 64), ("channel", 256)]:
        for dtype, bias_dtype in zip((*DTYPES, torch.float16), (torch.float16, torch.bfloat16, torch.float32)):
            weight = random_weight(f"w8a8_{group}", 40, 136, dtype=scale_dtype, exact=True)
            check(weight, in_room(noise(2, 136, dtype)), integers(40, dtype=bias_dtype), tokens, path=SM90)


@pytest.mark.parametrize("tokens", [64, 256])
def test_no_columns_leave_the_bias(tokens: int) -> None:
    weight, bias = random_weight("w4a8_channel", 40, 0), integers(40, dtype=torch.float16)
    call = multiply_call(weight, torch.zeros(3, 0, dtype=torch.float16), bias, tokens, path=SM90)
    emulator.run(calls.UNIT, call)
    assert torch.equal(call.buffers["y"], bias.expand(3, 40))  # type: ignore[arg-type]


def test_more_splits_than_steps_add_zeros() -> None:
    check(random_weight("w4a8_g64", 40, 136, exact=True), in_room(noise(3, 136, torch.float16)), None, 64, 4, path=SM90)


def test_it_gives_the_bits_of_the_other_kernel() -> None:
    """Random scales, which round: both take the same sums, scales and splits in the same order."""
    for scheme, M in [("w4a8_g32", 70), ("w8a8_g128", 70), ("w8a8_channel", 150)]:
        weight, x = random_weight(scheme, 130, 600, seed=2), in_room(noise(M, 600, torch.bfloat16))
        one = multiply_call(weight, x, None, 128, 2)
        other = multiply_call(weight, x, None, 256 if M > 128 else 128, 2, SM90)
        for call in (one, other):
            emulator.run(calls.UNIT, call)
        assert torch.equal(one.buffers["y"], other.buffers["y"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "wrong"),
    [
        ("w4a8_g32", {"tokens": 32}),
        ("w4a8_g32", {"tokens": 256}),
        ("w8a8_g128", {"tokens": 256}),
        ("w4a8_g32", {"splits": 0}),
    ],
)
def test_what_it_cannot_do_is_an_error(scheme: str, wrong: dict[str, int]) -> None:
    call = multiply_call(random_weight(scheme, 64, 256), torch.zeros(1, 256, dtype=torch.float16), tokens=64, path=SM90)
    with pytest.raises(RuntimeError, match="multiply returned error"):
        emulator.run(calls.UNIT, Call(call.launcher, call.buffers, {**call.integers, **wrong}))


# ---- sanitizers and negative controls ----


def call_of(tokens: int = 64, M: int = 20) -> tuple[Call, Tensor]:
    """25 steps: more than the ring has stages."""
    weight = random_weight("w4a8_channel" if tokens == 256 else "w4a8_g128", 100, 1600, exact=True)
    x = noise(M, 1600, torch.float16)
    return multiply_call(weight, x, None, tokens, path=SM90), expected(weight, x)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("tokens", [64, 256])
def test_sanitizers_find_nothing(flavour: emulator.Flavour, tokens: int) -> None:
    """The first of its sanitizer waits for all kernels to be compiled under it: half a minute on two cores."""
    call, y = call_of(tokens)
    done = emulator.replay(calls.UNIT, call, flavour, "random" if tokens == 64 else "warp_ahead")
    assert done.status == 0, done.report[-2000:]
    assert torch.equal(done.buffers["y"], y)


def found(flavour: emulator.Flavour, bug: str) -> str:
    call, y = call_of()
    done = emulator.replay(calls.UNIT, call, flavour, bug=bug)
    return done.report if done.status != 0 else "" if torch.equal(done.buffers["y"], y) else "wrong"


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("IGMMA_NO_WAIT", "wrong"),
        ("IGMMA_SHORT_WAIT", "wrong"),
        ("IGMMA_WRONG_PHASE", "more arrivals at an mbarrier"),
        ("IGMMA_WRONG_SWIZZLE", "wrong"),
        ("IGMMA_NO_FENCE", "wgmma without wgmma.fence"),
        ("IGMMA_SCALES_TOO_LATE", "wrong"),
    ],
)
def test_what_is_asynchronous_is_waited_for(bug: str, report: str) -> None:
    assert report in found("program", bug)


@in_full  # the twins of gemm_sm90
@pytest.mark.parametrize("bug", ["IGMMA_EARLY_RELEASE", "IGMMA_NO_BARRIER_BEFORE_EXCHANGE"])
def test_a_missing_barrier_is_a_race(bug: str) -> None:
    assert DATA_RACE in found("tsan", bug)


@in_full
def test_a_missing_mask_is_an_overflow() -> None:
    assert "heap-buffer-overflow" in found("asan", "IGMMA_NO_ROW_MASK")
