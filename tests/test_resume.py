"""`quantize(…, resume=True)`: the same bits after a kill anywhere, and no two runs mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qkernels import GPTQ
from qkernels.errors import CheckpointError
from qkernels.storage import locked
from tests.checkpoints import edit_json
from tests.tiny_models import loud_model, run, token_windows

METHOD = GPTQ(4, 16)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Takes 20 s and more: 22 runs of three methods are killed at nine points, refused without resume, and resumed, each in a
    fork. Together, because importing takes longer than a run."""
    root = Path(__file__).parent.parent
    child = subprocess.run(
        [sys.executable, "-m", "tests.killed_runs", str(tmp_path)],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    runs = json.loads(child.stdout)
    assert len(runs) == 9 + 9 + 4
    for case in runs:
        assert case["killed"] == "killed", case
        assert case["equal"], case
        if case["point"] == "before the work directory goes":  # the target is complete: there is nothing to do
            assert "exists and is not empty" in case["resumed"], case
            continue
        assert case["resumed"] == "done" and not case["left"], case
        if case["units"]:
            assert f"keeps {case['units']} finished layers of an interrupted run" in case["without resume"], case
            assert "pass --resume (resume=True) to go on with it, or remove the directory" in case["without resume"], (
                case
            )
    assert {case["units"] for case in runs} >= {0, 1, 2, 4}


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a source, and what a run for `out` left that was interrupted in its second layer."""
    loud_model().save_pretrained(tmp_path / "source")
    original, first = GPTQ.for_inputs, tmp_path / ".out.qkernels-work" / "unit-00000"

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        if first.is_dir():
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "for_inputs", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "source", METHOD, save_to=tmp_path / "out")
    assert first.is_dir()
    return tmp_path


def test_the_report_covers_both_runs(interrupted: Path) -> None:
    resumed = run(interrupted / "source", METHOD, save_to=interrupted / "out", resume=True)
    whole = run(interrupted / "source", METHOD, save_to=interrupted / "whole")
    assert [(m.name, m.error, m.bytes_after) for m in resumed.modules] == [
        (m.name, m.error, m.bytes_after) for m in whole.modules
    ]
    assert not list(interrupted.glob(".*"))


@pytest.mark.parametrize("part", ["method", "calibration", "config", "source"])
def test_another_run_is_not_mixed_in(part: str, interrupted: Path) -> None:
    source, options, method = interrupted / "source", {}, METHOD
    if part == "method":
        method = GPTQ(4, 16, damping=0.02)
    elif part == "calibration":
        options["calibration"] = token_windows(seed=1)
    elif part == "config":
        edit_json(source / "config.json", lambda config: config.update(rms_norm_eps=1e-4))
    else:
        os.utime(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"with another {part} than this run's: repeat that run with --resume"):
        run(source, method, save_to=interrupted / "out", resume=True, **options)
    assert (interrupted / ".out.qkernels-work" / "unit-00000").is_dir()


def test_two_runs_for_one_target(interrupted: Path) -> None:
    with locked(interrupted / ".out.qkernels-work") as alone:
        assert alone
        with pytest.raises(CheckpointError, match="another run is writing"):
            run(interrupted / "source", METHOD, save_to=interrupted / "out", resume=True)


def test_a_damaged_unit_is_refused(interrupted: Path) -> None:
    (interrupted / ".out.qkernels-work" / "unit-00000" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="unit-00000"):
        run(interrupted / "source", METHOD, save_to=interrupted / "out", resume=True)


def test_resume_without_anything_to_resume(tmp_path: Path) -> None:
    loud_model().save_pretrained(tmp_path / "source")
    report = run(tmp_path / "source", METHOD, save_to=tmp_path / "out", resume=True)
    assert len(report.modules) == 14
