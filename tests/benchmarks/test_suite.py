"""The suite as its users meet it: a run's file, the command, micro-benchmarks, the page, quality of a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import quick, roofs, shapes, sweep
from benchmarks.method import envelope, environment, report, results
from benchmarks.quality import runnable
from qkernels.cli.main import main
from qkernels.errors import ArgumentError
from qkernels.scheme import QuantScheme

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch) -> results.Run:
    """A real run of one tiny layer; `qkernels bench` measures the same while this fixture lives."""
    limits = roofs.Roofs(10.0, 20.0, {"bfloat16": 1.0})
    monkeypatch.setattr(roofs, "measure", lambda *_: limits)
    monkeypatch.setattr(roofs, "bandwidth", lambda *_: (10.0, 20.0))
    monkeypatch.setattr(environment, "cache_bytes", lambda _: 1 << 16)
    case = sweep.Case(shapes.Layer("llama-3-8b", "o", 64, 256), (1, 4), QuantScheme(), torch.bfloat16)
    monkeypatch.setattr(quick, "quick_cases", lambda *_: [case])
    return quick.quick(CPU, seconds=0.01)


def test_results_survive_their_file(small_run: results.Run, tmp_path: Path) -> None:
    results.write(small_run, tmp_path / "here" / "run.json")
    assert results.read(tmp_path / "here" / "run.json") == small_run
    assert {"commit", "date", "torch", "cpu", "threads", "caches", "quiet", "isa"} <= small_run.environment.keys()


@pytest.mark.parametrize(
    ("rows", "conditions"), [([{"model": "m"}], {"roofs": {}, "absent": {}, "host_us": {}}), ([], {"roofs": {}})]
)
def test_rows_that_are_no_kernels_are_refused(
    tmp_path: Path, rows: list[dict[str, str]], conditions: dict[str, object]
) -> None:
    where = {"machine": "here", "date": environment.now(), "commit": "0123456789ab"}
    envelope.write(envelope.sealed(results.KIND, where, rows, conditions), tmp_path / "bad.json")
    with pytest.raises(
        ArgumentError, match=r"bad.json must hold rows that `qkernels bench --json` wrote: (Type|Key)Error"
    ):
        results.read(tmp_path / "bad.json")


def test_markdown_names_every_missing_peer_and_a_noisy_machine(small_run: results.Run) -> None:
    noisy = replace(
        small_run, environment={**small_run.environment, "quiet": {"jitter": 0.3, "load": 5.0, "quiet": False}}
    )
    shown = results.to_markdown(noisy)
    assert "not quiet" in shown
    for name in ("humming", "marlin (gptqmodel)", "gemlite", "ggml q4_0", "ggml q4_k"):
        assert f"* {name}: " in shown
    assert "roofs measured in this run" in shown
    assert "torch linear" in results.to_csv(small_run.rows)


@pytest.mark.parametrize("option", ["--json", "--csv", None])
def test_bench_command(
    small_run: results.Run, option: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save = tmp_path / "run.json"
    assert main(["bench", "--seconds", "1", "--save", str(save), *([option] if option else [])]) == 0
    out = capsys.readouterr().out
    assert ("### llama-3-8b o" in out) == (option is None)
    assert (json.loads(out)["format"] == envelope.FORMAT) if option == "--json" else "," in out
    assert main(["bench", "--seconds", "1", "--compare", str(save)]) in (0, 3)
    assert "verdict" in capsys.readouterr().out


def test_bench_refuses_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--compare", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_bench_of_an_installed_package_says_where_the_suite_is(tmp_path: Path) -> None:
    """The package as a wheel lays it out, without benchmarks/ beside it: refused away from a clone, found inside one."""
    shutil.copytree(ROOT / "qkernels", tmp_path / "site" / "qkernels", ignore=shutil.ignore_patterns("__pycache__"))
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [
        sys.executable,
        "-c",
        "from qkernels.cli.main import main; exit(main())",
        "bench",
        "--compare",
        "no-such.json",
    ]  # ends before it measures
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    outside, inside = (
        subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        for place in (empty, ROOT)
    )
    assert outside.returncode == 1
    assert f"no benchmarks/ beside {tmp_path / 'site' / 'qkernels'} or in {empty}" in outside.stderr
    assert "run this in a clone of the repository" in outside.stderr
    assert "Traceback" not in outside.stderr
    assert "no-such.json" in inside.stderr


def test_micro_benchmarks_run() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks/kernels/micro",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "QKERNELS_BENCH_SHAPE": "64,256"},
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_page_has_its_pictures(small_run: results.Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        {"method": m, "label": "4 bit", "bytes": 1 << 20, "perplexity": p} for m, p in (("rtn", 9.0), ("gptq", 8.0))
    ]
    text = report.page([small_run], points, tmp_path).read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    where = small_run.environment
    envelope.write(envelope.sealed("quality", where, [{"method": "rtn"}]), tmp_path / "q.json")
    with pytest.raises(ArgumentError, match="method, label, bytes and perplexity"):
        report.read_quality(tmp_path / "q.json")


def test_quality_of_a_checkpoint(tiny_llama_dir: Path, sample_text: str, tmp_path: Path) -> None:
    text = sample_text[:3000]
    rows = runnable.measure(tiny_llama_dir, text, text, ["rtn"], [4, 8], 32, 4, tmp_path / "quality.json", CPU)
    assert [row["label"] for row in rows] == ["16 bit", "4 bit", "8 bit"]
    assert rows[0]["kl"] == 0 < rows[2]["kl"] < rows[1]["kl"]
    assert rows[0]["bytes"] > rows[2]["bytes"] > rows[1]["bytes"]
    assert report.read_quality(tmp_path / "quality.json") == rows
