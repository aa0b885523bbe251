"""Every way through the library, for tiny random models of as many architectures as there are rows in `tests/matrix`; the
table that comes of it is docs/models.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import qkernels
from qkernels import QuantLinear
from qkernels.models.architectures import ARCHITECTURES

from .matrix import journeys
from .matrix.rows import ROWS, Row
from .matrix.table import TABLE, committed, table

QUICK = [row for row in ROWS if row.quick]


def check(row: Row, path: Path) -> None:
    if not hasattr(transformers, row.name):
        pytest.skip(f"transformers {transformers.__version__} has no {row.name}")
    assert journeys.travel(row, path) == committed()[row.name]


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_every_way(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)


@pytest.mark.large
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_way_of_every_architecture(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)


def off_by_a_little(patch: pytest.MonkeyPatch) -> None:
    forward = QuantLinear.forward
    patch.setattr(QuantLinear, "forward", lambda self, x: forward(self, x) * (1 + 1e-4))


def other_codes_in_the_plug_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journeys, "SCHEME", "w7a16_g32")


def a_bias_lost_by_load(patch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> Any:
        model = qkernels.load(path)
        model.transformer.h[1].mlp.c_fc.bias.data.zero_()
        return model

    patch.setattr(journeys, "load", load)


@pytest.mark.parametrize(
    ("plant", "noticed_by"),
    [(off_by_a_little, "near"), (other_codes_in_the_plug_in, "same_weights"), (a_bias_lost_by_load, "same")],
)
def test_what_is_wrong_is_noticed(plant: Any, noticed_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, and that the comparison which is meant to notices."""
    plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        journeys.travel(next(row for row in ROWS if row.name == "GPT2LMHeadModel"), tmp_path)
    assert caught.traceback[-1].name == noticed_by


def test_the_page_has_a_row_for_each() -> None:
    """In the order of the matrix: nothing is taken out of it, or put in, without the page."""
    assert [*committed()] == [row.name for row in ROWS]
    assert len(ROWS) >= 60 and len(QUICK) == 16
    assert TABLE.read_text(encoding="utf-8").endswith(table(committed()))


@pytest.mark.large  # it imports every one of them
def test_the_matrix_has_every_architecture_of_the_table_of_folds() -> None:
    classes = [getattr(transformers, row.name, None) for row in ROWS]
    taken = {kind.config_class.model_type for kind in classes if kind is not None}
    assert {name for known in ARCHITECTURES for name in known.model_types} <= taken
