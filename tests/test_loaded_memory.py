"""A quantized model takes, while it loads, little more memory than its files: measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from qkernels.checkpoint import to_gguf
from qkernels.models.building import empty_model
from qkernels.storage import CONFIG, ShardWriter, copy_side_files, write_json

MIB = 2**20

# All imports, and a first matrix product, come before the first measurement.
CHILD = """
import json, sys, threading, torch, transformers
from transformers import LlamaForCausalLM
from qkernels import load

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.005):
        peaks.append(anonymous())

torch.eye(64) @ torch.eye(64)
done, base = threading.Event(), anonymous()
peaks = [base]
watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[1], dtype="bfloat16")
done.set()
watcher.join()
schemes = sorted({str(m.scheme) for m in model.modules() if hasattr(m, "scheme")})
print(json.dumps({"peak": max(peaks) - base, "loaded": anonymous() - base, "samples": len(peaks), "schemes": schemes}))
"""

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
NVFP4: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "version": "0.20.0", "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
            },
        }
    },
}  # fmt: skip


def tensors_of(kind: str, N: int, K: int, noise: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of one module, by suffix. Codes are any bytes that are numbers."""
    if kind == "fp8":
        yield "weight", (noise[: N * K] & 0x77).reshape(N, K).view(torch.float8_e4m3fn)
        yield "weight_scale_inv", torch.full((-(-N // 128), -(-K // 128)), 0.01)
        return
    yield "weight_packed", noise[: N * K // 2].reshape(N, K // 2)
    yield "weight_scale", (noise[: N * K // 16] & 0x37).reshape(N, K // 16).view(torch.float8_e4m3fn)
    yield "weight_global_scale", torch.full((1,), 100.0)


def written(directory: Path, kind: str, layers: int, vocabulary: int) -> int:
    """A Llama of the widths of one with 8B weights, a tensor at a time; returns its bytes."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    directory.mkdir()
    settings = json.loads(config.to_json_string())
    write_json(directory / CONFIG, settings | {"quantization_config": FP8 if kind == "fp8" else NVFP4})
    writer = ShardWriter(directory, 2 * 10**9)
    noise = torch.randint(256, (14336 * 4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = empty_model(settings, torch.bfloat16, directory)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            for suffix, tensor in tensors_of(kind, module.out_features, module.in_features, noise):
                writer.add(f"{name}.{suffix}", tensor)
        elif isinstance(module, nn.Embedding | nn.Linear) or "norm" in name:
            writer.add(f"{name}.weight", torch.ones(module.weight.shape, dtype=torch.bfloat16))
    writer.close()
    return writer.total_bytes


def measured(directory: Path) -> dict[str, Any]:
    # With a fixed threshold every tensor is a mapping of its own that goes back when it is freed: what is counted is what lives.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize(("kind", "scheme"), [("fp8", "fp8_block128"), ("nvfp4", "nvfp4_g16")])
def test_8b_weights_load_in_the_size_of_their_files(kind: str, scheme: str, tmp_path: Path) -> None:
    """Within 10 % and 300 MiB, at the peak: one module at a time is unpacked, and blocks' scales become those of rows."""
    on_disk = written(tmp_path / kind, kind, 32, 128256)
    assert on_disk > 4e9
    found = measured(tmp_path / kind)
    print(
        f"{kind}: {on_disk / 1e9:.2f} GB on disk, peak {found['peak'] / 1e9:.3f} GB, loaded {found['loaded'] / 1e9:.3f} GB"
    )
    assert found["schemes"] == [scheme]
    assert found["samples"] > 100
    assert found["peak"] <= 1.1 * on_disk + 300 * MIB


@pytest.mark.large
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_stays_in_memory_as_it_is(tied: bool, tmp_path: Path) -> None:
    """Embedding and head packed, one memory where they are tied: within 15 % of the file, where floats would double it."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=4096, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    source, path = tmp_path / "source", tmp_path / "m.gguf"
    source.mkdir()
    copy_side_files(Path(__file__).parent.parent / "examples" / "demo_model", source)
    settings = json.loads(config.to_json_string())
    write_json(source / CONFIG, settings)
    writer = ShardWriter(source)
    for name, parameter in empty_model(settings, torch.bfloat16, source).named_parameters():
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02
        writer.add(name, (values if parameter.dim() == 2 else values + 1).bfloat16())
    writer.close()
    to_gguf(source, path, "Q4_K_M")
    found = measured(path)
    print(f"tied {tied}: {path.stat().st_size / 1e6:.0f} MB, {found}")
    assert found["loaded"] <= 1.15 * path.stat().st_size
    assert found["peak"] <= 1.15 * path.stat().st_size
    assert {"q4_k", "q6_k"} <= set(found["schemes"])
