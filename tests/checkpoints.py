"""Small models and checkpoint directories, and ways to spoil them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qkernels import inspect
from qkernels.checkpoint import packed
from qkernels.checkpoint.registry import WRITTEN
from qkernels.errors import CheckpointError
from qkernels.formats import Format
from qkernels.layouts import LAYOUTS
from qkernels.storage import ShardWriter, TensorSource, read_json, write_json

# Formats that hold weights with 16-bit activations, as the models here are: a layout for int8 activations holds no others.
A16_FORMATS: dict[str, Format] = {
    name: fmt for name, fmt in WRITTEN.items() if name not in LAYOUTS or None in LAYOUTS[name].acts
}
IDS = torch.arange(12)[None] * 7 % 64


def small_llama(**fields: Any) -> LlamaForCausalLM:
    """Two layers, 64 wide, float32, reproducible."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**(sizes | heads | fields))).eval()
    return model


def plain_checkpoint(directory: Path, **fields: Any) -> Path:
    """A float checkpoint as transformers writes it, with something of a tokenizer beside it."""
    small_llama(**fields).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def train_adapters(model: Any, moving: Sequence[Tensor]) -> None:
    """Ten steps of what requires gradients, which reach all of `moving`, and the loss falls."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in moving)
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint whose tensors were changed; the file itself stays sound."""
    shutil.copytree(source, target)
    opened = TensorSource.open(source)
    tensors = {name: opened.read(name) for name in opened.entries}
    change(tensors)
    for path in target.glob("*.safetensors*"):
        path.unlink()
    writer = ShardWriter(target)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return target


def shapes_taken_apart(monkeypatch: Any) -> list[tuple[int, int]]:
    """`[N, K]` of every packed weight that is unpacked from now on, instead of being read as it lies."""
    taken_apart: list[tuple[int, int]] = []
    plain = packed.unpack_checked

    def counted(layout: Any, buffers: Any, N: int, K: int, *rest: Any) -> Any:
        taken_apart.append((N, K))
        return plain(layout, buffers, N, K, *rest)

    monkeypatch.setattr(packed, "unpack_checked", counted)
    return taken_apart


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = read_json(path)
    change(values)
    write_json(path, values)


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Those that a user sees."""
    return {path.name: path.read_bytes() for path in directory.glob("[!.]*")}


def sound_or_refused(directory: Path) -> bool:
    """Whether `inspect` takes the checkpoint. A refusal is a `CheckpointError`; anything else that it raises goes on."""
    try:
        found = inspect(directory)
    except CheckpointError:
        return False
    found.to_json()
    found.to_markdown()
    return True


def with_random_bytes(whole: bytes, begin: int, draw: random.Random) -> bytes:
    """A file with eight bytes behind `begin` overwritten, where and with what is drawn."""
    changed = bytearray(whole)
    for _ in range(8):
        changed[draw.randrange(begin, len(whole))] = draw.randrange(256)
    return bytes(changed)
