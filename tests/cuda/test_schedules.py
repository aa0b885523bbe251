"""The kernels on the emulator, in unkind schedules and under the sanitizers; and what those find when a line is missing."""

from __future__ import annotations

import pytest
import torch

from .calls import decode
from .cases import CASES, Case
from .emulator import SCHEDULES, WHY_NOT, Flavour, replay, run

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

DATA_RACE = "WARNING: ThreadSanitizer: data race"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_schedule_gives_the_exact_product(case: Case, schedule: str) -> None:
    call, expected = case.call()
    run("mma_tile", call, schedule)
    torch.testing.assert_close(call.buffers["y"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sanitizers_have_nothing_to_say(case: Case, flavour: Flavour) -> None:
    """Buffers end where they should (ASan), and nothing but barriers orders the threads (TSan). The first of its sanitizer waits
    for all kernels to be compiled under it: half a minute on two cores."""
    call, expected = case.call()
    done = replay("mma_tile", call, flavour, "random" if flavour == "asan" else "ascending")
    assert done.status == 0, done.report
    torch.testing.assert_close(done.buffers["y"], expected, rtol=0, atol=0)


# ---- negative controls ----

# Eight steps a warp: the barrier before the loop orders the first three, so what the loop lacks shows later.
DECODE = Case("w4a16_g64", 3, 64, 1024, decode(3, warps_n=4))
GEMM = Case("w4a16_g64_asym", 65, 65, 576, CASES[5].config)


def found(case: Case, flavour: Flavour, bug: str, schedule: str = "ascending") -> str:
    """What a build with the bug has to say: the sanitizer's report, "wrong", or nothing."""
    call, expected = case.call()
    done = replay("mma_tile", call, flavour, schedule, bug=bug)
    if done.status != 0:
        return done.report
    return "" if torch.equal(done.buffers["y"], expected) else "wrong"


@pytest.mark.parametrize(
    ("case", "bug"),
    [
        (DECODE, "DECODE_NO_WARP_BARRIER"),
        (GEMM, "GEMM_NO_BARRIER"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_barrier_is_a_race(case: Case, bug: str) -> None:
    assert DATA_RACE in found(case, "tsan", bug)


def test_a_short_wait_reads_poison() -> None:
    assert found(DECODE, "program", "DECODE_SHORT_WAIT") == "wrong"
    assert found(GEMM, "program", "GEMM_SHORT_WAIT") == "wrong"


def test_a_missing_wait_for_x_shows_when_a_warp_runs_ahead() -> None:
    """x is the youngest of the copies before the loop, whose own waits would bring it some steps later."""
    for schedule in ("ascending", "warp_ahead"):
        assert found(DECODE, "program", "DECODE_NO_WAIT_FOR_X", schedule) == "wrong"
    assert DATA_RACE in found(DECODE, "tsan", "DECODE_NO_WAIT_FOR_X")


def test_a_missing_mask_is_an_overflow() -> None:
    assert "heap-buffer-overflow" in found(GEMM, "asan", "GEMM_NO_ROW_MASK")


def test_copies_that_come_too_early_are_a_race() -> None:
    assert DATA_RACE in found(GEMM, "tsan", "GEMM_COPIES_TOO_EARLY")
    assert DATA_RACE in found(GEMM, "tsan", "GEMM_WAITS_AFTER_COPYING")


def test_without_the_clamp_an_order_from_outside_reads_outside() -> None:
    case = Case("w4a16_g32", 3, 40, 96, CASES[0].config, ordered=True)
    for bug, status in ((None, 0), ("DECODE_NO_CLAMP", 1)):
        call, _ = case.call()
        order = call.buffers["k_order"]
        assert order is not None
        order[5] = 1 << 20
        done = replay("mma_tile", call, "asan", bug=bug)
        assert (done.status != 0) == bool(status), done.report
        assert ("AddressSanitizer" in done.report) == bool(status)


def test_without_a_barrier_a_warp_that_runs_ahead_spoils_the_numbers() -> None:
    assert found(GEMM, "program", "GEMM_NO_BARRIER", "warp_ahead") == "wrong"
