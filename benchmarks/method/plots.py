"""The three pictures of the page: roofline, speed-up against M, bytes against perplexity. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..peers import CONTROL
from .results import Row, Run

_COLOURS = (
    "#0b6e4f",
    "#c8553d",
    "#3d5a98",
    "#8a6fb0",
    "#b08a2e",
    "#5b8e9e",
    "#7a7a7a",
    "#d18fb0",
    "#4aa3df",
    "#2b2b2b",
)  # one each, also told apart in grey
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _candidates(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each; ours come first."""
    names = sorted({row.candidate for row in rows}, key=lambda name: (not name.startswith("qkernels"), name))
    return {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def _ticks(axes: Any, tokens: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(M) for M in tokens])
    axes.xaxis.set_minor_locator(NullLocator())


def roofline(run: Run, rows: Sequence[Row], title: str, path: Path) -> Path:
    """TFLOP/s against operations a byte, under the roofs measured in the run (Williams et al. 2009)."""
    figure, axes = _figure(title, "operations per byte moved", "TFLOP/s")
    # The memory's rate may change during a run (by 75 % on a virtual machine): the roof is the highest read beside a row.
    beside = [row.gbs / row.read_percent[0] * 100 for row in rows if row.gbs and row.read_percent]
    bandwidth = max(run.roofs["copy_gbs"], run.roofs["read_gbs"], *beside) / 1e3
    rate = max(run.roofs["matrix_tflops"].values())
    shown = [row for row in rows if row.tflops and row.gbs]
    intensity = {id(row): row.tflops / (row.gbs / 1e3) for row in shown if row.tflops and row.gbs}
    low, high = min(intensity.values()) / 2, max([*intensity.values(), rate / bandwidth]) * 2
    xs = [low, rate / bandwidth, high]
    axes.plot(xs, [min(x * bandwidth, rate) for x in xs], color="#222222", linewidth=1.6, zorder=1)
    axes.annotate(
        f"{rate:.3g} TFLOP/s",
        (high, rate),
        ha="right",
        va="bottom",
        fontsize=9,
        xytext=(0, 3),
        textcoords="offset points",
    )
    slope = (low * rate / bandwidth) ** 0.5
    axes.annotate(f"{bandwidth * 1e3:.0f} GB/s", (slope, slope * bandwidth), ha="right", va="bottom", fontsize=9,
                  xytext=(-6, 2), textcoords="offset points")  # fmt: skip
    for name, (colour, marker) in _candidates(shown).items():
        mine = sorted((row for row in shown if row.candidate == name), key=lambda row: row.M)
        axes.plot([intensity[id(r)] for r in mine], [r.tflops for r in mine], color=colour, marker=marker, markersize=5,
                  linewidth=1.1, label=name)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return _save(figure, path)


def speed_up(rows: Sequence[Row], title: str, path: Path) -> Path:
    """Time of the unquantized layer over each candidate's, against M; a ratio of medians, the band where the intervals allow."""
    figure, axes = _figure(title, "tokens (M)", f"speed-up over {CONTROL}")
    base = {row.M: row for row in rows if row.candidate == CONTROL and row.us}
    shown = [row for row in rows if row.us and row.M in base and row.candidate != CONTROL]
    for name, (colour, marker) in _candidates(shown).items():
        mine = sorted((row for row in shown if row.candidate == name), key=lambda row: row.M)
        ratio = [(base[r.M].us or 0) / (r.us or 1) for r in mine]
        low = [(base[r.M].us_low or 0) / (r.us_high or 1) for r in mine]
        high = [(base[r.M].us_high or 0) / (r.us_low or 1) for r in mine]
        tokens = [r.M for r in mine]
        axes.plot(tokens, ratio, color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1, color="#222222", linewidth=1)
    _ticks(axes, sorted({row.M for row in shown}))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)


def bytes_against_perplexity(rows: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    """One point a method and width; down and left is better."""
    figure, axes = _figure(title, "MiB of weights", "perplexity")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    labelled: list[tuple[str, float, float]] = []
    for i, method in enumerate(methods):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: float(row["bytes"]))
        xs, ys = [row["bytes"] / 2**20 for row in mine], [row["perplexity"] for row in mine]
        axes.plot(
            xs,
            ys,
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=6,
            linewidth=1.1,
            label=method,
        )
        for row, x, y in zip(mine, xs, ys, strict=True):
            near = [
                (X, Y)
                for label, X, Y in labelled
                if label == row["label"] and abs(X / x - 1) < 0.05 and abs(Y / y - 1) < 0.01
            ]
            if near:
                continue  # two labels on top of each other are none
            labelled.append((row["label"], x, y))
            axes.annotate(str(row["label"]), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=9)
    return _save(figure, path)
