"""Medians with confidence intervals that assume no distribution, and verdicts that know about noise.

Times on a real machine are skewed (a preemption only ever adds), so nothing here uses means or standard deviations. The
interval of a median comes from order statistics: the k-th smallest of n samples lies below the median with a probability that
depends on n and k alone (the sign test; Conover, Practical Nonparametric Statistics, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Literal

CONFIDENCE = 0.99  # a table has dozens of rows: at 95 % one in twenty would be off by chance
SMALLEST_EFFECT = 0.03  # below 3 % code placement and page placement decide, not the kernel (see docs/benchmarking.md)
# Beyond this the machine is another one: stalls of a crowded machine last milliseconds whatever they hit, so that a short kernel
# suffers many times more than a long control, and no ratio cancels that (seen: the control 13 times slower, a kernel 98 times).
MACHINE_MOVED = 0.25
WIDEST = 0.10  # an interval wider than this to either side says "unclear" instead of "same"


@dataclass(frozen=True)
class Interval:
    """A median and the interval that holds the true one with at least `CONFIDENCE`, or all samples where there are too few."""

    median: float
    low: float
    high: float

    def __truediv__(self, other: Interval) -> Interval:
        """The quotient of two independent positive quantities, conservatively: both at their worst ends."""
        return Interval(self.median / other.median, self.low / other.high, self.high / other.low)


@lru_cache(maxsize=256)
def _rank(n: int, confidence: float) -> int:
    """The largest k (from 1) for which k-th smallest to k-th largest of n hold the median with `confidence`; 0: none."""
    tail, k = 0.0, 0
    while k < n // 2:
        tail += comb(n, k) / 2**n
        if 1 - 2 * tail < confidence:
            break
        k += 1
    return k


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of samples with its confidence interval. Below 8 samples no interval reaches 99 %: it is then the range."""
    if not samples:
        raise ValueError("a median needs at least one sample, got none")
    ordered, n = sorted(samples), len(samples)
    k = max(1, _rank(n, confidence))
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Interval(middle, ordered[k - 1], ordered[n - k])


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The median ratio of samples that were taken in pairs, one pair a round: what slows both in a round cancels."""
    return median_interval([a / b for a, b in zip(numerators, denominators, strict=True)])


Word = Literal["slower", "faster", "same", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """What a comparison of two runs says about one row.

    Args:
        word: "slower" or "faster" only where the whole interval lies beyond `SMALLEST_EFFECT`, for the time itself and for the
            time in units of the control; "unclear" where the noise could hide an effect larger than `WIDEST`.
        change: new time over old time.
        relative: the same in units of the control's time in each run; None without a control.
        why: one clause for the reader.
    """

    word: Word
    change: Interval
    relative: Interval | None
    why: str


def _direction(change: Interval) -> Word:
    if change.low > 1 + SMALLEST_EFFECT:
        return "slower"
    if change.high < 1 / (1 + SMALLEST_EFFECT):
        return "faster"
    return "same" if change.low > 1 / (1 + WIDEST) and change.high < 1 + WIDEST else "unclear"


def verdict(
    old: Sequence[float],
    new: Sequence[float],
    old_control: Sequence[float] | None = None,
    new_control: Sequence[float] | None = None,
) -> Verdict:
    """Is `new` slower than `old`?

    Args:
        old, new: times of one kernel in two runs, one a round.
        old_control, new_control: times of something that did not change between the runs (a peer), taken in the same rounds. It
            tells a slower kernel from a slower machine.
    """
    change = median_interval(new) / median_interval(old)
    seen = _direction(change)
    if old_control is None or new_control is None:
        return Verdict(seen, change, None, "no control in both runs: a change of the machine would look the same")
    relative = ratio_interval(new, new_control) / ratio_interval(old, old_control)
    control = median_interval(new_control) / median_interval(old_control)
    beside = _direction(relative)
    moved = f"the control moved by {control.median - 1:+.0%}"
    if not 1 / (1 + MACHINE_MOVED) < control.median < 1 + MACHINE_MOVED:
        return Verdict("unclear", change, relative, f"not the machine that it was: {moved}")
    if seen == beside:
        return Verdict(seen, change, relative, moved)
    if beside == "same":
        return Verdict("same", change, relative, f"in step with the control: {moved}")
    if seen == "same" and beside == "unclear":
        return Verdict("same", change, relative, moved)
    return Verdict("unclear", change, relative, f"{seen} alone, {beside} beside the control: {moved}")
