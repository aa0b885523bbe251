"""Speed in vLLM: what is compared, refused and written; the run itself needs an environment of its own."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch

from benchmarks.method import envelope
from benchmarks.models import vllm_speed
from benchmarks.models.vllm_speed import CANDIDATES, TASKS

ENGINE = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[2])
print("Using {kernel} for mixed-precision linear", file=sys.stderr, flush=True)
print(json.dumps({{"platform": "{platform}"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps([float(t) for t in request["likelihoods"][1:]] if "likelihoods" in request else {seconds}), flush=True)
"""


def engine(
    tmp_path: Path, kernel: str = "CPUWNA16LinearKernel", platform: str = "CpuPlatform", seconds: float = 2.0
) -> str:
    """What answers as vLLM does."""
    import sys

    script = tmp_path / "python"
    script.write_text(ENGINE.format(python=sys.executable, kernel=kernel, platform=platform, seconds=seconds))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_rates_and_ratios_are_of_the_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact = torch.tensor([float(t) for t in vllm_speed.text()[1:]])
    monkeypatch.setattr(vllm_speed, "write_files", lambda out, layers: (exact, 1.0))
    monkeypatch.setitem(vllm_speed.PAIRS, "vLLM int4", "vLLM int4")  # one answer of the stand-in fits both
    options = ["--python", engine(tmp_path), "--peers", "vLLM int4", "zentorch w4a8", "--rounds", "3"]
    assert vllm_speed.main([*options, "--out", str(tmp_path / "r.json")]) == 0
    found = envelope.read(tmp_path / "r.json", vllm_speed.KIND)
    assert [row["peer"] for row in found.rows] == ["vLLM int4"]
    assert found.rows[0]["peer_tokens_per_s"] == {"batch 1": 33 / 2, "batch 8": 8 * 17 / 2, "prefill 512": 512 / 2}
    assert found.conditions["reasons"] == ["zentorch w4a8: --zentorch names no folder that has it"]
    assert "* unmeasured: zentorch w4a8" in (tmp_path / "r.md").read_text()


def test_times_are_paired_by_round() -> None:
    made = []
    for name in ("qkernels w4a8_g128", "zentorch w4a8"):
        one = vllm_speed.Engine.__new__(vllm_speed.Engine)
        one.name, one.candidate, one.versions = name, CANDIDATES[name], {}
        made.append(one)
    ours, theirs = ({task: list(seconds) for task in TASKS} for seconds in ((1.0, 2.0), (3.0, 6.0)))
    row = vllm_speed.row(made[0], made[1], ours, theirs, [0.1, 0.2])
    assert row.ratio == {task: [3.0, 3.0, 3.0] for task in TASKS}
    assert (row.our_tokens_per_s["batch 1"], row.peer_tokens_per_s["batch 1"]) == (33 / 1.5, 33 / 4.5)
    assert (row.our_far, row.peer_far) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("vLLM int4", {"kernel": "Another"}, "must say .*CPUWNA16LinearKernel.* got Using Another for"),
        ("vLLM int4", {"platform": "ZenCpuPlatform"}, "vLLM took ZenCpuPlatform"),
        ("qkernels w4a16_g128", {}, "got Using CPUWNA16LinearKernel"),
    ],
)
def test_another_kernel_is_not_timed(tmp_path: Path, name: str, made: dict[str, str], said: str) -> None:
    started = vllm_speed.Engine(name, engine(tmp_path, **made), tmp_path, None, "0")  # type: ignore[arg-type]
    started.start()
    try:
        with pytest.raises(RuntimeError, match=said):
            started.told()
    finally:
        started.close()


def test_other_models_are_not_timed() -> None:
    exact = torch.randn(100)
    assert vllm_speed.check("same", exact, exact + 0.01, 0.5) == pytest.approx(0.01 / float(exact.std()), rel=1e-3)
    for found, other in ((exact.flip(0), 35.0), (exact + 0.2, 0.3)):
        with pytest.raises(RuntimeError, match="no match, no number"):
            vllm_speed.check("other", exact, found, other)


def test_an_engine_that_ends_says_why(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '(EngineCore pid=1) ERROR 11-30 11:33:04 [core.py:1] ValueError: no room' >&2\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(RuntimeError, match="^vLLM bf16: ValueError: no room$"):
        vllm_speed.Engine("vLLM bf16", str(script), tmp_path, None, "0").start()


def test_requests_have_what_rates_count() -> None:
    for task in TASKS.values():
        request = json.loads(json.dumps(task.request()))
        assert [len(prompt) for prompt in request["prompts"]] == [task.prompt] * task.sequences
    assert TASKS["prefill 512"].tokens == 512
