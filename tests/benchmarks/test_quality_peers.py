"""Other tools' quantizers beside ours: rows from a file, the best of each side, the tables, and going on with an earlier file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.method import envelope
from benchmarks.quality.peers import __main__ as peers
from benchmarks.quality.peers.__main__ import MODEL, OWN, Case, Rows, best_of, markdown


def rows() -> Rows:
    """Ours ahead at 4 bits symmetric, theirs at 4 bits with float zeros; 3 bits have no partner; one tool failed."""
    measured = [
        (Case(OWN, "gptq", order="group"), 0.01), (Case(OWN, "rtn"), 0.06), (Case("gptqmodel", "gptq"), 0.03),
        (Case(OWN, "hqq", 4, 64, "float"), 0.05), (Case("hqq", "hqq", 4, 64, "float"), 0.02), (Case(OWN, "awq", 3), 0.2),
    ]  # fmt: skip
    found: Rows = [{**asdict(case), "distance": kl, "bits_per_weight": 4.125, "top1": 0.9} for case, kl in measured]
    return [*found, {**asdict(Case("auto_round", "auto-round")), "reason": "exit code 1: no | memory"}]


def test_the_best_of_each_side_meet_at_the_same_bits_zeros_and_group() -> None:
    pairs = [(ours["distance"], theirs["distance"]) for ours, theirs in best_of(rows())]
    assert pairs == [(0.01, 0.03), (0.05, 0.02)]


def test_the_tables_have_every_row_best_first_and_reasons_for_what_has_no_number() -> None:
    shown = markdown(rows(), MODEL)
    symmetric = shown[shown.index("## 4 bits, symmetric") : shown.index("## 4 bits, float zero points")]
    assert symmetric.index("1.00e-02") < symmetric.index("3.00e-02") < symmetric.index("6.00e-02")
    assert symmetric.index("6.00e-02") < symmetric.index("not measured: exit code 1: no / memory")
    assert "5.00e-02 (hqq)" in shown and "2.00e-02 (hqq)" in shown and "2.50" in shown
    assert "1 - cosine" in markdown(rows(), Path("an-encoder"))


def test_an_earlier_file_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--only` keeps the other rows, those of another commit too: each row has its own."""
    old = [{**row, "commit": "0123456789ab"} for row in rows()]
    where = {"machine": "here", "date": "2026-11-24T10:00:00+00:00", "commit": "0123456789ab"}
    envelope.write(envelope.sealed(peers.KIND, where, old), tmp_path / "r.json")
    monkeypatch.setattr(peers, "CASES", (Case("auto_round", "auto-round"),))
    assert peers.main(["--only", "auto_round", "--out", str(tmp_path / "r")]) == 0
    found = envelope.read(tmp_path / "r.json", peers.KIND)
    assert found.rows[:-1] == old[:-1]
    assert found.rows[-1]["reason"] == "no environment given (--tool auto_round=PYTHON)"
    assert found.rows[-1]["commit"] == found.tree
    assert "no environment given" in (tmp_path / "r.md").read_text()
