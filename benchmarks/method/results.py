"""A row of kernels beside peers, a run of rows, and their forms: a result file (complete), CSV (flat), Markdown (for people)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qkernels.errors import ArgumentError
from qkernels.text import table as markdown_table

from . import envelope

KIND = "kernels"


@dataclass(frozen=True)
class Row:
    """One candidate on one problem. `us` is None where there is no number, and `reason` then says why.

    Args:
        model, layer, N, K, M, scheme, dtype: the problem.
        candidate: a kernel of ours ("qkernels cpu.cpu_tile_a16") or a peer.
        ours: whether it is ours.
        us, us_low, us_high: median time of a call in microseconds, with its 99 % confidence interval.
        gbs: weight bytes with scales and zero points, plus x and y, in 1e9 a second.
        tflops: 2 M N K in 1e12 a second.
        roof_percent: the least time that the roofs allow over the time taken: memory as it was read in the same rounds, and the
            run's matrix rate.
        read_percent: [median, low, high] of the row's GB/s over the memory's, which was read in the same rounds.
        ratios: peer -> [median, low, high] of its time over ours, paired by round; above 1, ours is faster.
        cold_bytes: what the weight copies are worth together; below 4 caches the time is not that of a cold weight.
        samples_us: every sample, in order of rounds.
        reason, note: why there is no number; what to know about the candidate.
    """

    model: str
    layer: str
    N: int
    K: int
    M: int
    scheme: str
    dtype: str
    candidate: str
    ours: bool
    us: float | None = None
    us_low: float | None = None
    us_high: float | None = None
    gbs: float | None = None
    tflops: float | None = None
    roof_percent: float | None = None
    read_percent: list[float] | None = None
    ratios: dict[str, list[float]] = field(default_factory=dict)
    cold_bytes: int = 0
    samples_us: list[float] = field(default_factory=list)
    reason: str | None = None
    note: str = ""

    @property
    def problem(self) -> tuple[Any, ...]:
        return (self.model, self.layer, self.N, self.K, self.M, self.scheme, self.dtype)


@dataclass(frozen=True)
class Run:
    """Everything that one run measured, with what it depends on."""

    environment: dict[str, Any]
    roofs: dict[str, Any]
    rows: list[Row]
    absent: dict[str, str] = field(default_factory=dict)  # peers that have no row at all -> why
    host_us: dict[str, float] = field(default_factory=dict)  # kernel -> host time of a call


def to_json(run: Run) -> str:
    """The text of a result file (`envelope`) of kind "kernels"."""
    return envelope.to_json(_sealed(run))


def _sealed(run: Run) -> envelope.Envelope:
    conditions = {"roofs": run.roofs, "absent": run.absent, "host_us": run.host_us}
    return envelope.sealed(KIND, run.environment, [asdict(row) for row in run.rows], conditions)


def read(path: str | Path) -> Run:
    """A run that `write` wrote, or `qkernels bench --json` printed.

    Raises:
        ArgumentError: not such a file, or of another version.
    """
    found = envelope.read(path, KIND)
    try:
        parts = {name: found.conditions[name] for name in ("roofs", "absent", "host_us")}
        return Run(envelope.where_of(found), rows=[Row(**row) for row in found.rows], **parts)
    except (KeyError, TypeError) as error:
        raise ArgumentError(
            f"{path} must hold rows that `qkernels bench --json` wrote: {type(error).__name__} {error}"
        ) from None


def write(run: Run, path: Path) -> None:
    """Whole or not at all: a stop in the middle leaves the file that was there."""
    envelope.write(_sealed(run), path)


def merged(old: Run, new: Run) -> Run:
    """Rows of both; place, roofs and host times of the newer. Who has a number in one of them is not absent."""
    rows = [*old.rows, *new.rows]
    present = {row.candidate for row in rows}
    absent = {name: why for name, why in (old.absent | new.absent).items() if name not in present}
    return replace(new, rows=rows, absent=absent)


def to_csv(rows: Sequence[Row]) -> str:
    """One line a row, without samples; ratios as `peer=median` pairs."""
    names = [f.name for f in fields(Row) if f.name not in ("samples_us", "ratios", "read_percent")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "read_percent", "ratios"])
    for row in rows:
        ratios = ";".join(f"{peer}={ratio[0]:.4g}" for peer, ratio in row.ratios.items())
        values = ["" if (v := getattr(row, name)) is None else v for name in names]
        writer.writerow([*values, f"{row.read_percent[0]:.4g}" if row.read_percent else "", ratios])
    return out.getvalue()


def to_markdown(run: Run) -> str:
    """Tables by layer, then the peers without a number and the reasons, then where it was measured."""
    blocks = []
    for key in dict.fromkeys((r.model, r.layer, r.N, r.K, r.scheme, r.dtype) for r in run.rows):
        rows = [r for r in run.rows if (r.model, r.layer, r.N, r.K, r.scheme, r.dtype) == key]
        model, layer, N, K, scheme, dtype = key
        blocks.append(f"### {model} {layer}: N={N} K={K}, {scheme}, {dtype}\n\n{_table(rows)}")
    if run.host_us:
        blocks.append("Host time of a call: " + ", ".join(f"{name} {us:.1f} µs" for name, us in run.host_us.items()))
    if run.absent:
        blocks.append("Without a number:\n\n" + "\n".join(f"* {name}: {why}" for name, why in run.absent.items()))
    return "\n\n".join([*blocks, _place(run)]) + "\n"


def _table(rows: list[Row]) -> str:
    header = ["M", "candidate", "µs", "±", "GB/s", "TFLOP/s", "% of roof", "% of read", "peer time / ours"]
    lines, never = [], {}
    for row in rows:
        same = {r.reason for r in rows if r.candidate == row.candidate}
        if same == {row.reason} and row.reason is not None:
            never[row.candidate] = row.reason
        elif row.us is None:
            lines.append([str(row.M), row.candidate, "–", "", "", "", "", "", row.reason or ""])
        if row.us is None:
            continue
        half = max((row.us_high or row.us) - row.us, row.us - (row.us_low or row.us)) / row.us
        ratios = ", ".join(f"{peer} {ratio[0]:.2f}" for peer, ratio in row.ratios.items())
        lines.append([
            str(row.M), row.candidate, f"{row.us:.4g}", f"{half:.0%}", f"{row.gbs or 0:.1f}", f"{row.tflops or 0:.3g}",
            f"{row.roof_percent or 0:.0f}", f"{row.read_percent[0]:.0f}" if row.read_percent else "", ratios or row.note,
        ])  # fmt: skip
    table = markdown_table(header, lines) if lines else "No candidate has a number."
    reasons = "\n".join(f"* {name}: {why}" for name, why in never.items())
    return f"{table}\n\n{reasons}" if reasons else table


def _place(run: Run) -> str:
    e, roofs, quiet = run.environment, run.roofs, run.environment.get("quiet", {})
    rates = ", ".join(f"{rate:.3g} TFLOP/s {name}" for name, rate in roofs.get("matrix_tflops", {}).items())
    where = e.get("gpu", {}).get("name") or f"{e.get('cpu')}, {e.get('threads')} threads, {e.get('isa')}"
    drift = f", drift {roofs['drift']:+.0%}" if roofs.get("drift") is not None else ""
    lines = [
        f"{where}; torch {e.get('torch')}, qkernels {e.get('commit')}, {e.get('date')}",
        f"roofs measured in this run: copy {roofs.get('copy_gbs', 0):.1f} GB/s, read {roofs.get('read_gbs', 0):.1f} GB/s, "
        f"{rates}{drift}",
    ]
    if quiet and not quiet["quiet"]:
        lines.append(
            f"**This machine was not quiet** (jitter {quiet['jitter']:.0%}, load {quiet['load']}): ratios within a round hold "
            "better than absolute times, and neither is a claim."
        )
    return "\n\n".join(lines)
