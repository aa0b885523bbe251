"""The loader: what it reports, the override of the instruction set, a missing or broken library, and what is in the binary."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels
from qkernels import extension
from qkernels.errors import ArgumentError
from tests.ops.conftest import ISAS
from tests.ops.helpers import integers, multiply
from tests.strategies import random_weight

PACKAGE = Path(qkernels.__file__).parent
compiled = pytest.mark.skipif(not extension.status().isas, reason=f"no compiled extension: {extension.status().error}")

ATTEMPT = """
import torch
from qkernels import extension, ops
from qkernels.layouts import get_layout
from tests.strategies import random_weight
weight = random_weight("w4a16_g32", 40, 96)
buffers = get_layout("cpu_tile_a16").pack(weight)
status = extension.status()
print("STATUS", status.loaded, status.isa, status.error)
try:
    ops.gemm("cpu_tile_a16", torch.ones(2, 96), **buffers, in_features=96, out_features=40, scheme=weight.scheme)
    print("RAN")
except Exception as error:
    print("RAISED", type(error).__name__, error)
reference = get_layout("reference").pack(weight)
y = ops.gemm("reference", torch.ones(2, 96), **reference, in_features=96, out_features=40, scheme=weight.scheme)
print("REFERENCE", list(y.shape))
"""


def attempt(package_parent: Path, **environment: str) -> str:
    """Loads the package in a fresh interpreter and tries to multiply."""
    path = os.pathsep.join([str(package_parent), str(PACKAGE.parent)])
    result = subprocess.run(
        [sys.executable, "-c", ATTEMPT], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment}, cwd=package_parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def copy_without_library(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "qkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@compiled
def test_status_names_the_best_instruction_set() -> None:
    status = extension.status()
    assert status.loaded
    assert status.error is None
    assert status.path is not None
    assert status.path.name.startswith("_C")
    assert status.isas[0] == "scalar"
    assert set(status.isas) <= set(ISAS)
    assert status.isa == os.environ.get("QKERNELS_ISA", status.isas[-1])


@compiled
def test_all_instruction_sets_agree() -> None:
    weight, x = random_weight("w4a16_g32", 70, 168, exact=True), integers(5, 168)
    chosen = extension.status().isa
    assert chosen is not None
    results = []
    for isa in extension.status().isas:
        extension.use_isa(isa)
        assert extension.status().isa == isa
        results.append(multiply(weight, x))
    extension.use_isa(chosen)
    assert all(torch.equal(result, results[0]) for result in results)


@compiled
def test_the_environment_chooses() -> None:
    out = attempt(PACKAGE.parent, QKERNELS_ISA="scalar")
    assert "STATUS True scalar None" in out
    assert "RAN" in out


@compiled
def test_an_unknown_instruction_set_is_an_error_at_first_use_and_not_before() -> None:
    out = attempt(PACKAGE.parent, QKERNELS_ISA="avx3")
    assert 'STATUS False None QKERNELS_ISA must be one of "scalar' in out
    raised = out[out.index("RAISED") :]
    assert "RuntimeError" in raised
    assert 'got "avx3"; unset it for the best one' in raised
    assert "REFERENCE [2, 40]" in out
    with pytest.raises(ArgumentError, match=r'the instruction set must be one of "scalar.*got "sse9"'):
        extension.use_isa("sse9")


def test_without_a_library_everything_but_its_kernels_works(copy_without_library: Path) -> None:
    out = attempt(copy_without_library)
    assert "STATUS False None there is no _C*.so in" in out
    assert "RAISED UnsupportedProblem torch.ops.qkernels.gemm_cpu_tile_a16 is compiled code" in out
    assert "pip install . --no-build-isolation" in out
    assert "REFERENCE [2, 40]" in out


def test_a_broken_library_is_reported(copy_without_library: Path) -> None:
    (copy_without_library / "qkernels/_C.abi3.so").write_bytes(b"not a library")
    out = attempt(copy_without_library)
    assert "STATUS False None _C.abi3.so does not load with torch" in out
    assert "RAISED UnsupportedProblem" in out
    assert "REFERENCE [2, 40]" in out


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_binary_asks_for_no_python_and_no_newer_torch() -> None:
    path = extension.status().path
    assert path is not None
    wanted = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in wanted.splitlines()]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    # Only the C shim of the stable ABI: no C++ symbol of torch.
    assert not [name for name in names if "c10" in name or "N2at" in name or "N5torch" in name]
