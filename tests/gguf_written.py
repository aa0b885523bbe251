"""A tiny model that anybody can make again to the bit, as a directory, for GGUF files that are written of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels import QuantLinear
from qkernels.formats.gguf import ImportanceFile, InputSquares
from qkernels.nn import QuantExperts
from qkernels.storage.gguf import GgufSource
from qkernels.texts import load_tokenizer
from tests.gguf_golden import FILES
from tests.gguf_weights import digest
from tests.tiny_models import tiny_model

IDS = torch.arange(24) * 7 % 300
FIELDS = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "vocab_size": 300,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}


def _near_gaussian(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32 of eleven bits: sums of bytes."""
    count = torch.Size(shape).numel()
    raw = torch.frombuffer(bytearray(hashlib.shake_256(name.encode()).digest(8 * count)), dtype=torch.uint8)
    return (raw.view(count, 8).int().sum(-1) - 1020).float().view(shape) * 2.0**-12


def model_directory(directory: Path) -> Path:
    """Weights in float16, which they fit exactly, and the tokenizer of a golden file."""
    model = tiny_model("llama", **FIELDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_near_gaussian(name, tuple(parameter.shape)) + (1.0 if parameter.dim() == 1 else 0.0))
    model.half().save_pretrained(directory)
    load_tokenizer(FILES / "llama.gguf").save_pretrained(directory)
    return directory


def moe_directory(directory: Path, layers: int, seed: int) -> Path:
    """A Qwen3-MoE of four experts, random weights."""
    torch.manual_seed(seed)
    model = tiny_model(
        "qwen3_moe", vocab_size=300, num_hidden_layers=layers, norm_topk_prob=True, num_experts=4, num_experts_per_tok=2
    )
    model.save_pretrained(directory)
    load_tokenizer(FILES / "qwen3.gguf").save_pretrained(directory)
    return directory


def importance_of_model() -> ImportanceFile:
    """Of the matrices in the layers, over four powers of ten."""
    entries = {}
    for i in range(FIELDS["num_hidden_layers"]):
        for piece in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            name = f"blk.{i}.{piece}.weight"
            entries[name] = InputSquares((_near_gaussian(name + "i", (1, 256)) ** 4 * 1e6), torch.tensor([4.0]))
    return ImportanceFile(entries, ("moon",), 2, 64)


def tensors_digest(path: Path) -> str:
    """Of all tensors with their names and types."""
    source = GgufSource.open(path)
    found = "".join(f"{n} {e.type.name} {digest(source.blocks(n))}\n" for n, e in sorted(source.entries.items()))
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def weights_of(model: Any) -> dict[str, Tensor]:
    """Every parameter in float32, packed ones dequantized."""
    found = {name: p.detach().float() for name, p in model.named_parameters() if not name.endswith("_stack.bias")}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[f"{name.removesuffix('.table')}.weight"] = module.dequantize(torch.float32)  # of packed embeddings
        elif isinstance(module, QuantExperts):
            found |= {f"{name}.{key}": value for key, value in module.dequantize(torch.float32).items()}
    return found
