"""Float weights to GGUF blocks with less weighted error than llama.cpp's searches leave, in the same formats.

What is minimized is Σ importance · (ŵ - w)², of which an input's mean square makes the expected squared error of the output
(with inputs taken as uncorrelated); without importance every column counts alike. Where llama.cpp fits a group, rounds its scale
to what the format holds and leaves it there, this goes on: a group is fitted from many widths, the outer factors are chosen to
fit all groups of a block, every small scale and minimum is tried beside its neighbours with the codes made again, and then the
outer factors are fitted to the codes; what does not lower the error is not taken. Of a block that is found so and the plain one,
the better stays. All sums in order and in float32, as in `search.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import Final

import torch
from torch import Tensor

from .parts import E2M1_TABLE, IQ4_TABLE, Parts, half_e8m0
from .search import (
    PLAIN,
    TINY,
    Rows,
    Search,
    by_block,
    codes_of,
    f16,
    inverse_of,
    least_of,
    nearest,
    nearest_entry,
    peak_of,
    total,
)
from .types import block_type

# Of the range of a group: above 1 the largest weights are clipped.
_WIDTHS: Final = (0.86, 0.9, 0.94, 0.98, 1.0, 1.03, 1.06, 1.1, 1.15, 1.22, 1.32, 1.5, 1.8)
# Of both ends of a range: shares of their distance from the weighted mean.
_SHARES: Final = (1.05, 1.0, 0.95, 0.87, 0.68)
_ROUNDS: Final = 2

Round = Callable[[Tensor], Tensor]  # to the nearest value of a grid


def _integers(low: int, high: int) -> Round:
    return lambda x: nearest(x.clamp(low, high))


def _iq4(x: Tensor) -> Tensor:
    return torch.tensor(IQ4_TABLE, dtype=torch.float32, device=x.device)[nearest_entry(x)]


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A scale `[groups]`, and Σ w v² and Σ w x v of the values v that it gives."""

    scale: Tensor
    squares: Tensor
    products: Tensor


def _fit_scale(x: Tensor, weight: Tensor, grid: Round, ends: Iterable[float]) -> _Scaled:
    """The scale with the least error: widths around the largest member, at either end of the grid, then three rounds of rounding
    and fitting."""
    weighted = weight * x
    largest = peak_of(x)
    none = largest.abs() < TINY
    largest = torch.where(none, 1.0, largest)
    scale = torch.zeros_like(largest)
    squares, products, best = torch.zeros_like(scale), torch.zeros_like(scale), torch.zeros_like(scale)

    def trial(factor: Tensor) -> None:
        nonlocal scale, squares, products, best
        values = grid(factor * x)
        lx, l2 = total(weighted * values), total(weight * values * values)
        better = (l2 > 0) & (lx * lx > best * l2)
        scale = torch.where(better, lx / l2, scale)
        best = torch.where(better, scale * lx, best)
        squares, products = torch.where(better, l2, squares), torch.where(better, lx, products)

    for end in ends:
        for width in _WIDTHS:
            trial(torch.tensor(width) * torch.tensor(end) / largest)
    for _ in range(3):
        trial(inverse_of(scale))
    return _Scaled(torch.where(none, 0.0, scale), squares, products)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def _error(x: Tensor, weight: Tensor, values: Tensor, step: Tensor) -> Tensor:
    difference = step * values - x
    return total(weight * difference * difference)


def _weights(rows: Rows, size: int) -> tuple[Tensor, Tensor]:
    x, importance = rows.groups(size)
    return x, torch.ones_like(x) if importance is None else importance


def _one_scale(rows: Rows, grid: Round, ends: tuple[float, ...], code: Callable[[Tensor], Tensor]) -> Parts:
    """Q4_0, Q5_0, Q8_0, IQ4_NL."""
    x, weight = _weights(rows, 32)
    d = f16(_fit_scale(x, weight, grid, ends).scale)
    best = _error(x, weight, grid(inverse_of(d) * x), d)
    for near in (1 - 2.0**-11, 1 + 2.0**-10):  # the halves beside it
        other = f16(d * near)
        error = _error(x, weight, grid(inverse_of(other) * x), other)
        d, best = torch.where(error < best, other, d), torch.where(error < best, error, best)
    return Parts(codes_of(code(inverse_of(d) * x), 32), d=d.half()[:, None])


