"""The wheel of `make wheel` in an empty environment: no compiler, no checkout, any torch from 2.10 on."""

from __future__ import annotations

import json
import os
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHEELS = sorted((ROOT / "dist").glob("qkernels-*.whl"))
USE = """
import json, torch, qkernels
from qkernels import QuantScheme, extension, list_kernels
layer = torch.nn.Linear(512, 256)
model = torch.nn.Sequential(layer, torch.nn.ReLU())
report = qkernels.replace_linear(model, "w4a16_g128")
x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
wanted = torch.relu(torch.nn.functional.linear(x, model[0].weight, model[0].bias))
error = ((model(x) - wanted).norm() / wanted.norm()).item()
print(json.dumps({"torch": torch.__version__, "path": qkernels.__file__, "isa": extension.status().isa, "error": error}))
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    if not WHEELS:
        pytest.skip("no wheel in dist/: make wheel")
    return WHEELS[-1]


def test_the_wheel_is_for_any_python_and_brings_no_torch(wheel: Path) -> None:
    """One binary on the stable ABI, the tag that auditwheel found, and a size that is said in the docs."""
    assert "-cp310-abi3-manylinux_" in wheel.name, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["qkernels/_C.abi3.so"], names
    assert not [name for name in names if "torch" in Path(name).name and ".so" in name]


@pytest.mark.large
@pytest.mark.parametrize("torch_version", os.environ.get("QKERNELS_WHEEL_TORCH", "2.13.0").split(","))
def test_it_runs_where_nothing_else_is(wheel: Path, tmp_path: Path, torch_version: str) -> None:
    """QKERNELS_WHEEL_TORCH=2.10.0,2.11.0,2.12.0,2.13.0 tries each; torch's CUDA builds take gigabytes."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    empty = {"PATH": str(python.parent), "HOME": str(tmp_path), "LANG": "C.UTF-8"}

    def run(*command: str) -> str:
        done = subprocess.run([str(python), *command], cwd=tmp_path, env=empty, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    # pip's own settings stay; a checkout in PYTHONPATH would be "already installed" to it.
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = (str(python), "-m", "pip", "install", "--quiet", "--progress-bar", "off")
    subprocess.run([*pip, f"torch=={torch_version}"], env=settings, check=True)
    subprocess.run([*pip, f"{wheel}[hf]"], env=settings, check=True)
    found = json.loads(run("-c", USE).splitlines()[-1])
    assert found["torch"].split("+")[0] == torch_version and found["path"].startswith(str(tmp_path))
    assert found["isa"] and found["error"] < 1e-6, found
    assert "everything is well" in run("-m", "qkernels", "doctor")
    model = ROOT / "examples" / "demo_model"
    run("-m", "qkernels", "quantize", str(model), "out", "--method", "rtn", "--bits", "4")
    assert run("-m", "qkernels", "generate", "out", "--prompt", "It was a fine morning", "--tokens", "4")
