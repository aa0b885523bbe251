"""Linear layers: ours and every peer on the same weight and inputs, checked first, then timed side by side."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.errors import QKernelsError
from qkernels.kernels.catalogue import KERNELS, Problem, arch_of
from qkernels.layouts import get_layout
from qkernels.nn.huge_pages import on_huge_pages
from qkernels.scheme import ACTIVATIONS, QuantScheme
from qkernels.tensor import QuantTensor
from qkernels.text import dtype_name

from ..method import environment
from ..method.results import Row, Run
from ..method.statistics import median_interval, ratio_interval
from ..method.timing import Clock, clock_for, copies_needed, copy_tensors, host_overhead, interleaved
from ..peers import PEERS, Peer, Prepared, bytes_of
from . import roofs
from .checking import mismatch
from .roofs import Roofs
from .shapes import Layer
from .weights import random_weight

# A candidate may fail in any way its library likes; the table then says how. Ctrl-C is not among them.
FAILURES = (QKernelsError, RuntimeError, ImportError, AttributeError, TypeError, ValueError, KeyError, NotImplementedError,
            AssertionError, OSError)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One layer under one scheme, for several numbers of tokens; `outliers`: how many columns of x have an entry of 8."""

    layer: Layer
    tokens: tuple[int, ...]
    scheme: QuantScheme
    dtype: torch.dtype
    outliers: int = 0


@dataclass(frozen=True)
class Candidate:
    """What runs a case: `prepare(weight)`, or the reason why it does not."""

    name: str
    ours: bool
    prepare: Callable[[QuantTensor], Prepared] | None
    reason: str | None = None


def ours(problem: Problem, device: torch.device) -> list[Candidate]:
    """Every kernel of the catalogue that could be meant for this device."""

    def prepare(layout: str, weight: QuantTensor) -> Prepared:
        packed = get_layout(layout).pack(weight)  # placed as QuantLinear does it
        buffers = {n: None if t is None else on_huge_pages(t.to(device)) for n, t in packed.items()}
        call = partial(ops.gemm, layout, in_features=weight.K, out_features=weight.N, scheme=weight.scheme)
        act = weight.scheme.act
        bits = None if act is None else ACTIVATIONS[act].bits
        return Prepared(buffers, lambda b, x: call(x, **b), bytes_of(*buffers.values()), activation_bits=bits)

    found = []
    for spec in KERNELS:
        reasons = spec.reasons(problem)
        found.append(
            Candidate(f"qkernels {spec.name}", True, partial(prepare, spec.layout), "; ".join(reasons) or None)
        )
    return found


def candidates(problem: Problem, device: torch.device, peers: Sequence[Peer] = PEERS) -> list[Candidate]:
    """Ours first, then the peers, each with the reason why it does not run, if it does not."""
    found = ours(problem, device)
    for peer in peers:
        found.append(
            Candidate(peer.name, False, _prepared_by(peer, problem.dtype, device), peer.why_not(problem, device))
        )
    return found


def _prepared_by(peer: Peer, dtype: torch.dtype, device: torch.device) -> Callable[[QuantTensor], Prepared]:
    return lambda weight: peer.prepare(weight, dtype, device)


