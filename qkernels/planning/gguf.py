"""A float model as the GGUF files that `qkernels quantize --type` would write of it, told from their headers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.gguf_plan import write_header
from ..checkpoint.gguf_writing import plan_mixes
from ..errors import ArgumentError, CheckpointError, ConversionError
from .models import Planned, planned_file


def as_gguf(planned: Planned, mixes: Sequence[str]) -> dict[str, Planned]:
    """The model in each of these mixes, planned as such a file is: `file` is all bytes of it, metadata among them.

    Raises:
        ArgumentError: there is no such mix.
        ConversionError: no GGUF file holds this model; or there are no files to make one of, whose tokenizer would go into it.
    """
    if planned.checkpoint is None:
        raise ConversionError("a GGUF file holds a tokenizer, too: it is planned of a directory with float weights")
    known = [mix.upper() for mix in mixes]
    forms = {}
    for mix, plan in plan_mixes(planned.checkpoint.path, known).items():
        with tempfile.TemporaryDirectory() as directory:
            found = planned_file(planned.name, write_header(plan, Path(directory)), planned.dtype)
        forms[mix] = replace(found, file=plan.file_nbytes)
    return forms


def gguf_forms(planned: Planned, mixes: Sequence[str], asked: bool) -> tuple[dict[str, Planned], str | None]:
    """As `as_gguf`; where nobody asked for them, why there are none instead of an error."""
    try:
        return as_gguf(planned, mixes), None
    except (ArgumentError, CheckpointError, ConversionError) as error:
        if asked:
            raise
        return {}, f"no rows of GGUF types: {error}"
