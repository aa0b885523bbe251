"""Runs the files of checks in the interpreter with TRITON_INTERPRET=1, which Triton reads once, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")


def test_every_kernel_and_format_in_the_interpreter() -> None:
    """A minute and more: an interpreted program takes milliseconds, and every scheme runs through every kernel."""
    here = Path(__file__).parent
    files = [str(here / name) for name in ("interpreted.py", "interpreted_grouped.py", "interpreted_ops.py")]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=env, cwd=here.parents[1], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 220, run.stdout
