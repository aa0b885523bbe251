"""Two runs set against each other, row by row, with verdicts that know about noise (`statistics.verdict`)."""

from __future__ import annotations

from dataclasses import dataclass

from qkernels.text import table as markdown_table

from ..peers import CONTROL
from .results import Row, Run
from .statistics import Verdict, verdict


@dataclass(frozen=True)
class Comparison:
    """Verdicts of our rows that both runs have; `only_old`, `only_new`: rows that one of them lacks; `warnings`: what differs."""

    verdicts: list[tuple[Row, Verdict]]
    only_old: list[Row]
    only_new: list[Row]
    warnings: list[str]

    @property
    def slower(self) -> list[Row]:
        return [row for row, found in self.verdicts if found.word == "slower"]


def compare(old: Run, new: Run) -> Comparison:
    """Our kernels only: a peer is the control. Rows are matched by problem and candidate."""
    before, after = _rows(old), _rows(new)
    verdicts = []
    for key, row in after.items():
        if row.ours and key in before:
            control = (*row.problem, CONTROL)
            pair = (
                (before[control].samples_us, after[control].samples_us)
                if control in before and control in after
                else (None, None)
            )
            verdicts.append((row, verdict(before[key].samples_us, row.samples_us, *pair)))
    warnings = [
        f"{name}: {old.environment.get(name)} then, {new.environment.get(name)} now"
        for name in ("machine", "torch", "threads", "isa")
        if old.environment.get(name) != new.environment.get(name)
    ]
    only_old = [row for key, row in before.items() if row.ours and key not in after]
    only_new = [row for key, row in after.items() if row.ours and key not in before]
    return Comparison(verdicts, only_old, only_new, warnings)


def _rows(run: Run) -> dict[tuple[object, ...], Row]:
    return {(*row.problem, row.candidate): row for row in run.rows if row.us is not None}


def to_markdown(found: Comparison) -> str:
    """The table of verdicts, rows without a partner, and what differs between the runs."""
    lines = []
    for row, v in found.verdicts:
        beside = (
            ""
            if v.relative is None
            else f"{v.relative.median - 1:+.1%} [{v.relative.low - 1:+.0%}, {v.relative.high - 1:+.0%}]"
        )
        change = f"{v.change.median - 1:+.1%} [{v.change.low - 1:+.0%}, {v.change.high - 1:+.0%}]"
        word = f"**{v.word}**" if v.word in ("slower", "faster") else v.word
        lines.append([f"{row.model} {row.layer}", str(row.M), row.scheme, row.candidate, word, change, beside, v.why])
    header = ["layer", "M", "scheme", "kernel", "verdict", "time", f"in units of {CONTROL}", "why"]
    blocks = [markdown_table(header, lines) if lines else "The two runs have no row in common."]
    blocks += [f"* differs: {warning}" for warning in found.warnings]
    blocks += [f"* no longer measured: {r.model} {r.layer} M={r.M} {r.scheme}, {r.candidate}" for r in found.only_old]
    blocks += [f"* new: {r.model} {r.layer} M={r.M} {r.scheme}, {r.candidate}" for r in found.only_new]
    return "\n\n".join([blocks[0], "\n".join(blocks[1:])]).strip() + "\n"
