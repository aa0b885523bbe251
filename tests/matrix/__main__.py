"""Write docs/models.md: `python -m tests.matrix` takes every architecture every way, about five minutes on one core."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from .journeys import travel
from .rows import ROWS
from .table import TABLE, page


def main() -> int:
    """The page is written when every architecture stands what it must."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # of what is rounded to nearest: the table says it
    transformers.logging.disable_progress_bar()
    cells, failed = {}, []
    for row in tqdm(ROWS, unit="model"):
        with tempfile.TemporaryDirectory() as directory:
            try:
                cells[row.name] = travel(row, Path(directory))
            except Exception as error:
                failed.append(f"{row.name}: {type(error).__name__}: {error}")
    if failed:
        print("\n".join(failed), file=sys.stderr)
        return 1
    TABLE.write_text(page(cells), encoding="utf-8")
    return 0


sys.exit(main())
