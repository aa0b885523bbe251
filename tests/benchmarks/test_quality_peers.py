"""The committed side-by-side: its tables are those of its numbers, and nobody's best is better than ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality_peers.__main__ import HERE, MODEL, OWN, Rows, best_of, markdown

FILES = {"results": MODEL, "results_encoder": Path("all-MiniLM-L6-v2")}


def rows_of(name: str) -> Rows:
    rows: Rows = json.loads((HERE / f"{name}.json").read_text())["rows"]
    return rows


@pytest.mark.parametrize("name", FILES)
def test_the_table_is_that_of_the_numbers(name: str) -> None:
    assert (HERE / f"{name}.md").read_text() == markdown(rows_of(name), FILES[name])


@pytest.mark.parametrize("name", FILES)
def test_nobody_is_better_at_the_same_bits_zeros_and_group(name: str) -> None:
    pairs = best_of(rows_of(name))
    assert len(pairs) >= 4
    assert all(ours["distance"] <= theirs["distance"] for ours, theirs in pairs)


def test_a_better_peer_is_noticed() -> None:
    rows = rows_of("results")
    rows.append({**next(row for row in rows if row["tool"] != OWN), "distance": 0.0})
    assert any(ours["distance"] > theirs["distance"] for ours, theirs in best_of(rows))
