"""`quantize` on a sharded directory holds the layer at work and the activations: measured in a process of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from qkernels import GPTQ
from qkernels.calibrate import preview
from qkernels.models.building import empty_model
from qkernels.storage import CONFIG, ShardWriter, TensorSource, write_json
from tests.memory_watch import measured

MIB = 2**20
METHOD = GPTQ(4, 128, act_order="none", clip="none")
INCLUDE = ("*.down_proj",)  # the widest input; the other linears of a layer would only take more time
WINDOWS, SEQ_LEN = 4, 32

WORKS = {
    "directory": f"""
method = GPTQ(4, 128, act_order="none", clip="none")
quantize(source, method, calibration=ids, seq_len=ids.shape[1], include={INCLUDE!r}, save_to=out, progress=False)
""",
    "in memory": "quantize(load(source), RTN(4, 128), progress=False)",
}


def sharded(directory: Path, hidden: int, intermediate: int, layers: int, shard_bytes: int) -> int:
    """A bf16 Llama of random weights in several shards, written a tensor at a time; returns its bytes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=SEQ_LEN,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    directory.mkdir()
    write_json(directory / CONFIG, json.loads(config.to_json_string()))
    model = empty_model(json.loads(config.to_json_string()), torch.bfloat16, directory)
    writer = ShardWriter(directory, shard_bytes)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            tensor = (torch.randn(parameter.shape, generator=generator) * hidden**-0.5).bfloat16()
        writer.add(name, tensor)
    writer.close()
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return writer.total_bytes


def bound(source: Path) -> int:
    """The preview's memory (activations; the layer in fp32 and three matrices of second moments) and what is small beside it:
    the layer in 16 bits and its codes in bytes until they are written, the weight in hand in fp32 four times (itself, what
    rounding makes of it, what is left, their difference), the layer's inner activations in fp32 (Q, K, V, gate, up and their
    products: not twelve times as wide as the input, which is counted in 16 bits) and 16 MiB for Python."""
    planned = preview(source, METHOD, include=INCLUDE, samples=WINDOWS, seq_len=SEQ_LEN)
    opened = TensorSource.open(source)
    layer = sum(opened.nbytes(name) for name in opened.names() if name.startswith("model.layers.0."))
    widest = max(m.shape[0] * m.shape[1] for m in planned.modules)
    return planned.device_bytes + planned.host_bytes * (1 + 2 * 12) + 2 * layer + 4 * 4 * widest + 16 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_a_directory_is_never_in_memory(tmp_path: Path) -> None:
    size = sharded(tmp_path / "source", 384, 1024, 20, 16 * MIB)
    allowed = bound(tmp_path / "source")
    assert allowed < 0.75 * size

    def peak(how: str) -> int:
        return measured(WORKS[how], tmp_path / "source", tmp_path / "out", WINDOWS, SEQ_LEN, threads="1")["peak"]

    assert peak("directory") < allowed
    assert peak("in memory") > allowed  # the measuring sees a model


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_two_gigabytes_within_1200_megabytes(tmp_path: Path) -> None:
    """The whole process, torch and transformers included."""
    size = sharded(tmp_path / "source", 1024, 2816, 80, 256 * MIB)
    assert size > 2e9
    found = measured(
        WORKS["directory"], tmp_path / "source", tmp_path / "out", WINDOWS, SEQ_LEN, threads=str(os.cpu_count())
    )
    own, whole = found["peak"] / 1e9, found["process"] / 1e9
    print(f"{size / 1e9:.2f} GB on disk; the process had at most {whole:.3f} GB, {own:.3f} GB of it the run's own")
    assert found["process"] < 1.2e9
