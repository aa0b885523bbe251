"""The first minutes on a GPU, rehearsed on a CPU: `drive` on the emulator behind the same command line.

Every stage starts; one that hangs, dies or is wrong leaves the others running; and the fit finds numbers that were planted.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qkernels.ops.grouped import sorted_by_expert
from tests.cuda import emulator
from tools import nvcc
from tools.first_light import __main__ as command_line
from tools.first_light import experts, fit, stages
from tools.first_light.runner import LOG, MOST_BYTES, MOST_FILES, Runner, Sink, run_stage
from tools.first_light.stages import PATHS, Stage

emulated = pytest.mark.skipif(emulator.WHY_NOT is not None, reason=str(emulator.WHY_NOT))
# What a rehearsal asks of drive in place of what a card is asked: a strip and a bit, three steps.
SMALL = {
    "N": "71",
    "K": "136",
    "most": "1",
    "kb": "16",
    "steps": "2",
    "blocks": "2",
    "rounds": "1",
    "repeats": "2",
    "least-us": "0",
}


def small(stage: Stage) -> Stage:
    """The same stage with the least work: tools that only watch (sanitizers, ncu) are stood in for."""
    words = list(stage.command)
    if "{drive}" in words:
        start = words.index("{drive}") + 2
        given = dict(zip(words[start::2], words[start + 1 :: 2]))
        given |= {f"--{name}": value for name, value in SMALL.items()}
        given["--M"] = "5" if "decode" in given.get("--paths", "") else "33"
        words[start:] = [word for pair in given.items() for word in pair]
    if words[2:3] == ["pytest"]:
        words = [*words[: words.index("--maxfail=15")], "--collect-only"]
    if words[2:3] == ["tools.first_light.baselines"] and "--device" in words:
        words = [*words[:3], "--device", "cpu", "--shapes", "64x128", "--tokens", "1", "--seconds", "0.1"]
    if words[2:3] == ["tools.first_light.experts"]:
        words = [*words[:3], "--device", "cpu", "--shapes", "64x32x4x2", "--tokens", "1,3", "--seconds", "0", "--scheme",
                 "w4a16_g32"]  # fmt: skip
    return replace(stage, command=tuple(words), limit=300)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sanitizers and ncu that run what they are given; nvidia-smi and nvcc that say a word."""
    folder = tmp_path / "bin"
    folder.mkdir()
    watch = (
        f'#!{sys.executable}\nimport os, sys\nat = next(i for i, a in enumerate(sys.argv) if a.endswith("/drive"))\n'
    )
    for name in ("compute-sanitizer", "ncu"):
        (folder / name).write_text(watch + "os.execv(sys.argv[at], sys.argv[at:])\n")
    for name in ("nvidia-smi", "nvcc"):
        (folder / name).write_text("#!/bin/sh\necho a stand-in\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def runner(out: Path, drive: Path, deadline: float | None = None) -> Runner:
    words = {"drive": str(drive), "old": str(drive), "python": sys.executable}
    return Runner(out, words, deadline, (str(drive), "clusters"))


@emulated
def test_every_stage_of_the_first_phase_starts(tmp_path: Path, tools: Path) -> None:
    """One of each kind, in its order, and what they leave: the files, and a line for each configuration."""
    kinds: dict[tuple[object, ...], Stage] = {}
    for stage in stages.first():
        kinds.setdefault((stage.name.split()[0], stage.file, stage.paths, stage.command[:3]), small(stage))
    chosen = [s for s in kinds.values() if not s.name.startswith(("check", "sweep 4096x4096 w"))]
    chosen += [small(s) for s in stages.checks()[::3]]
    out = tmp_path / "out"
    outcomes = runner(out, emulator.build("drive", "program")).run(chosen)
    assert {(o.stage, o.found) for o in outcomes if o.verdict != "passed"} == set()
    written = {path.name for path in out.iterdir()}
    assert written == {stage.file for stage in stages.first()} | {LOG}
    assert len(written) <= MOST_FILES
    assert len(fit.rows_of(out / "check.jsonl", "check")) >= 5
    assert {row["path"] for row in fit.rows_of(out / "sweep.jsonl")} & set(PATHS)
    assert {row["what"] for row in fit.rows_of(out / "probe.jsonl", "calibrate")} >= {"launch_ns", "wgmma8_macs_per_ns"}
    blocks = fit.rows_of(out / "base.jsonl", "experts")
    assert {row["who"] for row in blocks if row["us"] is not None} >= {"ours", "torch grouped_mm bf16"}
    assert fit.clusters_of(out / "env.txt")[4] == 32
    assert json.loads((out / LOG).read_text().splitlines()[-1])["verdict"] == "passed"


@emulated
def test_a_hang_a_crash_and_a_wrong_number_cost_the_others_nothing(tmp_path: Path) -> None:
    """gemm_a8 adds the sums of a group once too few; gemm hangs, with a child that keeps the pipe open; gemm_sm90 dies.

    Not a wait too few of decode: it reads NaN, and sums that are not finite are mended (sum_again.cuh)."""
    wrong = emulator.build("drive", "program", "A8_LOST_GROUP")
    drive = tmp_path / "drive"
    drive.write_text(
        "#!/bin/bash\n"
        f'case "$*" in *"check"*"--paths gemm "*) echo hangs; sleep 600 & sleep 600;; '
        f'*"check"*"--paths gemm_sm90 "*) kill -SEGV $$;; esac\nexec {wrong} "$@"\n'
    )
    drive.chmod(0o755)
    checks = []
    for path in PATHS:
        row = (71, 520, 4, 128, "none", "bf16", 8 if path in stages.INT8 else 16)
        command = stages.drive("check", **stages.problem(*row), M="5", paths=path, most=2)
        checks.append(
            Stage(f"check {path}", command, 2 if path == "gemm" else 200, "check.jsonl", judges=path, paths=(path,))
        )
    timed = {"M": 5, "most": 1, "rounds": 1, "least_us": 0}
    later = [
        Stage(
            "time plain",
            stages.drive("time", N=71, K=136, paths="{paths}", **timed),
            200,
            "sweep.jsonl",
            paths=stages.PLAIN,
        ),
        Stage(
            "time int8",
            stages.drive("time", N=71, K=136, act=8, paths="{paths}", **timed),
            200,
            "sweep.jsonl",
            paths=stages.INT8,
        ),
    ]
    begin = time.monotonic()
    outcomes = runner(tmp_path / "out", drive).run([*checks, *later])
    found = {o.stage: (o.verdict, o.found) for o in outcomes}
    assert found["check gemm_a8"] == ("failed", "exit status 1")
    assert found["check gemm"] == ("out of time", "killed after 2 s")
    assert found["check gemm_sm90"] == ("failed", "exit status -11")
    assert found["check decode"][0] == found["check gemm_a8_sm90"][0] == "passed"
    assert found["time int8"][0] == found["time plain"][0] == "passed"  # with the paths that are left
    assert time.monotonic() - begin < 300  # what hangs sleeps for 600 s
    worst = [row["worst"] for row in fit.rows_of(tmp_path / "out" / "check.jsonl", "check") if row["path"] == "gemm_a8"]
    assert max(worst) > 1
    assert {row["path"] for row in fit.rows_of(tmp_path / "out" / "sweep.jsonl")} == {"decode", "gemm_a8_sm90"}


def test_a_card_that_is_gone_and_a_deadline_end_the_run(tmp_path: Path) -> None:
    gone = tmp_path / "drive"
    gone.write_text("#!/bin/sh\nexit 3\n")
    gone.chmod(0o755)
    three = [Stage(f"stage {i}", ("{drive}", "check"), 5, "check.jsonl") for i in range(3)]
    assert [o.verdict for o in runner(tmp_path / "a", gone).run(three)] == ["failed", "skipped", "skipped"]
    gone.write_text("#!/bin/sh\nsleep 30\n")
    begin = time.monotonic()
    deadline = Runner(tmp_path / "b", {"drive": str(gone)}, 3.0, ("true",))
    outcomes = deadline.run(three)
    assert [(o.verdict, o.found) for o in outcomes] == [
        ("out of time", "killed after 3 s"), *[("skipped", "the deadline has come")] * 2,
    ]  # fmt: skip
    assert time.monotonic() - begin < 25  # what hangs sleeps for 30 s


def test_output_is_on_disk_as_it_comes_and_a_full_file_says_so(tmp_path: Path) -> None:
    """A line that is begun stays behind when its process is killed; the file takes no more than its share."""
    sink = Sink(tmp_path)
    code = "import sys, time; print('{\"begun\": 1', end='', flush=True); time.sleep(60)"
    assert run_stage((sys.executable, "-c", code), 2, sink, "a.txt", {}).verdict == "out of time"
    assert '{"begun": 1' in (tmp_path / "a.txt").read_text()
    for _ in range(3):
        sink.write("b.txt", b"x" * (MOST_BYTES // 2))
    full = (tmp_path / "b.txt").read_bytes()
    assert len(full) <= MOST_BYTES
    assert full.endswith(b"... cut: the file is full\n")


def test_stages_fit_their_phases() -> None:
    for make in stages.PHASES.values():
        names = [stage.name for stage in make()]
        assert len(set(names)) == len(names)
        assert len({stage.file for stage in make()} | {LOG}) <= MOST_FILES
    judged = {stage.judges for stage in stages.checks()}
    assert judged == {*PATHS, None}
    assert len(stages.SHAPES) == 12
    assert len(stages.FEW + stages.MANY) == 19


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "card_here", lambda: None)
    assert command_line.main(["all", "--out", str(tmp_path), "--drive", str(tmp_path / "none")]) == command_line.NO_GPU
    assert "needs a GPU" in capsys.readouterr().err
    assert command_line.main(["all", "--dry-run"]) == 0
    assert "Nothing was run." in capsys.readouterr().out


@pytest.mark.skipif(nvcc.NVCC is None, reason="no nvcc")
def test_drive_compiles_and_its_loops_of_products_are_not_serialized() -> None:
    """A rate that is measured of wgmma between which ptxas puts waits is not the card's."""
    drive = Path(stages.__file__).parent / "drive" / "drive.cu"
    _, report = nvcc.compile_source(drive, "90a", "cubin")
    assert nvcc.complaints(report) == []
    assert not any(usage.spill_stores for usage in nvcc.usages(report))


# --- the fit ---

# Without producer_clocks: three producers bind nowhere, and what binds nowhere no sweep can tell.
PLANTED = {
    "launch_ns": 3100.0, "decode_start_ns": 1400.0, "wgmma_start_ns": 2700.0, "decode_slots": 300.0,
    "l2_bytes_per_ns": 5200.0, "wgmma_macs_per_ns": 430e3,
}  # fmt: skip


def synthetic(noise: float) -> tuple[fit.Sweep, dict[str, float]]:
    """What a card with PLANTED numbers would have answered, within a few parts of 1000."""
    configs = [("decode", 8, 1, 16, s) for s in (1, 2, 4)] + [("decode", 8, 4, 2, s) for s in (1, 3)]
    configs += [("decode", 16, 2, 4, 1), ("decode", 32, 2, 4, 2), ("gemm", 64, 0, 0, 1), ("gemm", 128, 0, 0, 3)]
    configs += [("gemm_sm90", tokens, 0, 0, s) for tokens in (16, 32, 64, 128, 256) for s in (1, 2, 4, 6)]
    rows = []
    for N, K in stages.SHAPES[:6]:
        for M in (1, 8, 16, 32, 64, 128, 512, 2048):
            for path, tokens, warps_n, warps_k, splits in configs:
                if (path == "decode") == (M <= 32) and (path != "decode" or tokens >= M):
                    rows.append(
                        {"mode": "time", "N": N, "K": K, "M": M, "bits": 4, "group": 128, "zeros": "none", "half": 0, "act": 16,
                         "sm": 90, "multiprocessors": 132, "path": path, "tokens": tokens, "warps_n": warps_n,
                         "warps_k": warps_k, "splits": splits, "half_accumulate": 0, "stages": 0, "us": [1.0, 1.0, 1.0]}
                    )  # fmt: skip
    clusters = [0] * 18
    clusters[2:5], clusters[8] = [66, 42, 31], 16
    plain = fit.Sweep(rows, clusters)
    card = {**plain.model.card(90), **PLANTED}
    generator = random.Random(1)
    for row, us in zip(rows, plain.model.predict(card)):
        row["us"] = [us * generator.uniform(1 - noise, 1 + noise)] * 3
    return fit.Sweep([row for row in rows if row["us"][1] < 1e20], clusters), card


@emulated
def test_the_fit_finds_planted_numbers_and_what_they_were_worth() -> None:
    sweep, truth = synthetic(0.004)
    before = sweep.model.card(90)
    fitted = sweep.fit(before)
    for name in PLANTED:
        assert fitted[name] == pytest.approx(truth[name], rel=0.08), name
        assert abs(before[name] / truth[name] - 1) > 0.08, f"{name} was there already"
    was, now = ([r.ratio for r in sweep.regrets(card)] for card in (before, fitted))
    assert fit.geometric_mean(now) < 1.01 < fit.geometric_mean(was)
    shape = sweep.shapes()[0]
    left_out = [r.ratio for r in sweep.regrets(sweep.fit(before, shape), shape)]
    assert fit.geometric_mean(left_out) < 1.02
    assert {r.problem[:2] for r in sweep.regrets(before, shape)} == {shape}


@emulated
def test_the_fit_writes_its_report_and_a_table(tmp_path: Path) -> None:
    """From files as stages leave them: comments, other modes, and a line without an end are passed over."""
    sweep, _ = synthetic(0.0)
    lines = ["# drive time", '{"mode": "list"}', '{"mode": "time", "N": 1']
    keep = {shape for shape in sweep.shapes()[:2]}
    for problem, config, us in zip(sweep.problems, sweep.configs, sweep.us):
        if problem[:2] in keep:
            row = {n: fit.ZEROS[v] if n == "zeros" else v for n, v in zip(fit.PROBLEM, problem)}
            row |= {n: fit.PATHS[v] if n == "path" else v for n, v in zip(fit.CONFIG, config)}
            lines.append(json.dumps({"mode": "time", **row, "us": [us, us, us]}))
    (tmp_path / "sweep.jsonl").write_text("\n".join(lines) + "\n")
    text = fit.fit(tmp_path, "a test, 2026-01-01")
    assert "regret" in text
    assert "fitted, left out" in text
    assert '"a test, 2026-01-01"};  // was' in (tmp_path / "fit" / "card.txt").read_text()
    table = json.loads((tmp_path / "fit" / "table.json").read_text())
    assert {(row["N"], row["K"]) for row in table} == keep
    assert all(row["regret"] >= 1 and row["us"] > 0 for row in table)


def test_a_wrong_row_of_a_tiles_product_is_named() -> None:
    """Rows by expert as `grouped_gemm` has them: another expert's row, and zeros."""
    of = experts.mixture(64, 32, 4, 2, "w4a16_g32", torch.device("cpu"))
    batch = experts.batch(of, 5, "even", 0, torch.device("cpu"))
    _, rows, offsets = sorted_by_expert(batch.ids, 4)
    owner = torch.searchsorted(offsets, torch.arange(len(rows)), right=True) - 1
    product = torch.stack([of.plain[0][e].float() @ batch.x[r].float() for e, r in zip(owner, rows)]).bfloat16()
    assert experts.wrong_product(of, batch, product) is None
    for wrong in (product.roll(1, 0), product * 0):
        assert "off by" in str(experts.wrong_product(of, batch, wrong))
