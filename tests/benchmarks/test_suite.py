"""The suite as its users meet it: files, the command, gpu-check, models, the guard, the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from benchmarks import (
    environment,
    gpu_check,
    gpu_properties,
    guard,
    guard_cuda,
    kernels,
    models,
    quality,
    quick,
    report,
    results,
    roofs,
    shapes,
)
from benchmarks.llama import SIZES, Llama, predicted_memory
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
    case = kernels.Case(shapes.Layer("llama-3-8b", "o", 64, 256), (1, 4), QuantScheme(), torch.bfloat16)
    monkeypatch.setattr(quick, "quick_cases", lambda *_: [case])
    return quick.quick(CPU, seconds=0.01)


def test_results_survive_their_file(small_run: results.Run, tmp_path: Path) -> None:
    results.write(small_run, tmp_path / "here" / "run.json")
    assert results.read(tmp_path / "here" / "run.json") == small_run
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["run.json"]
    assert {"commit", "date", "torch", "cpu", "threads", "caches", "quiet", "isa"} <= small_run.environment.keys()


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 1, "rows": [{"model": "m"}]}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ArgumentError, match="(must be JSON that `qkernels bench --json` wrote|results of format 99)"):
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
    assert (json.loads(out)["format"] == results.FORMAT) if option == "--json" else "," in out
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


# --- gpu-check -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) != 0
    assert "needs a GPU" in capsys.readouterr().err


def test_parts_write_their_outcome_as_they_go_and_are_not_repeated(tmp_path: Path) -> None:
    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    parts = [
        gpu_check.Part("good", python(count + "; print('seen')"), 1),
        gpu_check.Part("bad", python("raise SystemExit(3)"), 1),
        gpu_check.Part("slow", python("import time; time.sleep(60)"), 60, limit=1),
        gpu_check.Part("tool", python("0"), 1, needs="no-such-sanitizer"),
    ]
    found = {o.part: o.verdict for o in gpu_check.run_all(parts, tmp_path, "abc")}
    assert found == {"good": "passed", "bad": "failed", "slow": "out of time", "tool": "left out"}
    assert "seen" in (tmp_path / "good.log").read_text()
    assert json.loads((tmp_path / "bad.outcome.json").read_text())["verdict"] == "failed"
    gpu_check.run_all(parts[:1], tmp_path, "abc")
    assert (tmp_path / "count").read_text() == "x"
    gpu_check.run_all(parts[:1], tmp_path, "def")
    assert (tmp_path / "count").read_text() == "xx"


def test_gpu_check_leaves_one_file_of_numbers_and_a_table(small_run: results.Run, tmp_path: Path) -> None:
    out, commit = tmp_path / "some-gpu" / "gpu-check", small_run.environment["commit"]
    other = replace(small_run, rows=[replace(row, model="qwen3-8b") for row in small_run.rows])
    results.write(small_run, out / "llama-3-8b.json")
    results.write(other, out / "qwen3-8b.json")
    results.write(replace(other, environment={**other.environment, "commit": "older"}), out / "qwen3-32b.json")
    outcomes = [gpu_check.Outcome("tests", "failed", "exit code 1; see tests.log", 3.0, commit)]
    text = gpu_check.summarize(outcomes, out, commit, date(2026, 1, 2)).read_text()
    assert re.search(r"tests +\| failed +\| 3 ", text)
    assert "### qwen3-8b o: N=64 K=256" in text
    joined = results.read(tmp_path / "some-gpu" / f"2026-01-02-{commit}.json")
    assert [row.model for row in joined.rows] == ["llama-3-8b"] * len(small_run.rows) + ["qwen3-8b"] * len(other.rows)


def test_every_part_is_under_ten_minutes_and_can_be_started() -> None:
    parts = gpu_check.parts(Path("out"))
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert part.limit < 600
        if "-m" in part.command and (module := part.command[part.command.index("-m") + 1]).startswith("benchmarks"):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists() or (ROOT / module / "__main__.py").exists()


def test_a_dry_run_lists_every_part_and_all_could_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in gpu_check.parts(environment.RESULTS / "GPU" / "gpu-check"):
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
    assert gpu_check.dry_run([gpu_check.Part("broken", (sys.executable, *command), 1)]) == 1
    assert re.search(f"broken .*CANNOT START: .*{why}", capsys.readouterr().out)


def test_other_bits_are_noticed() -> None:
    x = torch.ones(4)
    assert gpu_properties.differing(lambda x: x * 2, x, 5) == 0
    calls = iter(range(100))
    assert gpu_properties.differing(lambda x: x + (next(calls) == 3), x, 5) == 1


# --- models ----------------------------------------------------------------------------------------------------------------


def test_predicted_memory_is_what_the_weights_take() -> None:
    g = SIZES["tiny"]
    for scheme in (None, QuantScheme.parse("w4a16_g128"), QuantScheme.parse("w8a16_g128")):
        model = Llama(g, scheme, 40, torch.bfloat16, CPU)
        taken = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        predicted = predicted_memory(g, scheme, 40, 32)
        # norms, rotary tables and positions are not in the arithmetic: less than 1 %
        assert predicted.total - predicted.activations == pytest.approx(taken, rel=0.01)


def test_the_model_decodes_as_it_prefills() -> None:
    torch.manual_seed(0)
    model = Llama(SIZES["tiny"], None, 8, torch.float32, CPU)
    tokens = torch.randint(0, 100, (1, 6))
    places = torch.arange(8)
    with torch.inference_mode():
        whole = model(tokens, places[:6])
        model(tokens[:, :4], places[:4])
        for i in (4, 5):
            last = model(tokens[:, i : i + 1], places[i : i + 1])
    assert torch.allclose(whole, last, rtol=1e-3, atol=1e-3 * float(whole.std()))


def test_a_model_row() -> None:
    row = models.measure("tiny", "int4", "eager", CPU, prompt=8, new_tokens=2, repeats=1)
    assert row.prefill_tokens_per_s > 0
    assert row.predicted_bytes > row.weight_bytes / 2
    assert "int4" in models.to_markdown([row])


# --- the guard -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_instruction_counts_and_compiler_figures_have_not_risen(tmp_path: Path) -> None:
    if lacking := guard.missing():
        pytest.skip(f"SKIPPED: no {', no '.join(lacking)}")
    if "avx2" not in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""):
        pytest.skip("SKIPPED: this CPU has no AVX2")
    figures = guard.measure(tmp_path)
    assert guard.regressions(guard.committed(), figures, guard.compiler()) == []
    # Negative control: the scalar code in place of the AVX2 code is over even the widest bound.
    count = guard.instructions(tmp_path / "counted", guard.CASES["decode 4-bit"], tmp_path, isa="scalar")
    slow = {**figures, "instructions per weight": {**figures["instructions per weight"], "decode 4-bit": count}}
    assert len(guard.regressions(guard.committed(), slow, "another compiler")) == 1


def test_the_guard_knows_compilers_and_lost_figures() -> None:
    committed = {"compiler": "g++ 12", "figures": {"instructions per weight": {"a": 1.0}, "spills": {"avx2": 100.0}}}
    fine = {"instructions per weight": {"a": 1.02}, "spills": {"avx2": 100.0}}
    assert guard.regressions(committed, fine, "g++ 12") == []
    assert guard.regressions(committed, {**fine, "instructions per weight": {"a": 1.2}}, "g++ 14") == []
    assert (
        "bound 1.03 (same compiler)"
        in guard.regressions(committed, {**fine, "instructions per weight": {"a": 1.2}}, "g++ 12")[0]
    )
    assert "no longer measured" in guard.regressions(committed, {"spills": {"avx2": 1.0}}, "g++ 12")[0]
    added = {**fine, "spills": {"avx2": 100.0, "new": 0.0}}
    assert guard.regressions(committed, added, "g++ 12") == [
        "spills, new: not committed; python -m benchmarks.guard --update"
    ]


@pytest.mark.slow
def test_cuda_figures_have_not_risen() -> None:
    if lacking := guard_cuda.missing():
        pytest.skip(f"SKIPPED: no {', no '.join(lacking)}")
    figures, mixes = guard_cuda.measure()
    committed = guard.committed()["cuda"]
    assert guard.regressions(committed, figures, guard_cuda.compiler()) == []
    assert all(mix["tensor core"] for mix in mixes.values())
    # Negative control: a tenth more registers and one spilled register are over the bound.
    kernel = next(iter(figures["cuda registers"]))
    worse = {
        **figures,
        "cuda registers": {**figures["cuda registers"], kernel: committed["figures"]["cuda registers"][kernel] * 1.1},
    }
    worse["cuda spill bytes"] = {**figures["cuda spill bytes"], kernel: 8.0}
    assert len(guard.regressions(committed, worse, committed["compiler"])) == 2


SASS = """
.L_x_1:
        /*0000*/                   MOV R1, R2 ;
