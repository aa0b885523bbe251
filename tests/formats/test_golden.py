"""Files that other tools made (tests/golden/make_<tool>.py), read to the weight that those tools compute from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qkernels import inspect
from qkernels.errors import CheckpointError
from qkernels.formats.directory import QuantizedSource
from qkernels.storage import write_json

FILES = Path(__file__).parent.parent / "golden" / "files"
REFUSED = {
    "hqq-axis0": r"layers\.0\.w4: axis is 0: its groups run along N, and kernels need them along K",
    "quanto": r"0\.weight\._data\._data looks like a weight of optimum-quanto, whose files are not read",
}
READ = sorted(path.stem for path in FILES.glob("*.safetensors") if path.stem not in REFUSED)
WRITTEN = [name for name in READ if name.startswith("gptqmodel") or name == "autoawq-gemm"]
# bitsandbytes computes int8 weights in two fp32 products, (q * SCB) * (1 / 127), ours in one with a rounded SCB / 127: three
# roundings of relative error 2^-24 on each side. Everything else is exact.
TOLERANCE = {"bitsandbytes-int8": 6 * 2**-24}


class Golden(NamedTuple):
    directory: Path
    tensors: dict[str, Tensor]
    expected: dict[str, Tensor]


def golden(name: str, directory: Path) -> Golden:
    """The file as a checkpoint directory, without the expected weights."""
    with safe_open(FILES / f"{name}.safetensors", "pt") as file:
        everything = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        metadata: dict[str, str] = file.metadata()
    config: dict[str, Any] = json.loads(metadata.pop("quantization_config"))
    expected = {key.removeprefix("expected."): t for key, t in everything.items() if key.startswith("expected.")}
    tensors = {key: t for key, t in everything.items() if not key.startswith("expected.")}
    save_file(tensors, directory / "model.safetensors", metadata)
    write_json(directory / "config.json", {"quantization_config": config} if config else {})
    return Golden(directory, tensors, expected)


def test_every_tool_has_its_file() -> None:
    tools = {path.stem.removeprefix("make_") for path in FILES.parent.glob("make_*.py")}
    assert {name.partition("-")[0] for name in (*READ, *REFUSED)} == tools
    assert len(READ) >= 20


@pytest.mark.parametrize("name", READ)
def test_read_to_the_weights_of_the_tool(name: str, tmp_path: Path) -> None:
    directory, _, expected = golden(name, tmp_path)
    source = QuantizedSource.open(directory)
    assert source.modules.keys() == expected.keys()
    for module, weight in expected.items():
        read = source.parse(module).dequantize(weight.dtype)
        if name in TOLERANCE:
            assert bool(((read - weight).abs() <= TOLERANCE[name] * weight.abs()).all()), module
        else:
            assert torch.equal(read, weight), module
    inspect(directory).to_markdown()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_are_the_bytes_of_the_tool(name: str, tmp_path: Path) -> None:
    """Read and written again, nothing has changed."""
    directory, tensors, expected = golden(name, tmp_path)
    source = QuantizedSource.open(directory)
    assert source.format is not None
    for module in expected:
        for suffix, tensor in source.format.write(source.parse(module)).items():
            stored = tensors[f"{module}.{suffix}"]
            assert tensor.dtype == stored.dtype and torch.equal(tensor, stored), (module, suffix)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_the_right_reason(name: str, tmp_path: Path) -> None:
    directory, *_ = golden(name, tmp_path)
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        inspect(directory)
