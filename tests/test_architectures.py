"""Every way through the library, for tiny random models of as many architectures as there are rows in `tests/matrix`; the
table that comes of it is docs/models.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from .matrix.journeys import travel
from .matrix.rows import ROWS, Row
from .matrix.table import TABLE, committed, table

QUICK = [row for row in ROWS if row.quick]


def check(row: Row, path: Path) -> None:
    if not hasattr(transformers, row.name):
        pytest.skip(f"transformers {transformers.__version__} has no {row.name}")
    assert travel(row, path) == committed()[row.name]


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_every_way(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)


@pytest.mark.large
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_way_of_every_architecture(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)


def test_the_page_has_a_row_for_each() -> None:
    """In the order of the matrix: nothing is taken out of it, or put in, without the page."""
    assert [*committed()] == [row.name for row in ROWS]
    assert len(ROWS) >= 60 and len(QUICK) == 16
    assert TABLE.read_text(encoding="utf-8").endswith(table(committed()))
