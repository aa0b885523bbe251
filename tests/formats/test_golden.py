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

from qkernels import NF4, inspect
from qkernels.checkpoint import open_checkpoint
from qkernels.errors import CheckpointError
from qkernels.quantizers.nf4 import dynamic_map, twice_quantized
from qkernels.storage import write_json

FILES = Path(__file__).parent.parent / "golden" / "files"
REFUSED = {
    "hqq-axis0": r"layers\.0\.w4: axis is 0: its groups run along N, and kernels need them along K",
    "quanto": r"0\.weight\._data\._data looks like a weight of optimum-quanto, and quanto_qmap.json, which .* is not beside",
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
    originals: dict[str, Tensor]


def golden(name: str, directory: Path) -> Golden:
    """The file as a checkpoint directory, without the expected and the original weights."""
    with safe_open(FILES / f"{name}.safetensors", "pt") as file:
        everything = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        metadata: dict[str, str] = file.metadata()
    config: dict[str, Any] = json.loads(metadata.pop("quantization_config"))
    expected, originals = (
        {key.removeprefix(start): t for key, t in everything.items() if key.startswith(start)}
        for start in ("expected.", "original.")
    )
    tensors = {key: t for key, t in everything.items() if not key.startswith(("expected.", "original."))}
    save_file(tensors, directory / "model.safetensors", metadata)
    write_json(directory / "config.json", {"quantization_config": config} if config else {})
    return Golden(directory, tensors, expected, originals)


def test_every_tool_has_its_file() -> None:
    tools = {path.stem.removeprefix("make_") for path in FILES.parent.glob("make_*.py")}
    assert {name.partition("-")[0] for name in (*READ, *REFUSED)} == tools
    assert len(READ) >= 20


@pytest.mark.parametrize("name", READ)
def test_read_to_the_weights_of_the_tool(name: str, tmp_path: Path) -> None:
    directory, _, expected, _ = golden(name, tmp_path)
    source = open_checkpoint(directory)
    assert source.modules.keys() == expected.keys()
    for module, weight in expected.items():
        read = source.weight(module).weight.dequantize(weight.dtype)
        if name in TOLERANCE:
            assert bool(((read - weight).abs() <= TOLERANCE[name] * weight.abs()).all()), module
        else:
            assert torch.equal(read, weight), module
    inspect(directory).to_markdown()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_are_the_bytes_of_the_tool(name: str, tmp_path: Path) -> None:
    """Read and written again, nothing has changed."""
    directory, tensors, expected, _ = golden(name, tmp_path)
    source = open_checkpoint(directory)
    assert source.format is not None
    for module in expected:
        for suffix, tensor in source.format.write(source.weight(module).weight).items():
            stored = tensors[f"{module}.{suffix}"]
            assert tensor.dtype == stored.dtype and torch.equal(tensor, stored), (module, suffix)


def test_nf4_and_fp4_have_the_codes_and_scales_of_bitsandbytes(tmp_path: Path) -> None:
    """Bit for bit, weights on the edges between codes included. With double quantization it chooses codes by the first scale."""
    directory, tensors, _, originals = golden("bitsandbytes-4bit", tmp_path)
    source = open_checkpoint(directory)
    assert len(originals) == 6
    for module, weight in originals.items():
        ours, theirs = (
            NF4(codebook=module[9:12], scale_dtype=torch.float32).quantize(weight),
            source.weight(module).weight,
        )
        assert torch.equal(ours.codes, theirs.codes), module
        if module.endswith("nested"):
            check_nested_scales(ours.scales, theirs.scales, tensors, module)
        else:
            assert torch.equal(ours.scales, theirs.scales), module


def check_nested_scales(largest: Tensor, stored: Tensor, tensors: dict[str, Tensor], module: str) -> None:
    """The same table, and the same second code, hence scale, for each first scale. bitsandbytes' compiled code for CPUs is
    coarse within 2^-15 of the middle between two codes (a first scale of layer 3, 1.4e-5 from it, got the farther one), where
    its Python code is exact; only there may it differ."""
    table = dynamic_map()
    assert torch.equal(table, tensors[f"{module}.weight.nested_quant_map"])
    offsets = largest.flatten() - largest.mean()
    relative = offsets / offsets.abs().max()
    to_middle = (relative[:, None] - (table[1:] + table[:-1]) / 2).abs().amin(1)
    same = twice_quantized(largest).flatten() == stored.flatten()
    assert bool((same | (to_middle < 2**-15)).all()), module
    assert int(same.sum()) >= len(same) - 1


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_the_right_reason(name: str, tmp_path: Path) -> None:
    directory, *_ = golden(name, tmp_path)
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        inspect(directory)