def _signed_blocks(
    rows: Rows, size: int, grid: Round, ends: tuple[float, ...], half: int, code: Callable[[Tensor], Tensor]
) -> Parts:
    """Q3_K, Q6_K, IQ4_XS: small scales -half … half - 1."""
    x, weight = _weights(rows, size)
    per = rows.elements // size
    fit = _fit_scale(x, weight, grid, ends)
    scales, shares = by_block(fit.scale, per), by_block(fit.squares, per)
    d = f16(_fit_scale(scales, shares, _integers(-half, half - 1), (-half, half - 1)).scale)
    small = nearest((inverse_of(d) * scales).clamp(-half, half - 1))

    def tried(d: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The error, and the sums of a fit, of each group."""
        step = (d * small).T.flatten()
        values = grid(inverse_of(step) * x)
        return _error(x, weight, values, step), total(weight * x * values), total(weight * values * values)

    error, products, squares = tried(d, small)
    for _ in range(_ROUNDS):
        start = small
        for change in (-1, 1):
            other = (start + change).clamp(-half, half - 1)
            found = tried(d, other)
            better = found[0] < error
            small = torch.where(by_block(better, per), other, small)
            error = torch.where(better, found[0], error)
            products, squares = torch.where(better, found[1], products), torch.where(better, found[2], squares)
        up, down = total(small * by_block(products, per)), total(small * small * by_block(squares, per))
        again = f16(torch.where(down > 0, up / down, d))
        found = tried(again, small)
        better = total(by_block(found[0], per)) < total(by_block(error, per))
        d, each = torch.where(better, again, d), better.repeat_interleave(per)
        error = torch.where(each, found[0], error)
        products, squares = torch.where(each, found[1], products), torch.where(each, found[2], squares)
    step = (d * small).T.flatten()
    return Parts(codes_of(code(inverse_of(step) * x), rows.elements), small.T.to(torch.int8), d=d.half()[:, None])


@dataclass(frozen=True, eq=False)
class _Line:
    """w ≈ scale · code + start of each group."""

    scale: Tensor
    start: Tensor


def _line(weight: Tensor, x: Tensor, codes: Tensor, below: bool, sum_w: Tensor, sum_x: Tensor) -> _Line:
    """The weighted least-squares line; `below`: start is at most 0."""
    weighted = weight * codes
    l1, l2, lx = total(weighted), total(weighted * codes), total(weighted * x)
    determinant = sum_w * l2 - l1 * l1
    sound = determinant > 0
    scale = torch.where(sound, (sum_w * lx - sum_x * l1) / determinant, 0.0)
    start = torch.where(sound, (l2 * sum_x - l1 * lx) / determinant, _share(sum_x, sum_w))
    if below:
        above = start > 0
        scale = torch.where(above, torch.where(l2 > 0, lx / l2, 0.0), scale)
        start = torch.where(above, 0.0, start)
    return _Line(scale, start)


def _fit_line(x: Tensor, weight: Tensor, top: int, below: bool) -> _Line:
    sum_w, sum_x = total(weight), total(weight * x)
    centre = _share(sum_x, sum_w)
    low, high = least_of(x), x.amax(0)
    if below:
        low = torch.where(low > 0, 0.0, low)
    scale, start = torch.zeros_like(low), torch.where(centre > 0, 0.0, centre) if below else centre
    best = torch.full_like(low, torch.inf)

    def round_(line: _Line) -> Tensor:
        return nearest(((x - line.start) * inverse_of(line.scale)).clamp(0, top))

    def keep(line: _Line, codes: Tensor) -> None:
        nonlocal scale, start, best
        difference = line.scale * codes + line.start - x
        error = total(weight * difference * difference)
        better = error < best
        scale, start = torch.where(better, line.scale, scale), torch.where(better, line.start, start)
        best = torch.where(better, error, best)

    for at_low, at_high in product(_SHARES, _SHARES):
        first, last = centre + torch.tensor(at_low) * (low - centre), centre + torch.tensor(at_high) * (high - centre)
        line = _line(weight, x, round_(_Line((last - first) / top, first)), below, sum_w, sum_x)
        codes = round_(line)
        keep(_line(weight, x, codes, below, sum_w, sum_x), codes)
    for _ in range(2):
        codes = round_(_Line(scale, start))
        keep(_line(weight, x, codes, below, sum_w, sum_x), codes)
    return _Line(scale, start)


def _one_line(rows: Rows, top: int) -> Parts:
    """Q4_1, Q5_1."""
    x, weight = _weights(rows, 32)
    sum_w, sum_x = total(weight), total(weight * x)
    fit = _fit_line(x, weight, top, below=False)
    d, start = f16(fit.scale), f16(fit.start)

    def codes_at(d: Tensor, start: Tensor) -> Tensor:
        return nearest(((x - start) * inverse_of(d)).clamp(0, top))

    def error(d: Tensor, start: Tensor) -> Tensor:
        difference = d * codes_at(d, start) + start - x
        return total(weight * difference * difference)

    best = error(d, start)
    for near in (1.0, 1 - 2.0**-11, 1 + 2.0**-10):
        other = f16(d * near)
        again = f16(_share(sum_x - other * total(weight * codes_at(other, start)), sum_w))
        found = error(other, again)
        better = found < best
        d, start = torch.where(better, other, d), torch.where(better, again, start)
        best = torch.where(better, found, best)
    return Parts(codes_of(codes_at(d, start), 32), d=d.half()[:, None], dmin=start.half()[:, None])


def _line_blocks(rows: Rows, size: int, top: int, small_top: int) -> Parts:
    """Q2_K, Q4_K, Q5_K."""
    x, weight = _weights(rows, size)
    per = rows.elements // size
    sum_w, sum_x = total(weight), total(weight * x)
    fit = _fit_line(x, weight, top, below=True)
    codes = nearest(((x - fit.start) * inverse_of(fit.scale)).clamp(0, top))
    l1, l2 = total(weight * codes), total(weight * codes * codes)
    shares, scales = by_block((l2 - _share(l1 * l1, sum_w)).clamp(min=0), per), by_block(fit.scale, per)
    whole = _integers(0, small_top)
    d = f16(_fit_scale(scales, shares, whole, (small_top,)).scale.clamp(min=0))
    small = whole(inverse_of(d) * scales)
    lows = _share((d * small) * by_block(l1, per) - by_block(sum_x, per), by_block(sum_w, per)).clamp(min=0)
    dmin = f16(_fit_scale(lows, by_block(sum_w, per), whole, (small_top,)).scale.clamp(min=0))
    minima = whole(inverse_of(dmin) * lows)

    def tried(d: Tensor, dmin: Tensor, small: Tensor, minima: Tensor) -> tuple[Tensor, ...]:
        """The error, and the sums of a fit, of each group."""
        step, low = (d * small).T.flatten(), (dmin * minima).T.flatten()
        codes = nearest(((x + low) * inverse_of(step)).clamp(0, top))
        difference = step * codes - low - x
        weighted = weight * codes
        return total(weight * difference * difference), total(weighted), total(weighted * codes), total(weighted * x)

    best = tried(d, dmin, small, minima)
    for _ in range(_ROUNDS):
        start, below = small, minima
        for change in (0, -1, 1):
            for shift in (0, -1, 1):
                if change == shift == 0:
                    continue
                other, lower = (start + change).clamp(0, small_top), (below + shift).clamp(0, small_top)
                found = tried(d, dmin, other, lower)
                better = found[0] < best[0]
                among = by_block(better, per)
                small, minima = torch.where(among, other, small), torch.where(among, lower, minima)
                best = tuple(torch.where(better, a, b) for a, b in zip(found, best, strict=True))
        l1, l2, lx = (by_block(part, per) for part in best[1:])
        p, q, r = total(small * small * l2), total(small * minima * l1), total(minima * minima * by_block(sum_w, per))
        u, v = total(small * lx), total(minima * by_block(sum_x, per))
        determinant = p * r - q * q
        sound = determinant > 0
        both = (
            torch.where(sound, (u * r - q * v) / determinant, d),
            torch.where(sound, (q * u - p * v) / determinant, dmin),
        )
        alone = (p > 0) & (r <= 0)  # no minimum anywhere
        again = f16(torch.where(alone, u / p, both[0]).clamp(min=0)), f16(both[1].clamp(min=0))
        found = tried(*again, small, minima)
        better = total(by_block(found[0], per)) < total(by_block(best[0], per))
        d, dmin = torch.where(better, again[0], d), torch.where(better, again[1], dmin)
        each = better.repeat_interleave(per)
        best = tuple(torch.where(each, a, b) for a, b in zip(found, best, strict=True))
    step, low = (d * small).T.flatten(), (dmin * minima).T.flatten()
    codes = nearest(((x + low) * inverse_of(step)).clamp(0, top))
    pair = small.T.to(torch.uint8), minima.T.to(torch.uint8)
    return Parts(codes_of(codes, rows.elements), *pair, d.half()[:, None], dmin.half()[:, None])


def _mxfp4(rows: Rows) -> Parts:
    """The exponent of llama.cpp or one of its neighbours."""
    x, weight = _weights(rows, 32)
    largest = x.abs().amax(0)
    first = torch.where(largest > 0, largest.double().log2().float().floor() + 125, 0.0).clamp(0, 254)
    exponent, codes, best = first, torch.zeros_like(x), torch.full_like(largest, torch.inf)
    for change in (0, -1, 1):
        other = (first + change).clamp(0, 254)
        d = half_e8m0(other.to(torch.uint8))
        found, error = torch.zeros_like(x), x.abs()
        for code, value in enumerate(E2M1_TABLE):
            distance = (value * d - x).abs()
            better = distance < error
            found, error = torch.where(better, float(code), found), torch.where(better, distance, error)
        whole = total(weight * error * error)
        codes = torch.where(whole < best, found, codes)
        exponent, best = torch.where(whole < best, other, exponent), torch.where(whole < best, whole, best)
    return Parts(codes_of(codes, 32), exponent.to(torch.uint8)[:, None])


def _coded(low: int, high: int, zero: int) -> Callable[[Tensor], Tensor]:
    """Codes, of which `zero` means 0."""
    grid = _integers(low, high)
    return lambda x: grid(x) + zero


def _by_scale(search: Callable[..., Parts], low: int, high: int, **others: int) -> Search:
    return partial(search, grid=_integers(low, high), ends=(low, high), code=_coded(low, high, -low), **others)


_ANEW: Final[dict[str, Search]] = {
    "Q4_0": _by_scale(_one_scale, -8, 7),
    "Q4_1": partial(_one_line, top=15),
    "Q5_0": _by_scale(_one_scale, -16, 15),
    "Q5_1": partial(_one_line, top=31),
    "Q8_0": partial(_one_scale, grid=_integers(-127, 127), ends=(127,), code=_coded(-127, 127, 128)),
    "Q2_K": partial(_line_blocks, size=16, top=3, small_top=15),
    "Q3_K": _by_scale(_signed_blocks, -4, 3, size=16, half=32),
    "Q4_K": partial(_line_blocks, size=32, top=15, small_top=63),
    "Q5_K": partial(_line_blocks, size=32, top=31, small_top=63),
    "Q6_K": _by_scale(_signed_blocks, -32, 31, size=16, half=128),
    "IQ4_NL": partial(_one_scale, grid=_iq4, ends=(-127, 113), code=nearest_entry),
    "IQ4_XS": partial(_signed_blocks, grid=_iq4, ends=(-127, 113), code=nearest_entry, size=32, half=32),
    "MXFP4": _mxfp4,
}


def _error_of_blocks(rows: Rows, type: str, found: Parts) -> Tensor:
    """`[blocks]`, of the weights as they are decoded."""
    meaning = block_type(type).meaning
    assert meaning is not None
    x, weight = _weights(rows, meaning.group)
    difference = meaning.values(found).view(-1, meaning.group).T - x
    return total(by_block(total(weight * difference * difference), rows.elements // meaning.group))


def _better(rows: Rows, type: str) -> Parts:
    plain, anew = PLAIN[type](rows), _ANEW[type](rows)
    better = (_error_of_blocks(rows, type, anew) < _error_of_blocks(rows, type, plain))[:, None]

    def chosen(name: str) -> Tensor | None:
        ours, theirs = getattr(anew, name), getattr(plain, name)
        return None if ours is None else torch.where(better, ours, theirs)

    codes, *others = (chosen(field.name) for field in fields(Parts))
    assert codes is not None
    return Parts(codes, *others)


BEST: Final[dict[str, Search]] = {type: partial(_better, type=type) for type in PLAIN}
