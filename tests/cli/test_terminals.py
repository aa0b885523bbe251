"""The command line on bad terminals, with impatient users and incomplete installations: never a traceback, and a way out."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels import RTN, quantize
from qkernels.cli import inspect as inspect_command
from qkernels.cli.main import BROKEN_PIPE, INTERRUPTED, main
from qkernels.errors import MissingPackage
from qkernels.layerwise.work import WorkDirectory, work_path
from tests.checkpoints import plain_checkpoint

PACKAGE = Path(qkernels.__file__).parent


def run(code: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own that runs `code`."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def prints(*lines: str) -> int:
    """A command that does nothing else."""
    print(*lines, sep="\n")
    return 0


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "{model}"]])
def test_a_reader_that_goes_away(arguments: list[str], tmp_path: Path) -> None:
    model = plain_checkpoint(tmp_path / "model") if "{model}" in arguments else tmp_path
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "qkernels", *(a.format(model=model) for a in arguments)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode in (
        (BROKEN_PIPE,) if "inspect" in arguments else (0, BROKEN_PIPE)
    )  # argparse passes over it by itself


def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")  # as LANG=C has it
    monkeypatch.setattr(sys, "stdout", terminal)
    text = "KL(a ‖ b) 3 × 4 → ü 😀 \udcff"
    monkeypatch.setattr(inspect_command, "run", lambda args: prints(text, json.dumps([text], ensure_ascii=False)))
    assert main(["inspect", "x"]) == 0
    first, second = written.getvalue().decode("ascii").splitlines()
    assert first == "KL(a || b) 3 x 4 -> \\u00fc \\ud83d\\ude00 \\udcff"
    assert json.loads(second) == ["KL(a || b) 3 x 4 -> ü 😀 \udcff"]


def test_a_terminal_with_unicode_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(inspect_command, "run", lambda args: prints("‖ \udcff"))
    assert main(["inspect", "x"]) == 0
    assert written.getvalue().decode() == "‖ \\udcff\n"


def test_ctrl_c_in_the_first_second() -> None:
    """While torch is imported, which the options of `quantize` need."""
    code = (
        "import os, signal, sys, threading\nfrom qkernels.cli.main import main\nassert 'torch' not in sys.modules\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\nsys.exit(main(['quantize', 'a', 'b']))"
    )
    done = run(code)
    assert done.returncode == INTERRUPTED
    assert done.stderr.splitlines() == ["qkernels: interrupted; nothing half-written was left behind"]


def test_an_interrupted_run_names_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = plain_checkpoint(tmp_path / "model"), tmp_path / "out"
    finish = WorkDirectory.add

    def finish_three(work: WorkDirectory, *unit: object) -> None:
        if len(work.finished) == 3:
            raise KeyboardInterrupt
        finish(work, *unit)  # type: ignore[arg-type]

    monkeypatch.setattr(WorkDirectory, "add", finish_three)
    arguments = ["quantize", str(source), str(out), "--method", "rtn", "--group-size", "32"]
    assert main(arguments) == INTERRUPTED
    assert f"{out}: 3 finished layers are kept; the same command with --resume" in caplog.text
    monkeypatch.setattr(WorkDirectory, "add", finish)
    assert main([*arguments, "--resume"]) == 0
    assert not work_path(out).exists()


@pytest.mark.parametrize("spoil", ["key.json", "unit-00001/unit.json", "unit-00000/unit.json"])
def test_a_work_directory_that_cannot_be_used_is_named(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lost a file, or a layer of an earlier version: the error says which directory to remove."""
    source, out = plain_checkpoint(tmp_path / "model"), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(
            "qkernels.layerwise.hosts.DirectoryHost.write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            quantize(source, RTN(4, 32), save_to=out, progress=False)
    path = work_path(out) / spoil
    path.write_text('{"name": "x", "modules": [{"nickname": "y"}]}' if "00001" in spoil else "")
    with pytest.raises(qkernels.QKernelsError, match=rf"{work_path(out).name}.*; remove the directory"):
        quantize(source, RTN(4, 32), save_to=out, progress=False, resume=True)


def test_without_transformers(tmp_path: Path) -> None:
    """`pip install .` installs none: what needs it says so in one line, doctor notices, and the rest runs."""
    code = """
import sys
sys.modules["transformers"] = None
from qkernels.cli.main import main
model = sys.argv[1]
for command in (["generate", model, "--prompt", "a"], ["quantize", model, model + "-out", "--method", "rtn", "--dry-run"]):
    assert main(command) == 1
assert main(["inspect", model]) == 0
assert main(["doctor"]) == 0
"""
    model = plain_checkpoint(tmp_path / "model")
    done = run(code, str(model))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [
        line.partition(" needs transformers, which is not installed: pip install 'qkernels[hf]'")[0] for line in lines
    ] == [
        "qkernels generate: error: reading a tokenizer",
        "qkernels quantize: error: building the model of a checkpoint",
    ]
    assert all("[hf]" in line for line in lines)
    assert "transformers absent" in " ".join(done.stdout.split())
    assert "pip install 'qkernels[hf]'" in done.stdout


def test_the_missing_package_is_both_errors() -> None:
    assert issubclass(MissingPackage, qkernels.QKernelsError) and issubclass(MissingPackage, ImportError)


def test_a_clone_that_was_never_built(tmp_path: Path) -> None:
    """It hides the package that is installed from a Python that is started in it."""
    for place in ("clone", "installed"):
        shutil.copytree(PACKAGE, tmp_path / place / "qkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "installed" / "qkernels" / "_C.abi3.so").write_bytes(b"")
    code = "import sys; sys.path.append(sys.argv[1]); from qkernels import extension; print(extension.status().error)"
    said = run(code, str(tmp_path / "installed"), cwd=tmp_path / "clone", PYTHONPATH="").stdout
    assert f"there is no _C*.so in {tmp_path / 'clone' / 'qkernels'}" in said
    assert "pip install . --no-build-isolation" in said
    assert (
        f"start Python in another directory: {tmp_path / 'installed' / 'qkernels'} is built, and hidden by this one"
        in said
    )
    hidden_by_nothing = run(code, "/nowhere", cwd=tmp_path / "clone", PYTHONPATH="").stdout
    assert "start Python in another directory" in hidden_by_nothing


def test_signals_and_threads_are_as_before() -> None:
    """Running a command changes no handler of the program that runs it."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGPIPE), torch.get_num_threads()
    with pytest.raises(SystemExit):
        main(["--version"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGPIPE), torch.get_num_threads()) == before
