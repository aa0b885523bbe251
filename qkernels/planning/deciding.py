"""What to take of a plan's rows, in a sentence, and what making it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ..layerwise.preview import preview_of
from ..nn.selection import Selection
from ..reports import readable_size
from ..texts import DEFAULT_SEQ_LEN, capped
from .measured import LARGEST_KL, Candidate, Seconds
from .models import Planned
from .rows import PlanRow

Prefer = Literal["quality", "speed", "size"]
SAMPLES = 128  # windows of calibration, as `qkernels quantize` takes them


def taken(rows: Sequence[PlanRow], prefer: Prefer) -> PlanRow | None:
    """The row to take; None where none fits. Rows that are tight come after those that are not, and after all of them rows that
    lose more than `LARGEST_KL`."""
    fitting = [row for row in rows if row.fits]
    near = [row for row in fitting if row.kl is None or row.kl <= LARGEST_KL] or fitting
    good = [row for row in near if row.verdict == "fits"] or near
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


def costs(
    planned: Planned, candidate: Candidate, selection: Selection, weights: int, file: int, seconds: Seconds
) -> str | None:
    """What `qkernels quantize` takes to make this form of so many weights in a file of so many bytes; None where there is nothing
    to make, or no file to make it of.

    Args:
        seconds: by method, as `SECONDS`.
    """
    if candidate.scheme is None or planned.checkpoint is None:
        return None
    tokens, methods = 0, candidate.parts or (candidate.format,)
    if candidate.options is None:  # a GGUF file, made tensor by tensor
        largest = max((math.prod(planned.checkpoint.shape(name)) for name in planned.checkpoint.names()), default=0)
        text = f"making {candidate.scheme}: one tensor in memory at a time, the largest {readable_size(4 * largest)} in float32, "
        text += f"{readable_size(file)} of disk"
    else:
        options, seq_len = candidate.options.with_scheme(candidate.scheme), capped(planned.model, DEFAULT_SEQ_LEN)
        found = preview_of(
            planned.checkpoint, planned.model, options, dict.fromkeys(selection.every, options), {}, SAMPLES, seq_len
        )
        text = f"making {candidate.scheme}: {readable_size(found.device_bytes)} to compute a layer, "
        if candidate.calibrated:
            tokens = SAMPLES * seq_len
            text += f"{readable_size(found.host_bytes)} for activations of {SAMPLES} x {seq_len} tokens, "
        text += f"{readable_size(found.disk_bytes)} of disk"
    if not all(method in seconds.by_method for method in methods):
        return text
    fixed, a_thousand = (sum(seconds.by_method[method][i] for method in methods) for i in range(2))
    minutes = weights / 1e9 * (fixed + a_thousand * tokens / 1000) / 60
    return f"{text}; about {minutes:.2g} min ({seconds.source})"
