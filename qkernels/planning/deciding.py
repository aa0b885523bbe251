"""What to take of a plan's rows, in a sentence, and what making it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..layerwise.preview import preview_of
from ..nn.selection import Selection
from ..reports import readable_size
from ..texts import DEFAULT_SEQ_LEN, capped
from .measured import CALIBRATED_SECONDS, LARGEST_KL, Candidate
from .models import Planned
from .rows import PlanRow

Prefer = Literal["quality", "speed", "size"]
SAMPLES = 128  # windows of calibration, as `qkernels quantize` takes them


def taken(rows: Sequence[PlanRow], prefer: Prefer) -> PlanRow | None:
    """The row to take; None where none fits. Rows that are tight, or lose more than `LARGEST_KL`, come after all others."""
    fitting = [row for row in rows if row.fits]
    clear = [row for row in fitting if row.verdict == "fits"] or fitting
    good = [row for row in clear if row.kl is None or row.kl <= LARGEST_KL] or clear
    if not good:
        return None
    if prefer == "size":
        return min(good, key=lambda row: row.total)
    if prefer == "speed":
        return min(good, key=lambda row: (-(row.tokens_per_s or (0.0, 0.0))[0], row.total))
    return good[0]


def decision(rows: Sequence[PlanRow], prefer: Prefer) -> str:
    """The last line: what to take, how, and what the next better would need."""
    runnable = [row for row in rows if row.verdict != "no kernel"]
    best = taken(rows, prefer)
    if best is None and not runnable:
        return f"Nothing runs there: no kernel takes these layers ({rows[-1].reasons[0]})."
    if best is None:
        least = min(runnable, key=lambda row: row.short)
        return (
            f"Nothing fits: the nearest is {least.scheme}, short by {readable_size(least.short)} ({least.longest} tokens of "
            f"context would fit); take a shorter context, a smaller --kv-dtype, a second --device, or a smaller model."
        )
    split = "" if best.layers_on is None else f", {best.layers_on} layers on the first device"
    tight = ", tight" if best.verdict == "tight" else ""
    line = f"Take {best.scheme}: {readable_size(best.total)} in all{split}{tight}: `{best.command}`."
    better = [row for row in rows[: rows.index(best)] if row.verdict in ("short", "tight")]
    if better:
        nearest = min(better, key=lambda row: row.short)
        more = f"needs {readable_size(nearest.short)} more" if nearest.short else "would be tight"
        line += f" The next better, {nearest.scheme}, {more}."
    return line


def costs(planned: Planned, candidate: Candidate, selection: Selection, weights: int) -> str | None:
    """What `qkernels quantize` takes to make this form of so many weights; None where there is nothing to make, or no file."""
    if candidate.options is None or candidate.scheme is None or planned.checkpoint is None:
        return None
    method = candidate.options.with_scheme(candidate.scheme)
    seq_len = capped(planned.model, DEFAULT_SEQ_LEN)
    found = preview_of(
        planned.checkpoint, planned.model, method, dict.fromkeys(selection.every, method), {}, SAMPLES, seq_len
    )
    text = f"making {candidate.scheme}: {readable_size(found.device_bytes)} to compute a layer, "
    if candidate.calibrated:
        text += f"{readable_size(found.host_bytes)} for activations of {SAMPLES} x {seq_len} tokens, "
    text += f"{readable_size(found.disk_bytes)} of disk"
    if not candidate.calibrated:
        return text
    minutes = weights / 1e9 * CALIBRATED_SECONDS / 60
    return f"{text}; at least {minutes:.2g} min on two cores (GPTQ, measured once), the passes of calibration on top"
