"""A program that does not import this library gets an error from our files, never random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels import load, replace_linear, save
from qkernels.errors import CheckpointError
from qkernels.integrations import serving
from tests.checkpoints import small_llama
from tests.tiny_models import tiny_model

FROM_PRETRAINED = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "qkernels" not in sys.modules
print("LOADED")
"""
SERVE = """
import sys
from transformers.cli.serve import Serve
Serve(force_model=sys.argv[1], port=1, device="cpu", non_blocking=True)
print("LOADED")
"""


def elsewhere(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=120, check=False
    )


def written(directory: Path, format: str) -> Path:
    model = small_llama()
    replace_linear(model, "w4a16_g32")
    save(model, directory, format=format)
    return directory


@pytest.mark.parametrize("format", ["native", "cpu_tile_a16"])
def test_from_pretrained_refuses(tmp_path: Path, format: str) -> None:
    directory = written(tmp_path / "out", format)
    done = elsewhere(FROM_PRETRAINED, directory)
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "mismatch" in done.stderr
    assert "q_proj.weight" in done.stderr
    assert load(directory) is not None


@pytest.mark.parametrize("format", ["native", "cpu_tile_a16"])
def test_experts_alone_are_refused(tmp_path: Path, format: str) -> None:
    """Stacked experts are parameters without a `.weight`; an empty tensor of the parameter's name stands for each."""
    model = tiny_model("mixtral", num_local_experts=4, hidden_size=64, intermediate_size=64)
    report = replace_linear(model, "w4a16_g32", include="*experts")
    assert report.replaced and all("experts" in name for name in report.replaced)
    save(model, tmp_path / "out", format=format)
    done = elsewhere(FROM_PRETRAINED, tmp_path / "out")
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "mlp.experts.gate_up_proj" in done.stderr
    assert load(tmp_path / "out") is not None


def test_a_stack_that_is_one_is_left_over(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_local_experts=4)
    replace_linear(model, "w4a16_g16", include="*experts")
    save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    name = "model.layers.0.block_sparse_moe.experts.down_proj"
    tensors = load_file(path)
    assert not tensors[name].numel()
    save_file(tensors | {name: torch.ones(4, 2, 2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj.*both a weight .*left over"):
        load(tmp_path / "out")
    del tensors[name]  # as files from before
    save_file(tensors, path, {"format": "pt"})
    assert load(tmp_path / "out") is not None


def test_without_the_guard_it_would_be_random(tmp_path: Path) -> None:
    """What files from before do there: the reason for all this."""
    directory = written(tmp_path / "out", "native")
    path = directory / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if t.numel()}
    save_file(tensors, path, {"format": "pt"})
    done = elsewhere(FROM_PRETRAINED, directory)
    assert "LOADED" in done.stdout, done.stderr
    assert load(directory) is not None  # here they load as ever


@pytest.mark.skipif(not serving.there(), reason=f"serving needs more: {serving.INSTALL}")
def test_transformers_serve_refuses(tmp_path: Path) -> None:
    done = elsewhere(SERVE, written(tmp_path / "out", "native"))
    assert done.returncode != 0
    assert "LOADED" not in done.stdout


@pytest.mark.parametrize("format", ["native", "cpu_tile_a16"])
def test_a_weight_that_is_one_is_left_over(tmp_path: Path, format: str) -> None:
    directory = written(tmp_path / "out", format)
    path = directory / "model.safetensors"
    tensors = load_file(path) | {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64)}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.*both a weight .*left over"):
        load(directory)
