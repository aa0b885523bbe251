"""How launchers ask the CUDA runtime for shared memory and for the capacity of clusters, on the runtime's twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import calls
from .emulator import WHY_NOT, Call, Replayed, replay, run

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def numbers(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


def launched(bug: str | None = None, flavour: str = "program") -> Replayed:
    names = {"threads": 1, "graph": 1, "other_device": 1, "asked": 2, "limits": 2}
    call = Call("shared_memory", {name: numbers(count) for name, count in names.items()}, {"launches": 200})
    done = replay("runtime", call, flavour, bug=bug)  # type: ignore[arg-type]
    assert done.status == 0, done.report
    return done


@pytest.mark.parametrize("flavour", ["program", "tsan"])
def test_two_sizes_two_threads_and_a_capture_ask_once_a_device_for_all_there_is(flavour: str) -> None:
    found = {name: buffer.tolist() for name, buffer in launched(flavour=flavour).buffers.items()}
    assert found == {
        "threads": [0], "graph": [0], "other_device": [0], "asked": [1, 1], "limits": [227 * 1024, 227 * 1024],
    }  # fmt: skip


def test_a_limit_of_each_launch_is_lowered_under_a_capture() -> None:
    """Whoever sets what it needs itself takes it from others: the graph holds a launch that its function no longer allows."""
    found = launched("SHARED_OF_ITS_OWN").buffers
    assert int(found["graph"]) != 0
    assert int(found["limits"][0]) == 60 * 1024


def test_the_device_says_how_many_clusters_it_holds() -> None:
    """Six groups of 16 multiprocessors and two of 18: a multiprocessor has one block of 64 tokens, or two of 32."""
    active = torch.zeros(2, 9, dtype=torch.int32)
    run(calls.UNIT, Call("clusters", {"active": active}))
    expected = torch.zeros(2, 9, dtype=torch.int32)
    for blocks in (1, 2):
        for size in (2, 3, 4, 8):
            expected[blocks - 1, size] = sum(group * blocks // size for group in (16,) * 6 + (18,) * 2)
    assert torch.equal(active, expected)
    assert int(active[0, 4]) == 32
