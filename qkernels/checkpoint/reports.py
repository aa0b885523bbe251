"""The quality report beside a checkpoint, as files: `quantize` writes it (`layerwise/report.py`), `convert` hands it on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from .._version import __version__
from ..errors import CheckpointError
from ..storage import read_json, write_json
from ..storage.files import write_error

REPORT_JSON: Final = "qkernels_report.json"
REPORT_MARKDOWN: Final = "qkernels_report.md"
REWRITTEN: Final = "rewritten"


def carry_report(source: Path, target: Path, format: str) -> None:
    """Copy the report of a checkpoint that was rewritten in `format`, and say so in it: with the weights, what it says of their
    quality stays true. Without a report there is nothing to do.

    Raises:
        CheckpointError: there is a report that cannot be read or written.
    """
    path = source / REPORT_JSON
    if not path.is_file():
        return
    report = read_json(path)
    steps = report.get(REWRITTEN, [])
    if not isinstance(steps, list):
        raise CheckpointError(
            f"{path} needs {REWRITTEN} to be a list, got {steps!r:.60}; remove the file if it is not yours"
        )
    steps = [*steps, {"format": format, "qkernels": __version__}]
    try:
        write_json(target / REPORT_JSON, report | {REWRITTEN: steps})
        if (source / REPORT_MARKDOWN).is_file():
            shutil.copyfile(source / REPORT_MARKDOWN, target / REPORT_MARKDOWN)
            with (target / REPORT_MARKDOWN).open("a", encoding="utf-8") as file:
                file.write(
                    f"- rewritten as {format} by qkernels {__version__}; the weights are the same, bit for bit\n"
                )
    except OSError as error:
        raise write_error(error, target) from error
