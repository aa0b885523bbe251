"""Float weights to GGUF blocks: the searches for scale and minimum that llama.cpp makes, with the same codes.

Every sum runs over the members of a group in order and in float32, as in ggml (`ggml-quants.c`; MIT), since a least-squares fit
decides by comparing errors that differ in the last bit. So tensors lie with the members first, `[members, groups]`: a step of a
sum is then one operation on all groups. Importance (llama.cpp's imatrix) is the mean square of each input column.

torch makes `number / tensor` of a reciprocal and a product, which is rounded twice: `_quotient` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from .parts import E2M1_TABLE, IQ4_TABLE, Parts, half_e8m0
from .types import block_type, blocks_of

_SLICE: Final = 2**20  # weights that are searched at once
TINY: Final = 1e-15  # a group whose largest weight is below it counts as zeros


def blocks_searched(
    weight: Tensor, type: str, importance: Tensor | None, searches: Mapping[str, Search]
) -> tuple[Tensor, Tensor]:
    """The twin of the op `gguf_blocks` (`quantizing.py`): the same bits.

    Args:
        weight: floating `[N, K]`.
        importance: float32 `[K]`, or None.

    Returns:
        uint8 `[N, bytes of a row]`; and int64 `[1, 2]`: the first row that holds inf or NaN, and the first whose scale float16
        cannot hold, N where there is none.
    """
    ggml, (rows, columns) = block_type(type).ggml, weight.shape
    out = torch.empty(rows, columns // ggml.elements * ggml.nbytes, dtype=torch.uint8, device=weight.device)
    wrong = torch.full((1, 2), rows, dtype=torch.int64, device=weight.device)
    step = max(1, _SLICE // max(columns, 1))
    for begin in range(0, rows if columns else 0, step):
        part = weight[begin : begin + step].float()
        found = searches[type](Rows(part, importance, ggml.elements))
        out[begin : begin + step] = blocks_of(found, type).view(len(part), -1)
        infinite = [
            ~scale.isfinite().view(len(part), -1).all(1) for scale in (found.d, found.dmin) if scale is not None
        ]
        for at, bad in ((0, [~part.isfinite().all(1)]), (1, infinite)):
            for flags in bad:
                first = flags.nonzero().flatten()[:1] + begin
                wrong[0, at] = torch.cat([first, wrong[0, at : at + 1]]).amin()
    return out, wrong


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `[N, K]` of float32, their importance `[K]` or None, and the elements of a block."""

    weight: Tensor
    importance: Tensor | None
    elements: int

    def groups(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Weights, and the importance of each: `[size, N * K / size]`."""
        x = self.weight.reshape(-1, size).T.contiguous()
        if self.importance is None:
            return x, None
        return x, self.importance.expand_as(self.weight).reshape(-1, size).T.contiguous()


Search = Callable[[Rows], Parts]


def total(terms: Tensor) -> Tensor:
    """The sum over dimension 0, one member after the other."""
    result = torch.zeros_like(terms[0])
    for term in terms:
        result += term
    return result


def nearest(x: Tensor) -> Tensor:
    """ggml's rounding, half to even, as float32 integers: by adding 1.5 · 2^23, which beyond ±2^22 gives what its bits say."""
    bits = (x + 12582912.0).view(torch.int32)
    return ((bits & 0x7FFFFF) - 0x400000).float()


def peak_of(x: Tensor) -> Tensor:
    """The first member of largest magnitude, with its sign, `[groups]`; no -0."""
    return x.gather(0, x.abs().argmax(0, keepdim=True))[0] + 0.0


def least_of(x: Tensor) -> Tensor:
    """The first least member, `[groups]`: of 0 and -0 the first, where argmin takes any."""
    least = x[0]
    for member in x[1:]:
        least = torch.where(member < least, member, least)
    return least


def _quotient(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once."""
    return torch.tensor(float(number), device=x.device) / x


def inverse_of(x: Tensor) -> Tensor:
    """1 / x, or 0 where that is no number."""
    inverse = 1 / x
    return torch.where(inverse.isfinite(), inverse, 0.0)


def _root(x: Tensor) -> Tensor:
    """The square root, rounded right: torch's float32 one (of MKL) is off by a bit for one number in six."""
    return x.double().sqrt().float()


def f16(x: Tensor) -> Tensor:
    return x.half().float()


@dataclass(frozen=True, eq=False)
class _Fit:
    """Codes `[members, groups]` as float32 integers, and the scale `[groups]`; `low`: the amount that is subtracted."""

    codes: Tensor
    scale: Tensor
    low: Tensor


def _fit_range(x: Tensor, weight: Tensor, top: int, tries: Iterable[float], absolute: bool) -> _Fit:
    """Codes 0 … top with scale and minimum: for each width tried, the weighted least-squares line; the least error stays."""
    low, high = least_of(x), x.amax(0)
    low = torch.where(low > 0, 0.0, low)
    flat = high == low
    width = torch.where(flat, 1.0, high - low)
    sum_w, sum_x = total(weight), total(weight * x)

    def error(codes: Tensor, scale: Tensor, least: Tensor) -> Tensor:
        difference = scale * codes + least - x
        return total(weight * (difference.abs() if absolute else difference * difference))

    inverse = _quotient(top, width)
    scale, least = 1 / inverse, low
    codes = nearest((inverse * (x - low)).clamp(0, top))
    best = error(codes, scale, least)
    for change in tries:
        # From the best minimum so far, not from the first: as ggml has it.
        ratio = (torch.tensor(change) + top) / torch.where(flat, 1.0, high - least)
        trial = nearest((ratio * (x - least)).clamp(0, top))
        weighted = weight * trial
        sum_l, sum_l2, sum_xl = total(weighted), total(weighted * trial), total(weighted * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        slope = (sum_w * sum_xl - sum_x * sum_l) / determinant
        start = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = start > 0
        slope, start = torch.where(above, sum_xl / sum_l2, slope), torch.where(above, 0.0, start)
        found = error(trial, slope, start)
        better = (determinant > 0) & (found < best)
        codes, best = torch.where(better, trial, codes), torch.where(better, found, best)
        scale, least = torch.where(better, slope, scale), torch.where(better, start, least)
    return _Fit(torch.where(flat, 0.0, codes), torch.where(flat, 0.0, scale), -torch.where(flat, low, least))


def _fit_signed(x: Tensor, weight: Tensor, half: int) -> _Fit:
    """Codes 0 … 2·half - 1 with their zero at `half`: 19 widths around the largest weight, each with its best scale."""
    peak = peak_of(x)
    none = peak.abs() < TINY
    peak = torch.where(none, 1.0, peak)

    def trial(width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = nearest(-width / peak * x).clamp(-half, half - 1)
        return codes, total(weight * x * codes), total(weight * codes * codes)

    codes, sum_lx, sum_l2 = trial(torch.tensor(float(half)))
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, 0.0)
    best = scale * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        others, sum_lx, sum_l2 = trial(half + torch.tensor(0.1) * step)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        codes, scale = torch.where(better, others, codes), torch.where(better, sum_lx / sum_l2, scale)
        best = torch.where(better, scale * sum_lx, best)
    return _Fit(torch.where(none, 0.0, codes + half), torch.where(none, 0.0, scale), torch.zeros_like(scale))


def _descend(x: Tensor, weight: Tensor, codes: Tensor, low: int, high: int, positive: bool) -> _Fit:
    """Five rounds in which each member in turn takes its best code given the others'; the scale fits them all."""
    codes = codes.clone()
    sum_lx, sum_l2 = total(weight * x * codes), total(weight * codes * codes)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            value, w, old = x[i], weight[i], codes[i]
            lx, l2 = sum_lx - w * value * old, sum_l2 - w * old * old
            open_ = (lx > 0) & (l2 > 0) if positive else lx > 0
            new = nearest(torch.where(open_, value * l2 / lx, 0.0)).clamp(max=high)
            if not positive:
                new = new.clamp(min=low)
            lx, l2 = lx + w * value * new, l2 + w * new * new
            better = open_ & (new != old) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            if not positive:
                better &= l2 > 0
            codes[i] = torch.where(better, new, old)
            sum_lx, sum_l2 = torch.where(better, lx, sum_lx), torch.where(better, l2, sum_l2)
            changed |= bool(better.any())
        if not changed:
            break
    return _Fit(codes, torch.where(sum_l2 > 0, sum_lx / sum_l2, 0.0), torch.zeros_like(sum_l2))


def _fit_three_bits(x: Tensor) -> _Fit:
    """Q3_K's codes 0 … 7 without importance: by rounding, then by coordinate."""
    peak = peak_of(x)
    none = peak.abs() < TINY
    codes = nearest(torch.tensor(-4.0) / torch.where(none, 1.0, peak) * x).clamp(-4, 3)
    found = _descend(x, x * x, codes, -4, 3, positive=False)
    return _Fit(torch.where(none, 0.0, found.codes + 4), torch.where(none, 0.0, found.scale), found.low)


def _fit_positive(x: Tensor, weight: Tensor, top: int) -> _Fit:
    """Codes 0 … top of scales or minima, which are not negative."""
    peak = x.amax(0)
    none = peak < TINY
    peak = torch.where(none, 1.0, peak)

    def trial(inverse: Tensor) -> tuple[Tensor, Tensor]:
        codes = nearest(inverse * x).clamp(max=top)
        difference = x - 1 / inverse * codes
        return codes, total(weight * difference * difference)

    codes, best = trial(_quotient(top, peak))
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        others, error = trial((torch.tensor(0.1) * step + top) / peak)
        better = error < best
        codes, best = torch.where(better, others, codes), torch.where(better, error, best)
    found = _descend(x, weight, codes, 0, top, positive=True)
    return _Fit(torch.where(none, 0.0, found.codes), torch.where(none, 0.0, found.scale), found.low)


def _steps(first: float, step: float, last: int) -> list[float]:
    """first + step · i for i = 0 … last, in float32."""
    return [float(torch.tensor(first) + torch.tensor(step) * i) for i in range(last + 1)]


def _member_weights(x: Tensor, importance: Tensor, variance: Tensor) -> Tensor:
    return importance * _root(variance + x * x)


def _block_squares(x: Tensor, per: int) -> Tensor:
    """Σ x² of each block of `per` groups, `[blocks]`, in order."""
    blocks = (x * x).T.reshape(-1, per * len(x)).T
    return total(blocks)


def by_block(values: Tensor, per: int) -> Tensor:
    """`[groups]` to `[per, blocks]`."""
    return values.view(-1, per).T.contiguous()


def _with_minimum(rows: Rows, top: int, size: int, small_top: int, tries: list[float], absolute: bool) -> Parts:
    """Q2_K, Q4_K, Q5_K."""
    x, importance = rows.groups(size)
    per = rows.elements // size
    if importance is None:
        weight = x.abs() if absolute else _root(total(x * x) / size) + x.abs()
        fit = _fit_range(x, weight, top, tries, absolute)
        d, scales = _plain_factors(by_block(fit.scale, per), small_top)
        dmin, minima = _plain_factors(by_block(fit.low, per), small_top)
    else:
        squares = _block_squares(x, per)
        variance = (squares if absolute else 2 * squares) / rows.elements
        weight = _member_weights(x, importance, variance.repeat_interleave(per))
        fit = _fit_range(x, weight, top, _steps(-0.9, 0.05, 36), False)
        share = by_block(total(weight), per)
        fitted = _fit_positive(by_block(fit.scale, per), share, small_top)
        lows = _fit_positive(by_block(fit.low, per), share, small_top)
        d, scales, dmin, minima = fitted.scale, fitted.codes, lows.scale, lows.codes
    step = (f16(d) * scales).T.flatten()
    least = (f16(dmin) * minima).T.flatten()
    again = nearest((x + least) / torch.where(step != 0, step, 1.0)).clamp(0, top)
    codes = torch.where(step != 0, again, fit.codes)
    small = (scales.T.to(torch.uint8), minima.T.to(torch.uint8))
    return Parts(codes_of(codes, rows.elements), *small, d.half()[:, None], dmin.half()[:, None])


def _plain_factors(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The outer factor `[blocks]` and small ones `[per, blocks]` of values: by the largest."""
    largest = values.amax(0).clamp(min=0) + 0.0  # no -0
    inverse = torch.where(largest > 0, _quotient(top, largest), 0.0)
    return largest / top, nearest(inverse * values).clamp(0, top)


def codes_of(codes: Tensor, elements: int) -> Tensor:
    return codes.to(torch.uint8).T.reshape(-1, elements)


def _q3_k(rows: Rows) -> Parts:
    x, importance = rows.groups(16)
    if importance is None:
        fit = _fit_three_bits(x)
        scales = by_block(fit.scale, 16)
        peak = peak_of(scales)
        inverse = torch.where(peak != 0, -32 / peak, 0.0)
        small = torch.where(peak != 0, nearest(inverse * scales).clamp(-32, 31), -32.0)
        d = inverse_of(inverse)
    else:
        variance = 2 * _block_squares(x, 16) / 256
        weight = _member_weights(x, importance, variance.repeat_interleave(16))
        fit = _fit_signed(x, weight, 4)
        outer = _fit_signed(by_block(fit.scale, 16), by_block(total(weight), 16), 32)
        small, d = outer.codes - 32, outer.scale
    step = (f16(d) * small).T.flatten()
    again = nearest(x / torch.where(step != 0, step, 1.0)).clamp(-4, 3) + 4
    codes = torch.where(step != 0, again, fit.codes)
    return Parts(codes_of(codes, 256), small.T.to(torch.int8), d=d.half()[:, None])


def _q6_k(rows: Rows) -> Parts:
    x, importance = rows.groups(16)
    fit = _fit_signed(x, x * x if importance is None else importance, 32)
    scales = by_block(fit.scale, 16)
    peak = peak_of(scales)
    none = peak.abs() < TINY
    inverse = -128 / torch.where(none, 1.0, peak)
    small = torch.where(none, 0.0, nearest(inverse * scales).clamp(max=127))
    d = torch.where(none, 0.0, 1 / inverse)
    step = (f16(d) * small).T.flatten()
    again = nearest(x / torch.where(step != 0, step, 1.0)).clamp(-32, 31) + 32
    codes = torch.where(none.repeat_interleave(16), 0.0, torch.where(step != 0, again, fit.codes))
    return Parts(codes_of(codes, 256), small.T.to(torch.int8), d=d.half()[:, None])


def _row_weights(rows: Rows, x: Tensor, importance: Tensor) -> Tensor:
    """Of the simple types: the variance is that of the row."""
    columns = rows.weight.shape[1]
    variance = total((rows.weight * rows.weight).T) / columns
    return _member_weights(x, importance, variance.repeat_interleave(columns // len(x)))


def _plain_signed(rows: Rows, half: int) -> Parts:
    """Q4_0, Q5_0."""
    x, importance = rows.groups(32)
    if importance is not None:
        fit = _fit_signed(x, _row_weights(rows, x, importance), half)
        return Parts(codes_of(fit.codes, 32), d=fit.scale.half()[:, None])
    d = peak_of(x) / -half
    codes = (x * inverse_of(d) + (half + 0.5)).trunc().clamp(max=2 * half - 1)
    return Parts(codes_of(codes, 32), d=d.half()[:, None])


def _plain_range(rows: Rows, top: int) -> Parts:
    """Q4_1, Q5_1."""
    x, importance = rows.groups(32)
    if importance is not None:
        fit = _fit_range(x, _row_weights(rows, x, importance), top, _steps(-0.9, 0.05, 36), False)
        return Parts(codes_of(fit.codes, 32), d=fit.scale.half()[:, None], dmin=(-fit.low).half()[:, None])
    low = least_of(x)
    d = (x.amax(0) - low) / top + 0.0  # no -0, which amax may take for 0
    codes = ((x - low) * inverse_of(d) + 0.5).trunc().clamp(max=top)
    return Parts(codes_of(codes, 32), d=d.half()[:, None], dmin=low.half()[:, None])


def _q8_0(rows: Rows) -> Parts:
    x, _ = rows.groups(32)
    d = x.abs().amax(0) / 127
    relative = x * inverse_of(d)
    whole = relative.trunc()  # half away from zero, as roundf: relative + 0.5 would round 0.49999997 up
    codes = whole + torch.where((relative - whole).abs() >= 0.5, relative.sign(), 0.0)
    return Parts(codes_of(codes + 128, 32), d=d.half()[:, None])


def nearest_entry(x: Tensor) -> Tensor:
    """The index of the nearest number of IQ4's table; the upper one of two that are as near."""
    table = torch.tensor(IQ4_TABLE, dtype=torch.float32, device=x.device)
    upper = torch.searchsorted(table, x, right=True).clamp(1, 15)
    return torch.where(x - table[upper - 1] < table[upper] - x, upper - 1, upper)


def _iq4(rows: Rows) -> Parts:
    x, importance = rows.groups(32)
    per = rows.elements // 32
    table = torch.tensor(IQ4_TABLE, dtype=torch.float32, device=x.device)
    if importance is None:
        weight = x * x
    else:
        variance = _block_squares(x, per) * (2.0 / rows.elements)
        weight = _member_weights(x, importance, variance.repeat_interleave(per))
    peak = peak_of(x)
    none = peak.abs() < TINY
    peak = torch.where(none, 1.0, peak)

    def trial(inverse: Tensor) -> tuple[Tensor, Tensor]:
        values = table[nearest_entry(inverse * x)]
        weighted = weight * values
        return total(weighted * x), total(weighted * values)

    sum_qx, sum_q2 = trial(1 / (-peak / table[0]))
    d = sum_qx / sum_q2
    best = d * sum_qx
    for step in range(-7, 8):
        sum_qx, sum_q2 = trial((step + table[0]) / peak)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        d = torch.where(better, sum_qx / sum_q2, d)
        best = torch.where(better, d * sum_qx, best)
    d = torch.where(none, 0.0, d)
    if per == 1:
        return Parts(codes_of(nearest_entry(inverse_of(d) * x), 32), d=d.half()[:, None])
    scales = by_block(d, per)
    outer = -peak_of(scales) / 32
    small = nearest(inverse_of(outer) * scales).clamp(-32, 31)
    codes = nearest_entry(inverse_of((outer * small).T.flatten()) * x)
    return Parts(codes_of(codes, 256), small.T.to(torch.int8), d=outer.half()[:, None])


def _mxfp4(rows: Rows) -> Parts:
    x, _ = rows.groups(32)
    largest = x.abs().amax(0)
    exponent = (
        torch.where(largest > 0, largest.double().log2().float().floor() + 125, 0.0).clamp(0, 254).to(torch.uint8)
    )
    d = half_e8m0(exponent)
    codes, best = torch.zeros_like(x), x.abs()
    for code, value in enumerate(E2M1_TABLE):
        error = (value * d - x).abs()
        better = error < best
        codes, best = torch.where(better, float(code), codes), torch.where(better, error, best)
    return Parts(codes_of(codes, 32), exponent[:, None])


PLAIN: Final[dict[str, Search]] = {
    "Q4_0": partial(_plain_signed, half=8),
    "Q4_1": partial(_plain_range, top=15),
    "Q5_0": partial(_plain_signed, half=16),
    "Q5_1": partial(_plain_range, top=31),
    "Q8_0": _q8_0,
    "Q2_K": partial(_with_minimum, top=3, size=16, small_top=15, tries=_steps(-0.5, 0.1, 15), absolute=True),
    "Q3_K": _q3_k,
    "Q4_K": partial(_with_minimum, top=15, size=32, small_top=63, tries=_steps(-1.0, 0.1, 20), absolute=False),
    "Q5_K": partial(_with_minimum, top=31, size=32, small_top=63, tries=_steps(-0.5, 0.1, 15), absolute=False),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4,
    "IQ4_XS": _iq4,
    "MXFP4": _mxfp4,
}
WRITABLE_TYPES: Final = tuple(PLAIN)
