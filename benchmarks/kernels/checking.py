"""No match, no number: a candidate's output is compared with the exact product before it is timed.

The inputs are ours (independent, zero mean), so rounding errors add up like a random walk and the bound can be far tighter
than the worst case sum of |x| |w|, which at K = 4096 would let a third of the result be wrong. An output y of exact value s
may be off by

    BOUND * (u * sqrt(sum (x w)^2)  +  a * sqrt(sum w^2))  +  2 u |s|

u: unit roundoff of the activation dtype, which bounds the rounding of each weight and of y; a: standard deviation of the rounding
of x where a candidate quantizes it to 8 bits (a step over sqrt 12). BOUND = 8 standard deviations: one in 10^15 per output.
A row of y that belongs to another row of the weight is off by about sqrt(2 sum (x w)^2), 1 / (8 u) = 32 times the bound in bf16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOUND = 8.0
CHECKED_TOKENS = 48  # the first 16, the last 16 and 16 between: every edge of a tile in M


def checked_rows(M: int) -> Tensor:
    """Which rows of y are compared: all up to `CHECKED_TOKENS`, else the ends and evenly spaced ones."""
    if M <= CHECKED_TOKENS:
        return torch.arange(M)
    third = CHECKED_TOKENS // 3
    middle = torch.linspace(third, M - third - 1, third).long()
    chosen: Tensor = torch.unique(torch.cat([torch.arange(third), middle, torch.arange(M - third, M)]))
    return chosen


def mismatch(y: Tensor, x: Tensor, weight: Tensor, activation_bits: int | None = None) -> str | None:
    """Why `y` is not `x weight^T`, or None if it is.

    Args:
        y: `[M, N]`, what a candidate returned.
        x: `[M, K]`, zero-mean noise.
        weight: `[N, K]` in fp32, what the candidate's weight means.
        activation_bits: 8 where the candidate quantizes x (per tensor or finer).
    """
    M, N = x.shape[0], weight.shape[0]
    if tuple(y.shape) != (M, N):
        return f"its output is {list(y.shape)}, expected {[M, N]}"
    rows = checked_rows(M).to(x.device)
    got, xs = y[rows].double(), x[rows].double()
    if not bool(torch.isfinite(got).all()):
        return "its output has NaN or infinite entries"
    w = weight.to(x.device).double()
    exact = xs @ w.T
    unit = torch.finfo(x.dtype).eps / 2
    noise = unit * (xs.square() @ w.square().T).sqrt()
    if activation_bits is not None:
        step = 2 * xs.abs().max() / (2**activation_bits - 2)
        step = 2 * step  # engines may keep one bit in reserve (torch's x86 engine does, for AVX2's 16-bit sums)
        noise = noise + step / math.sqrt(12) * w.square().sum(1).sqrt()
    allowed = BOUND * noise + 2 * unit * exact.abs()
    # sums of K terms in fp32, at worst one after the other: negligible beside 16-bit units, not beside fp32's
    allowed = allowed + BOUND * torch.finfo(torch.float32).eps / 2 * math.sqrt(w.shape[1]) * noise / unit
    wrong = ~((got - exact).abs() <= allowed)  # NaN on either side is wrong
    if not bool(wrong.any()):
        return None
    worst = ((got - exact).abs() / allowed).max()
    entries = f"{int(wrong.sum())} of {wrong.numel()} entries"
    return f"its output does not match: {entries}, the worst {float(worst):.3g} times the bound"
