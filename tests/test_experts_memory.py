"""Experts of a directory are quantized within a layer and the activations, however large the model: measured in a process of its
own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import Qwen3MoeConfig

from qkernels import GPTQ, inspect
from qkernels.calibrate import preview
from qkernels.models.building import empty_model
from qkernels.models.experts import PARTS
from qkernels.storage import CONFIG, ShardWriter, write_json
from tests.memory_watch import measured

MIB = 2**20
WINDOWS, SEQ_LEN = 16, 64

METHODS = {"rtn": "RTN(4, 128)", "gptq": "GPTQ(4, 128)"}
WORK = """
calibration = {"calibration": ids, "seq_len": ids.shape[1]} if "%s" == "gptq" else {}
report = quantize(source, %s, save_to=out, include="*experts", progress=False, **calibration)
found = sorted({module.method for module in report.modules})
"""


class Size(NamedTuple):
    hidden: int
    width: int
    experts: int
    layers: int

    @property
    def layer(self) -> int:
        """Weights of the experts of a layer."""
        return 3 * self.hidden * self.width * self.experts


SMALL, LARGE = Size(512, 256, 16, 10), Size(1024, 512, 64, 60)


def sharded(directory: Path, size: Size) -> int:
    """A bf16 Qwen3-MoE of random weights, expert by expert as such files are, written a tensor at a time; returns its bytes."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=size.hidden, intermediate_size=size.width, moe_intermediate_size=size.width,
        num_experts=size.experts, num_experts_per_tok=4, num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=SEQ_LEN, architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16", norm_topk_prob=True,
    )  # fmt: skip
    directory.mkdir()
    settings = json.loads(config.to_json_string())
    write_json(directory / CONFIG, settings)
    writer = ShardWriter(directory, size.layer)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * size.hidden * size.hidden, generator=generator)

    def random(rows: int, columns: int) -> torch.Tensor:
        start = int(torch.randint(len(noise) - rows * columns, (1,), generator=generator))
        return (noise[start : start + rows * columns].view(rows, columns) * columns**-0.5).bfloat16()

    for name, parameter in empty_model(settings, torch.bfloat16, directory).named_parameters():
        if ".experts." not in name:
            one_dimensional = parameter.dim() == 1
            writer.add(name, torch.ones(parameter.shape).bfloat16() if one_dimensional else random(*parameter.shape))
            continue
        experts, _, projection = name.rpartition(".")
        parts = PARTS[projection]
        for expert in range(size.experts):
            for leaf, *_ in parts:
                rows = parameter.shape[1] // len(parts)
                writer.add(f"{experts}.{expert}.{leaf}.weight", random(rows, parameter.shape[2]))
    writer.close()
    return writer.total_bytes


def bound(source: Path, size: Size) -> int:
    """What the preview says (the layer in fp32, second moments, what goes into experts, codes) and what is small beside it: the
    layer in 16 bits while it is read and stacked, one projection twice; a block's activations in fp32 (not 16 times as wide as
    its input, which is counted in 16 bits); 32 MiB for Python."""
    planned = preview(source, GPTQ(4, 128), include="*experts", samples=WINDOWS, seq_len=SEQ_LEN)
    read = 2 * size.layer + 2 * 2 * size.layer * 2 // 3
    return planned.device_bytes + planned.host_bytes * (1 + 2 * 16) + read + 32 * MIB


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["84 MB", "12 GB"])
def test_experts_of_a_directory_take_a_layer_and_the_activations(size: Size, how: str, tmp_path: Path) -> None:
    """RTN within 3 GB, the whole process, torch and transformers included."""
    source, out = tmp_path / "source", tmp_path / "out"
    on_disk = sharded(source, size)
    assert on_disk > 2 * size.layer * size.layers
    allowed = bound(source, size) if how == "gptq" else 3e9
    print(f"{how}: {on_disk / 1e9:.2f} GB on disk, own memory at most {allowed / 1e9:.3f} GB", flush=True)
    found = measured(WORK % (how, METHODS[how]), source, out, WINDOWS, SEQ_LEN)
    print(f"process {found['process'] / 1e9:.3f} GB, own {found['peak'] / 1e9:.3f} GB", flush=True)
    assert found["process"] < 3e9
    assert found["peak"] < allowed
    assert found["found"] == [how]
    if size is SMALL:
        assert allowed < 2.5 * on_disk or how == "rtn"
        assert {layer.experts for layer in inspect(out).layers} == {16}
