"""`make gpu-check` without a GPU: its parts, what it leaves behind, what a dry run sees; and that other bits are noticed."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

from benchmarks.method import envelope, environment, results

from . import check, properties

ROOT = Path(__file__).parent.parent.parent
COMMIT, OTHER = "0123456789ab", "ba9876543210"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) != 0
    assert "needs a GPU" in capsys.readouterr().err


def test_parts_write_their_outcome_as_they_go_and_are_not_repeated(tmp_path: Path) -> None:
    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    parts = [
        check.Part("good", python(count + "; print('seen')"), 1),
        check.Part("bad", python("raise SystemExit(3)"), 1),
        check.Part("slow", python("import time; time.sleep(60)"), 60, limit=1),
        check.Part("tool", python("0"), 1, needs="no-such-sanitizer"),
    ]
    found = {o.part: o.verdict for o in check.run_all(parts, tmp_path, COMMIT)}
    assert found == {"good": "passed", "bad": "failed", "slow": "out of time", "tool": "left out"}
    assert "seen" in (tmp_path / "good.log").read_text()
    assert check.outcome_of(tmp_path / "bad.outcome.json").verdict == "failed"
    kept = envelope.read(tmp_path / "good.outcome.json", check.KIND)
    assert (kept.commit, kept.machine) == (COMMIT, tmp_path.parent.name)
    assert str(kept.command).startswith("python -c 'open(")
    check.run_all(parts[:1], tmp_path, COMMIT)
    assert (tmp_path / "count").read_text() == "x"
    check.run_all(parts[:1], tmp_path, OTHER)
    assert (tmp_path / "count").read_text() == "xx"


def run_of(model: str, commit: str = COMMIT) -> results.Run:
    """One timed row of one layer."""
    row = results.Row(
        model, "o", 64, 256, 1, "w4a16_g128", "bfloat16", "qkernels k", True, us=1.0, us_low=0.9, us_high=1.2, gbs=8.0,
        tflops=0.03, roof_percent=50.0, samples_us=[0.9, 1.0, 1.2],
    )  # fmt: skip
    where = {"machine": "some-gpu", "date": environment.now(), "commit": commit, "torch": "2.13"}
    return results.Run(where, {"copy_gbs": 10.0, "read_gbs": 20.0, "matrix_tflops": {"bfloat16": 1.0}}, [row])


def test_gpu_check_leaves_one_file_of_numbers_and_a_table(tmp_path: Path) -> None:
    out = tmp_path / "some-gpu" / "gpu-check"
    for model, commit in (("llama-3-8b", COMMIT), ("qwen3-8b", COMMIT), ("qwen3-32b", OTHER)):
        results.write(run_of(model, commit), out / f"{model}.json")
    outcomes = [check.Outcome("tests", "failed", "exit code 1; see tests.log", 3.0, COMMIT)]
    text = check.summarize(outcomes, out, COMMIT, date(2026, 1, 2)).read_text()
    assert re.search(r"tests +\| failed +\| 3 ", text)
    assert "### qwen3-8b o: N=64 K=256" in text
    joined = results.read(tmp_path / "some-gpu" / f"2026-01-02-{COMMIT}.json")
    assert [row.model for row in joined.rows] == ["llama-3-8b", "qwen3-8b"]


def test_every_part_is_under_ten_minutes_and_can_be_started() -> None:
    parts = check.parts(Path("out"))
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert part.limit < 600
        if "-m" in part.command and (module := part.command[part.command.index("-m") + 1]).startswith("benchmarks"):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists() or (ROOT / module / "__main__.py").exists()


def test_a_dry_run_lists_every_part_and_all_could_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in check.parts(environment.RESULTS / "GPU" / "gpu-check"):
        assert part.predicted < part.limit
        assert re.search(
            rf"^{part.name} +{part.predicted} s of {part.limit}  (can start|would be left out)", told, re.MULTILINE
        )
    assert "Nothing was run on a GPU." in told


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("-m", "benchmarks.no_such_module"), "does not import"),
        (("no_such_setup.py", "build"), "is not there"),
        (("-m", "pytest", "-q", "-m", "gpu", "tests/test_imports.py"), "collects no test"),
    ],
)
def test_a_dry_run_fails_where_a_part_could_not_start(
    command: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.dry_run([check.Part("broken", (sys.executable, *command), 1)]) == 1
    assert re.search(f"broken .*CANNOT START: .*{why}", capsys.readouterr().out)


def test_other_bits_are_noticed() -> None:
    x = torch.ones(4)
    assert properties.differing(lambda x: x * 2, x, 5) == 0
    calls = iter(range(100))
    assert properties.differing(lambda x: x + (next(calls) == 3), x, 5) == 1
