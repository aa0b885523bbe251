"""A candidate in a process of its own: what comes back, and that it stands still between its turns."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.method.apart import Apart


def spinner() -> Callable[[str], float]:
    """A thread that never waits, as some libraries have; the call tells the processor's seconds of the process."""
    threading.Thread(target=spin, daemon=True).start()
    return asked


def spin() -> None:
    while True:
        pass


def asked(what: str) -> float:
    if what == "end":
        os._exit(7)
    if what != "seconds":
        raise ValueError(f"what must be 'seconds', got {what!r}")
    time.sleep(0.01)
    return time.process_time()


@pytest.fixture(scope="module")
def there() -> Iterator[Apart]:
    with Apart(spinner, threads=1) as made:
        yield made


def test_it_stands_still_between_its_turns(there: Apart) -> None:
    """The wait is half a second, of which a spinning thread would have most; 0.15 are the calls' and their way."""
    before = there("seconds")
    time.sleep(0.5)
    assert there("seconds") - before < 0.15


def test_times_are_of_that_process(there: Apart) -> None:
    sample = there.prepare([("seconds",), ("seconds",)])
    time.sleep(0.3)  # stands still: not on the clock
    assert 0.01 <= sample() < 0.25


def test_what_is_raised_there_is_told_and_the_process_lives(there: Apart) -> None:
    with pytest.raises(RuntimeError, match="candidate's process: ValueError: what must be 'seconds', got 'x'"):
        there("x")
    assert there("seconds") > 0


def test_the_end_of_the_process_is_told() -> None:
    with Apart(spinner, threads=1) as there, pytest.raises(RuntimeError, match=r"process ended \(exit code 7\)"):
        there("end")
    assert there.process.exitcode == 7