.L_x_2:
        /*0010*/                   LDS.128 R4, [R2] ;
        /*0020*/              @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0070*/                   EXIT ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
"""


def test_the_inner_loop_is_found_in_sass() -> None:
    lines = SASS.splitlines()
    assert guard_cuda.loops(lines) == [(1, 3), (0, 5), (8, 8)]
    assert guard_cuda.inner_loop(lines) == ["LDS", "HMMA", "BRA"]
    assert guard_cuda.mix(guard_cuda.inner_loop(lines)) == {"other": 1, "shared": 1, "tensor core": 1}
    assert guard_cuda.inner_loop(["        /*0000*/                   EXIT ;"]) == []


def test_micro_benchmarks_run() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks/micro",
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


# --- the page --------------------------------------------------------------------------------------------------------------


def test_the_page_has_its_pictures(small_run: results.Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [
        {"method": m, "label": "4 bit", "bytes": 1 << 20, "perplexity": p} for m, p in (("rtn", 9.0), ("gptq", 8.0))
    ]
    text = report.page([small_run], points, tmp_path).read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    results.write(small_run, tmp_path / "kernels.json")
    models.write(
        [models.measure("tiny", "int4", "eager", CPU, 8, 2, 1)],
        environment.describe(CPU),
        tmp_path / "models-tiny.json",
    )
    assert [p.name for p in sorted(tmp_path.glob("*.json")) if report.holds_kernels(p)] == ["kernels.json"]
    assert "| tiny " in report.page([], [], tmp_path, [(tmp_path / "models-tiny.md").read_text()]).read_text()
    (tmp_path / "q.json").write_text('[{"method": "rtn"}]')
    with pytest.raises(ArgumentError, match="method, label, bytes and perplexity"):
        report.read_quality(tmp_path / "q.json")


def test_quality_of_a_checkpoint(tiny_llama_dir: Path, sample_text: str, tmp_path: Path) -> None:
    text = sample_text[:3000]
    rows = quality.measure(tiny_llama_dir, text, text, ["rtn"], [4, 8], 32, 4, tmp_path / "quality.json", CPU)
    assert [row["label"] for row in rows] == ["16 bit", "4 bit", "8 bit"]
    assert rows[0]["kl"] == 0 < rows[2]["kl"] < rows[1]["kl"]
    assert rows[0]["bytes"] > rows[2]["bytes"] > rows[1]["bytes"]
    assert report.read_quality(tmp_path / "quality.json") == rows
