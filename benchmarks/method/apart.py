"""A candidate in a process of its own, which stands still while others are timed.

Libraries whose threads wait by spinning take cores from whoever is measured beside them in the same process, idle or not. Here
such a candidate is made and timed by another process, which is stopped by a signal (SIGSTOP) between its turns, so that it can
take turns with others (`timing.interleaved`) and none runs while another one does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from .timing import WallClock

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class Apart:
    """`make()` of another process: its results, and its times as that process sees them.

    Args:
        make: gives what is called, with positional arguments; pickled by its name, with its arguments.
        threads: of torch there.

    Raises:
        RuntimeError: the process ended, or something was raised there; the text says what.

    Example:
        with Apart(partial(block, "mixtral-8x7b"), threads=1) as there:
            y = there(x)
            seconds = there.prepare([(x,), (x2,)])()
    """

    def __init__(self, make: Callable[[], Callable[..., Any]], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that reading ends where the process does
        try:
            self._answer()
            self._stop()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *given: Any) -> Any:
        return self._ask("run", given)

    def prepare(self, inputs: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
        """As `WallClock.prepare`, of calls with these inputs in turn."""
        self._ask("inputs", list(inputs))
        return lambda: float(self._ask("sample", None))

    def close(self) -> None:
        """End it; a process that is stopped hears of nothing but SIGKILL."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _stop(self) -> None:
        with suppress(ProcessLookupError):  # it has ended, which reading its answer tells
            os.kill(self.process.pid or 0, signal.SIGSTOP)

    def _ask(self, what: str, given: Any) -> Any:
        os.kill(self.process.pid or 0, signal.SIGCONT)
        try:
            self.pipe.send_bytes(pickle.dumps((what, given)))
            return self._answer()
        finally:
            self._stop()

    def _answer(self) -> Any:
        try:
            good, value = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the candidate's process ended (exit code {self.process.exitcode})") from None
        if not good:
            raise RuntimeError(f"in the candidate's process: {value}")
        return value


def _serve(pipe: Connection, make: Callable[[], Callable[..., Any]], threads: int) -> None:
    """Answer until the other side is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            PR_SET_PDEATHSIG, signal.SIGKILL
        )  # who stands still would outlive a parent that is killed
    torch.set_num_threads(threads)
    calls: list[Callable[[], Any]] = []
    sample: Callable[[], float] = float
    run: Callable[..., Any] = make
    what: str
    given: Any
    what, given = "make", None
    with torch.inference_mode(), redirect_stdout(sys.stderr):
        while True:
            value = None
            try:
                if what == "make":
                    run = make()
                elif what == "run":
                    value = run(*given)
                elif what == "inputs":
                    calls = [partial(run, *each) for each in given]
                    sample = WallClock().prepare(calls)
                else:
                    calls[0]()  # threads that fell asleep while the process stood still are awake for what is timed
                    value = sample()
                answer = True, value
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            try:
                pipe.send_bytes(pickle.dumps(answer))
                what, given = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
