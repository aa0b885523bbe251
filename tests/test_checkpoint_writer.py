"""The writer of checkpoints, numbers that JSON has not, and the arguments of `load`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from qkernels import QuantScheme, load, replace_linear, save
from qkernels.checkpoint import CheckpointWriter, open_checkpoint
from qkernels.errors import ArgumentError, CheckpointError, ConversionError
from qkernels.storage import read_json
from tests.checkpoints import logits, plain_checkpoint
from tests.strategies import random_weight, same_weight


def test_the_writer_streams_shards(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"model_type": "x", "quantization_config": {"stale": 1}}, "gptq", 4096)
    default, other = QuantScheme(4, 32), QuantScheme(8, "channel")
    for i in range(4):
        writer.add_quantized(f"layers.{i}.a", random_weight(default if i else other, 32, 64, seed=i))
        writer.add_tensor(f"layers.{i}.b.weight", torch.zeros(8, 8))
        writer.add_tensor(f"layers.{i}.norm.weight", torch.zeros(8))
    writer.add_tensor("embed.weight", torch.zeros(8, 8))
    writer.close()
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    config = read_json(tmp_path / "config.json")
    assert config["model_type"] == "x"
    quantization_config = config["quantization_config"]
    assert (quantization_config["bits"], quantization_config["group_size"]) == (4, 32)  # the most frequent
    assert sorted(quantization_config["dynamic"]) == [
        r"+:^layers\.0\.a$", *(rf"-:^layers\.{i}\.b$" for i in range(4))
    ]  # fmt: skip
    source = open_checkpoint(tmp_path)
    for i in range(4):
        expected = random_weight(default if i else other, 32, 64, seed=i)
        assert same_weight(source.weight(f"layers.{i}.a").weight, expected)


def test_the_writer_refuses(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {}, "awq")
    with pytest.raises(ConversionError, match="no quantized module was added"):
        writer.close()
    with pytest.raises(ConversionError, match=r"^a\.b: awq cannot store this weight: N=12 is not a multiple of 8"):
        writer.add_quantized("a.b", random_weight("w4a16_g32", 12, 64))
    writer.add_quantized("a", random_weight("w4a16_g32", 8, 64))
    with pytest.raises(CheckpointError, match=r"tensor a.qweight was added twice"):
        writer.add_quantized("a", random_weight("w4a16_g32", 8, 64))
    writer.add_quantized("b", random_weight("w4a16_g64", 8, 64))
    with pytest.raises(ConversionError, match="one file has one group size, got w4a16_g32 and w4a16_g64"):
        writer.close()


def test_infinity_in_a_config(tmp_path: Path) -> None:
    """transformers spells it as an object, which JSON can hold; ours reads it back as it does, and writes it so."""
    config = Mamba2Config(
        vocab_size=64,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    )
    model = Mamba2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "plain")
    assert read_json(tmp_path / "plain" / "config.json")["time_step_limit"][1] == {"__float__": "Infinity"}
    loaded = load(tmp_path / "plain")
    assert tuple(loaded.config.time_step_limit) == (0.0, math.inf)
    assert torch.equal(logits(loaded), logits(model))
    replace_linear(loaded, "w8a16_g16", include="*.in_proj", progress=False)
    save(loaded, tmp_path / "quantized")
    assert read_json(tmp_path / "quantized" / "config.json")["time_step_limit"][1] == {"__float__": "Infinity"}
    assert torch.equal(logits(load(tmp_path / "quantized")), logits(loaded))


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name(dtype: Any, tmp_path: Path) -> None:
    assert load(plain_checkpoint(tmp_path / "m"), dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"torch_dtype": "auto"}, "load takes no torch_dtype=: it is called dtype here"),
        ({"cache_dir": "x"}, "load takes no cache_dir=: set HF_TOKEN or HF_HUB_CACHE, or download it first"),
        ({"trust_remote_code": True}, "no code of a checkpoint is run here"),
        ({"dtype": "int8"}, "dtype must be float16, bfloat16 or float32, also by name, or None, got 'int8'"),
    ],
)
def test_arguments_of_transformers_get_a_way_out(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load("nowhere", **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        load("nowhere", nonsense=1)
