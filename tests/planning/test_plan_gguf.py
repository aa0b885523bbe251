"""Rows of GGUF types against the files that are written, and what making a form takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.models.quantize_speed import KIND
from qkernels import load
from qkernels.checkpoint import to_gguf
from qkernels.cli.main import main
from qkernels.errors import ArgumentError, CheckpointError, ConversionError
from qkernels.planning import plan
from qkernels.planning.measured import CANDIDATES, GGUF, QUANTIZING, SECONDS, seconds_of
from tests.planning.resident import held

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "examples" / "demo_model"

MIXES = [str(candidate.scheme) for candidate in CANDIDATES if candidate.format == GGUF]


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0"])
def test_a_row_is_the_file(mix: str, tmp_path: Path) -> None:
    row = plan(str(DEMO), context=64, types=[mix.lower()]).rows[0]
    assert (row.scheme, row.method, row.command) == (
        mix, "gguf", f"qkernels quantize {DEMO} OUT.gguf --type {mix}",
    )  # fmt: skip
    to_gguf(DEMO, tmp_path / "model.gguf", mix)
    assert row.file == (tmp_path / "model.gguf").stat().st_size
    assert row.weights == held(load(tmp_path / "model.gguf"))
    as_it_is = plan(str(tmp_path / "model.gguf"), context=64).rows[0]
    assert (as_it_is.weights, as_it_is.kernels, as_it_is.bits) == (row.weights, row.kernels, row.bits)
    assert {"llama.cpp", "Ollama", "transformers"} <= set(row.engines)


def test_rows_stand_among_the_others_in_the_order_of_quality() -> None:
    found = plan(str(DEMO), ["24GiB"], context=64)
    assert [row.scheme for row in found.rows if row.method == "gguf"] == MIXES
    assert [row.scheme for row in found.rows][1:3] == ["w8a16_g128", "Q8_0"]
    assert len(found.rows) == len(CANDIDATES)
    chosen = plan(str(DEMO), ["24GiB"], context=64, schemes=["w4a16_g128"], types=["Q5_K_M"])
    assert [row.scheme for row in chosen.rows] == ["w4a16_g128", "Q5_K_M"]
    known = [candidate.kl for candidate in CANDIDATES if candidate.kl is not None]
    assert known[:-2] == sorted(known[:-2])


def test_what_no_gguf_file_holds(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).save_pretrained(tmp_path)
    found = plan(str(tmp_path), ["24GiB"], context=16)
    assert not [row for row in found.rows if row.method == "gguf"]
    assert any(note.startswith("no rows of GGUF types: ") and "gpt2" in note for note in found.notes)
    with pytest.raises(ConversionError, match="gpt2"):
        plan(str(tmp_path), ["24GiB"], types=["Q8_0"])
    with pytest.raises(ConversionError, match="holds a tokenizer"):
        plan(str(DEMO / "config.json"), ["24GiB"], types=["Q8_0"])
    assert any("holds a tokenizer" in note for note in plan(str(DEMO / "config.json"), ["24GiB"], context=16).notes)
    with pytest.raises(ArgumentError, match="Q9_K"):
        plan(str(DEMO), ["24GiB"], types=["Q9_K"])
    with pytest.raises((ArgumentError, CheckpointError), match="quantized already"):
        plan(str(ROOT / "tests" / "golden" / "gguf" / "llama-k.gguf"), types=["Q8_0"])


# --- how long it takes -----------------------------------------------------------------------------------------------


def test_seconds_are_those_of_the_committed_result() -> None:
    path = ROOT / "benchmarks" / "results" / "amd-epyc-family-25-model-17-2-cores" / "quantize-speed.json"
    result = json.loads(path.read_text())
    measured = {row["method"]: (row["seconds"], row["seconds_a_thousand_tokens"]) for row in result["rows"]}
    assert {*SECONDS.by_method} == {*measured}
    for method, pair in measured.items():
        assert SECONDS.by_method[method] == pytest.approx(pair, rel=0.01, abs=0.05)
    assert KIND == QUANTIZING == result["kind"]


def timed(tmp_path: Path, **rows: Any) -> str:
    """A result that says how long methods take."""
    listed = [{"method": name, "seconds": pair[0], "seconds_a_thousand_tokens": pair[1]} for name, pair in rows.items()]
    (tmp_path / "speed.json").write_text(json.dumps({"kind": QUANTIZING, "rows": listed}))
    return str(tmp_path / "speed.json")


def test_results_of_this_machine_take_the_place_of_ours(tmp_path: Path) -> None:
    path = timed(tmp_path, gptq=(6000.0, 30.0), gguf=(1200.0, 0.0))
    weights = sum(w.numel() for n, w in load(DEMO).named_parameters() if n.endswith("_proj.weight"))
    found = plan(str(DEMO), ["24GiB"], context=16, schemes=["w4a16_g128"], bench=[path])
    minutes = weights / 1e9 * (6000 + 30 * 128 * 1.024) / 60  # windows of 1024 tokens, the model's longest
    assert any(f"about {minutes:.2g} min ({path})" in note for note in found.notes)
    found = plan(str(DEMO), ["24GiB"], context=16, types=["Q8_0"], bench=path)
    row = found.rows[0]
    assert any(
        f"making Q8_0: one tensor in memory at a time, the largest 4.00 MiB in float32, {row.file / 2**20:.2f} MiB of disk; "
        f"about {weights / 1e9 * 20:.2g} min" in note
        for note in found.notes
    ), found.notes


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="times that are none"):
        seconds_of([timed(tmp_path, gptq=(-1.0, 0.0))])
    (tmp_path / "bad.json").write_text(json.dumps({"kind": QUANTIZING, "rows": [{"method": "gptq"}]}))
    with pytest.raises(ArgumentError, match="no result of a benchmark"):
        seconds_of([str(tmp_path / "bad.json")])
    with pytest.raises(ArgumentError, match="no result of a benchmark"):
        seconds_of([str(tmp_path / "missing.json")])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArgumentError, match="one result of qkernels bench at most"):
        plan(str(DEMO), bench=[str(tmp_path / "x.json")] * 2)


def test_the_command_takes_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEMO), "--device", "24GiB", "--context", "16", "--type", "Q4_K_M", "--json"]) == 0
    assert [row["scheme"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["Q4_K_M"]
