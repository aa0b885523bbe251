"""The emulator itself, on a small kernel of its own: right results in every schedule, and every planted bug found."""

from __future__ import annotations

import pytest
import torch

from .emulator import SCHEDULES, WHY_NOT, Flavour, record, replay, run
from .sample.calls import sample_call
from .units import in_full

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

DATA_RACE = "WARNING: ThreadSanitizer: data race"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("M", "K"), [(16, 32), (1, 64), (21, 256)])
def test_the_sample_is_right_in_every_schedule(schedule: str, M: int, K: int) -> None:
    call, expected = sample_call(M, K)
    run("sample", call, schedule)
    assert torch.equal(call.given()["y"], expected)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_sample_is_clean(flavour: Flavour, schedule: str) -> None:
    call, expected = sample_call()
    done = replay("sample", call, flavour, schedule)
    assert done.status == 0, done.report
    assert torch.equal(done.buffers["y"], expected)


def test_a_record_says_what_a_gpu_would_be_told() -> None:
    call, _ = sample_call(M=21)
    (launch,) = record("sample", call)
    assert launch.kernel == "_ZN8qkernels4cuda13sample_kernelENS0_13SampleProblemE"
    assert (launch.grid, launch.block, launch.shared_bytes) == ((2, 1, 1), (128, 1, 1), 9216)
    assert [len(p) for p in launch.parameters] == [32]
    assert call.given()["y"].isnan().all()  # nothing ran


# ---- negative controls ----


def wrong_in(bug: str) -> set[str]:
    """The schedules in which the planted bug changes the result."""
    wrong = set()
    for schedule in SCHEDULES:
        call, expected = sample_call(16, 256)
        done = replay("sample", call, schedule=schedule, bug=bug)
        assert done.status == 0, done.report
        if not torch.equal(done.buffers["y"], expected):
            wrong.add(schedule)
    return wrong


def sanitizer_report(flavour: Flavour, bug: str, M: int = 16) -> str:
    done = replay("sample", sample_call(M, 256)[0], flavour, bug=bug)
    return done.report if done.status else ""


@in_full  # the kernels' own such bugs are found in every run
def test_a_missing_barrier_is_wrong_in_every_schedule_and_a_race() -> None:
    assert wrong_in("NO_BARRIER") == set(SCHEDULES)
    assert DATA_RACE in sanitizer_report("tsan", "NO_BARRIER")


@in_full  # the kernels' own such bugs are found in every run
def test_a_prefetch_before_the_barrier_is_wrong_only_when_a_warp_runs_ahead() -> None:
    """Why there are several schedules, and why TSan: the first three give the right numbers."""
    assert wrong_in("EARLY_PREFETCH") == {"warp_ahead"}
    assert DATA_RACE in sanitizer_report("tsan", "EARLY_PREFETCH")


@in_full  # the kernels' own such bugs are found in every run
def test_a_wait_that_is_off_by_one_reads_poison() -> None:
    assert wrong_in("SHORT_WAIT") == set(SCHEDULES)


@in_full  # the kernels' own such bugs are found in every run
def test_a_missing_mask_is_an_overflow() -> None:
    assert "heap-buffer-overflow" in sanitizer_report("asan", "NO_ROW_MASK", M=21)
    assert sanitizer_report("asan", "NO_ROW_MASK", M=32) == ""


def test_a_divergent_barrier_is_reported() -> None:
    done = replay("sample", sample_call()[0], bug="DIVERGENT")
    assert done.status == 1
    assert "deadlock: 64 threads wait in a barrier, 64 in a warp instruction ldmatrix.x4" in done.report


def test_blocks_that_write_the_same_memory_race() -> None:
    """The emulator runs one block after the other, and yet this is seen; with one block there is nothing to see."""
    assert DATA_RACE in sanitizer_report("tsan", "BLOCKS_OVERLAP", M=32)
    assert sanitizer_report("tsan", "BLOCKS_OVERLAP", M=16) == ""
