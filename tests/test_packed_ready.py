"""Checkpoints packed for a kernel of the CPU are read as they lie, after a look at all that can be wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qkernels import load, load_tokenizer, quantize
from qkernels.checkpoint import convert, open_checkpoint, to_gguf
from qkernels.errors import CheckpointError
from qkernels.quantizers import RTN
from tests.checkpoints import shapes_taken_apart
from tests.gguf_golden import FILES
from tests.gguf_written import FIELDS
from tests.tiny_models import tiny_model

LAYOUT = "cpu_tile_a16"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where a model lies packed, by what it was packed of."""
    root = tmp_path_factory.mktemp("ready")
    torch.manual_seed(0)
    tiny_model("llama", **FIELDS).save_pretrained(root / "hf")
    load_tokenizer(FILES / "llama.gguf").save_pretrained(root / "hf")
    to_gguf(root / "hf", root / "m.gguf", "Q4_K_M")
    quantize(
        root / "hf", RTN(bits=4, group_size=64, symmetric=False), save_to=root / "rtn", format="gptq", progress=False
    )
    sources = {"gguf": root / "m.gguf", "gptq": root / "rtn"}
    for name, source in sources.items():
        convert(source, root / name, LAYOUT)
    return {f"{name}, source": source for name, source in sources.items()} | {name: root / name for name in sources}


@pytest.mark.parametrize("name", ["gguf", "gptq"])
def test_they_are_the_layers_of_their_source(files: dict[str, Path], name: str, monkeypatch: Any) -> None:
    taken_apart = shapes_taken_apart(monkeypatch)
    ready, source = load(files[name]).state_dict(), load(files[f"{name}, source"]).state_dict()
    assert set(taken_apart) <= {(300, 256)}, "a head whose rows are no whole tiles"
    assert ready.keys() == source.keys()
    for key, value in ready.items():
        assert torch.equal(value, source[key]), key
    assert torch.equal(
        load(files[name], activations="16bit")(torch.arange(9)[None]).logits,
        load(files[name])(torch.arange(9)[None]).logits,
    )


def changed(directory: Path, target: Path, tensor: str, change: Callable[[Tensor], Tensor]) -> Path:
    target.mkdir()
    for file in directory.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            if tensor in tensors:
                tensors[tensor] = change(tensors[tensor].clone()).contiguous()
            save_file(tensors, target / file.name, {"format": "pt"})
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t.view(-1)[-1] = value
        return t

    return change


@pytest.mark.parametrize(
    ("name", "suffix", "change", "message"),
    [
        ("gguf", "outer_scales", _filled(float("nan")), "factors.outer must be finite"),
        ("gguf", "outer_zeros", _filled(float("inf")), "factors.outer_zeros must be finite"),
        ("gguf", "scales", _filled(64), "factors.small must be 0 … 63"),
        ("gguf", "qweight", lambda t: t[:-1], "qweight must be"),
        ("gptq", "scales", _filled(float("inf")), "scales must be finite"),
        ("gptq", "zeros", _filled(17), "zeros must be 0 … 15"),
        ("gptq", "scales", lambda t: t.double(), "scales must be"),
    ],
)
def test_what_no_weight_packs_to_is_refused(
    files: dict[str, Path], name: str, suffix: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    module = "model.layers.1.mlp.gate_proj"
    broken = changed(files[name], tmp_path / "broken", f"{module}.{suffix}", change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(broken).ready(module)
    with pytest.raises(CheckpointError, match=module):
        load(broken)
