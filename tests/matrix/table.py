"""docs/models.md: the matrix as a table, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
import transformers

from .journeys import COLUMNS

TABLE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """# Models

Architectures of transformers that were taken every way through the library, as tiny random models in float32, on {day}
with transformers {transformers} and torch {torch}, on a CPU. Made by `python -m tests.matrix`;
`tests/test_architectures.py` takes sixteen of them the same ways in `make test`, all of them with `-m large`, and
compares with this page. Others run, too: any `nn.Module` with linear layers through `replace_linear`, any class of
transformers through `load`. What is tiny and random says nothing about quality: [that is elsewhere](quality.md).
Models that see were shown pictures, but for Gemma 4, Phi-4 multimodal and Mllama, which got text alone.

* **float**: a directory → `load`: the outputs are those of transformers, bit for bit.
* **RTN 8**, **GPTQ 4**: `quantize` of the directory, groups of 32 → `load`: outputs within 1e-5 of the dequantized
  model's; a model in memory gets the same weights. The number is that of the layers, stacks
  of experts included. *12 of 20*: 12 are calibrated; the
  others, which token ids do not reach, or which are read and not called, are rounded to nearest, as the report says of each.
* **generate**: of those, the same tokens as of the dequantized model.
* **QKernelsConfig**: `from_pretrained` quantizes to what RTN 8 does, and `load` and `from_pretrained` read what
  `save_pretrained` then writes: the same weights, bit for bit.
* **stays as it is**: matrices that are not quantized: heads by default, routers, experts in one tensor of a kind that
  is not covered, and what is no linear layer, by its class.

What has no ✓ is refused in these words before any work, and in a dry run; – is for classes that do not generate.

"""


def page(cells: Mapping[str, Mapping[str, str]]) -> str:
    """The whole page; the cells of each architecture by column."""
    head = HEAD.format(
        day=date.today(), transformers=transformers.__version__, torch=torch.__version__.partition("+")[0]
    )
    return head + table(cells)


def table(cells: Mapping[str, Mapping[str, str]]) -> str:
    """What is below the words."""
    lines = [f"| class | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| `{name}` | {' | '.join(row[column] for column in COLUMNS)} |" for name, row in cells.items()]
    return "\n".join(lines) + "\n"


def committed() -> dict[str, dict[str, str]]:
    """What the page says: the cells of each architecture by column."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): dict(zip(COLUMNS, cells, strict=True)) for name, *cells in rows}
