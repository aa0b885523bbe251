"""How a kernel is timed: cold weights, interleaved rounds, one sample a candidate and round.

A decoder reads every weight once a token, so a weight that is still in a cache makes a kernel look faster than it will ever be.
Each candidate therefore owns copies of its weight worth at least `ROTATION` times the last-level cache (L2 of a GPU, L3 of a
CPU) and takes the next one at every call. Nothing is flushed by writing: dirty lines would be written back on the clock.

On CUDA the calls are captured in a graph, so that a sample is device time; on the CPU it is wall time. All candidates of a
round are timed one after the other, in an order that turns from round to round, so that a slower minute of the machine meets
all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qkernels.layerwise.running import map_tensors
from qkernels.nn.huge_pages import begins_huge_page, on_huge_pages

Call = Callable[[], Any]

ROTATION = 4  # copies together are worth this many last-level caches
GRAPH_CALLS = 20  # at least so many calls a graph, and a graph at least so long: its launch is spread over them
GRAPH_SECONDS = 0.5e-3
PAUSE_CYCLES = (
    100_000  # 50 us: graph and events are queued before the GPU comes to them, and host time is not on the clock
)
CPU_SAMPLE_SECONDS = (
    4e-3  # a CPU sample lasts at least this long: far above the clock, far below a scheduler's patience
)


def copies_needed(weight_bytes: int, cache_bytes: int, budget_bytes: int) -> int:
    """How many copies of a weight to rotate over: `ROTATION` caches' worth, at least 2, as many as the budget allows."""
    wanted = max(2, -(-ROTATION * cache_bytes // max(weight_bytes, 1)))
    return max(1, min(wanted, budget_bytes // max(weight_bytes, 1)))


def copy_tensors(values: Any) -> Any:
    """A deep copy of the tensors in nested tuples, lists and dicts; everything else is shared. A copy of a tensor on huge pages
    asks for them too."""
    return map_tensors(values, _copy)


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.clone()
    return on_huge_pages(copied) if tensor.device.type == "cpu" and begins_huge_page(tensor) else copied


class Clock(Protocol):
    """Times `calls` of a candidate once: seconds a call."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]: ...


@dataclass(frozen=True)
class WallClock:
    """CPU: wall time of a run over the next copies, each used in turn across all samples."""

    sample_seconds: float = CPU_SAMPLE_SECONDS

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        begin = time.perf_counter()
        for call in calls:  # every copy once: page faults and lazy set-up happen here
            call()
        once = (time.perf_counter() - begin) / len(calls)
        count = max(1, round(self.sample_seconds / max(once, 1e-9)))
        position = 0

        def sample() -> float:
            nonlocal position
            chosen = [calls[(position + i) % len(calls)] for i in range(count)]
            position += count
            start = time.perf_counter()
            for call in chosen:
                call()
            return (time.perf_counter() - start) / count

        return sample


@dataclass(frozen=True)
class GraphClock:
    """CUDA: event time of a graph of at least `GRAPH_CALLS` calls that goes round all copies."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy set-up, autotuning and JIT may not happen inside a capture
            for call in [*calls, *calls[:3]]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        once = (time.perf_counter() - start) / len(calls)  # at most: the host may be the slower one
        rounds = -(-max(GRAPH_CALLS, min(1000, int(GRAPH_SECONDS / max(once, 1e-7)))) // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def sample() -> float:
            torch.cuda._sleep(PAUSE_CYCLES)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3 / (rounds * len(calls))

        return sample


def clock_for(device: torch.device) -> Clock:
    """Device time on CUDA, wall time elsewhere."""
    return GraphClock() if device.type == "cuda" else WallClock()


def interleaved(
    samplers: dict[str, Callable[[], float]],
    rounds: int,
    deadline: float | None = None,
    min_rounds: int = 8,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Samples of every candidate, one a round, in an order that starts one further each round.

    Args:
        samplers: candidate -> one sample, in seconds a call.
        rounds: so many samples each.
        deadline: a value of `now`; past it no round begins once `min_rounds` are there (8: the fewest with a 99 % interval).

    Returns:
        candidate -> samples in seconds; entry i of every candidate is from round i.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        if deadline is not None and i >= min_rounds and now() > deadline:
            break
        turn = i % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            samples[name].append(samplers[name]())
    return samples


def host_overhead(call: Call, device: torch.device, calls: int = 200, repeats: int = 7) -> float:
    """Seconds that the host spends per call: the least of several loops of calls that are not waited for.

    Use a problem whose work takes next to no time: on the CPU host time and work cannot be told apart.
    """
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return best / calls