def measure_case(
    case: Case, device: torch.device, limits: Roofs, who: Sequence[Candidate], rounds: int, seconds: float | None = None,
    clock: Clock | None = None, cache: int | None = None, read: Callable[[], float] | None = None,
) -> list[Row]:  # fmt: skip
    """Rows of all candidates for all M, in one set of interleaved rounds.

    Args:
        case: the layer.
        device: where.
        limits: the roofs of this run.
        who: candidates.
        rounds: samples each.
        seconds: stop after about so long, once 8 rounds are there.
        clock, cache: the clock and the bytes of the cache to exceed; those of the device if None.
        read: seconds that the memory takes for a byte now (`roofs.read_sampler`), asked in every round.
    """
    layer, clock = case.layer, clock or clock_for(device)
    cache = environment.cache_bytes(device) if cache is None else cache
    weight = random_weight(layer.N, layer.K, case.scheme, case.dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = {M: torch.randn(M, layer.K, generator=generator).to(device, case.dtype) for M in case.tokens}
    for x in inputs.values():
        x[0, torch.arange(case.outliers) * layer.K // max(case.outliers, 1)] = 8
    truth = weight.dequantize(torch.float32)
    budget = environment.available_bytes(device) // (2 * max(1, len(who)))
    rows: dict[tuple[int, str], Row] = {}
    samplers: dict[tuple[int, str], Callable[[], float]] = {}
    prepared: dict[str, Prepared] = {}
    for candidate in who:
        blank = Row(
            layer.model,
            layer.name,
            layer.N,
            layer.K,
            0,
            str(case.scheme),
            dtype_name(case.dtype),
            candidate.name,
            candidate.ours,
        )
        try:
            if candidate.reason or candidate.prepare is None:
                raise _NotHere(candidate.reason or "cannot run this")
            with redirect_stdout(sys.stderr):  # libraries greet; what we print may be JSON
                made = candidate.prepare(weight)
            fixed = replace(blank, note=made.note)
        except (_NotHere, *FAILURES) as error:
            rows |= {(M, candidate.name): replace(blank, M=M, reason=_said(error)) for M in case.tokens}
            continue
        prepared[candidate.name] = made
        copies: list[object] = [made.buffers]
        for M, x in inputs.items():
            row = replace(fixed, M=M)
            try:
                with torch.inference_mode(), redirect_stdout(sys.stderr):
                    wrong = mismatch(
                        made.run(made.buffers, x),
                        x,
                        truth if made.weight is None else made.weight,
                        made.activation_bits,
                    )
                    if wrong is not None:
                        raise _NotHere(wrong)
                    if len(copies) == 1:
                        needed = copies_needed(made.nbytes, cache, budget)
                        copies += [_copy(made.buffers) for _ in range(needed - 1)]
                    samplers[M, candidate.name] = clock.prepare([partial(made.run, buffers, x) for buffers in copies])
                rows[M, candidate.name] = replace(row, cold_bytes=len(copies) * made.nbytes)
            except (_NotHere, *FAILURES) as error:
                rows[M, candidate.name] = replace(row, reason=_said(error))
    deadline = None if seconds is None else time.monotonic() + seconds
    with torch.inference_mode():
        samples = interleaved(_keyed(samplers) | ({_READ: read} if read else {}), rounds, deadline)
    for (M, name), row in rows.items():
        if (M, name) in samplers:
            rows[M, name] = _filled(
                row, samples[f"{M} {name}"], prepared[name].nbytes, case.dtype.itemsize, limits, samples.get(_READ)
            )
    return _with_ratios([rows[M, c.name] for M in case.tokens for c in who])


_READ = "memory read"


class _NotHere(Exception):
    """A reason for a row without a number."""


def _keyed(samplers: dict[tuple[int, str], Callable[[], float]]) -> dict[str, Callable[[], float]]:
    return {f"{M} {name}": sampler for (M, name), sampler in samplers.items()}


def _said(error: BaseException) -> str:
    if isinstance(error, _NotHere):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first}"[:200]


def _copy(buffers: object) -> object:
    holds_tensors = isinstance(buffers, (Tensor, dict, tuple, list)) and not isinstance(buffers, nn.Module)
    return copy_tensors(buffers) if holds_tensors else copy.deepcopy(buffers)


def _filled(
    row: Row, seconds: list[float], weight_bytes: int, itemsize: int, limits: Roofs, read: list[float] | None
) -> Row:
    interval = median_interval(seconds)
    moved = weight_bytes + (row.M * row.K + row.M * row.N) * itemsize
    operations = 2.0 * row.M * row.N * row.K
    share = None if read is None else ratio_interval(read, seconds)
    computing = operations / (limits.best_tflops * 1e12)
    floors = (
        [max(moved * r, computing) for r in read] if read else [limits.floor_seconds(moved, operations)] * len(seconds)
    )
    return replace(
        row,
        read_percent=None if share is None else [100 * moved * x for x in (share.median, share.low, share.high)],
        us=interval.median * 1e6,
        us_low=interval.low * 1e6,
        us_high=interval.high * 1e6,
        gbs=moved / interval.median / 1e9,
        tflops=operations / interval.median / 1e12,
        roof_percent=100 * ratio_interval(floors, seconds).median,
        samples_us=[float(f"{s * 1e6:.5g}") for s in seconds],
    )


def _with_ratios(rows: list[Row]) -> list[Row]:
    done = []
    for row in rows:
        if row.ours and row.us is not None:
            rivals = [r for r in rows if r.M == row.M and r.us is not None and not r.ours]
            intervals = {r.candidate: ratio_interval(r.samples_us, row.samples_us) for r in rivals}
            row = replace(row, ratios={name: [i.median, i.low, i.high] for name, i in intervals.items()})
        done.append(row)
    return done


def host_times(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Host time of a call in microseconds, kernel by kernel, on the smallest weight: [32, 128], one token."""
    scheme = QuantScheme()
    weight, x = random_weight(32, 128, scheme, dtype), torch.ones(1, 128, device=device, dtype=dtype)
    found = {}
    for candidate in ours(Problem(32, 128, scheme, dtype, arch_of(device)), device):
        if candidate.reason is None and candidate.prepare is not None:
            made = candidate.prepare(weight)
            with torch.inference_mode():
                found[candidate.name] = 1e6 * host_overhead(partial(made.run, made.buffers, x), device)
    return found


def absent_peers(rows: Iterable[Row]) -> dict[str, str]:
    """Candidates without a single number, and the first reason of each."""
    numbers = {row.candidate for row in rows if row.us is not None}
    found: dict[str, str] = {}
    for row in rows:
        if row.candidate not in numbers:
            found.setdefault(row.candidate, row.reason or "")
    return found


def run_cases(
    cases: Sequence[Case], device: torch.device, rounds: int = 15, seconds: float | None = None, peers: Sequence[Peer] = PEERS,
    progress: Callable[[Run], None] | None = None,
) -> Run:  # fmt: skip
    """Measure cases and everything that belongs to the run. `seconds` is for each case; `progress` gets the run after each."""
    cache = environment.cache_bytes(device)
    where = environment.describe(device)
    limits = roofs.measure(device, cache, 2.0 if seconds is not None else 6.0)
    status = {peer.name: peer.status for peer in peers if peer.status}
    host = host_times(device)
    memory = roofs.read_sampler(device, cache)
    rows: list[Row] = []

    def so_far(drift: float | None) -> Run:
        # Candidates that never ran go to a list of their own; a table with nine lines of "not installed" each M is no table.
        absent = absent_peers(rows)
        absent = {name: f"{why} [{status[name]}]" if name in status else why for name, why in absent.items()}
        shown = [r for r in rows if r.candidate not in absent]
        return Run(where, replace(limits, drift=drift).to_json(), shown, absent, host)

    for case in cases:
        problem = Problem(case.layer.N, case.layer.K, case.scheme, case.dtype, arch_of(device))
        rows += measure_case(
            case, device, limits, candidates(problem, device, peers), rounds, seconds, cache=cache, read=memory
        )
        if progress is not None:
            progress(so_far(None))
    copied, read = roofs.bandwidth(device, cache, 0.6)
    return so_far(max(copied, read) / limits.bandwidth_gbs - 1)
