"""Write docs/models.md: `python -m tests.matrix` takes every architecture every way, about five minutes on one core."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from .journeys import travel
from .rows import ROWS
from .table import TABLE, page

torch.set_num_threads(1)
cells = {}
for row in tqdm(ROWS, unit="model"):
    with tempfile.TemporaryDirectory() as directory:
        cells[row.name] = travel(row, Path(directory))
TABLE.write_text(page(cells))
