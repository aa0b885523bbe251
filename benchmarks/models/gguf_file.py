"""Writes a GGUF file (version 3, ggml's docs/gguf.md) of the decoder in `llama.py`, so that llama.cpp runs the same model.

Quantized layers become Q4_0 with the very same codes and scales; norms are fp32, the embedding table is fp16. llama.cpp rotates
neighbouring pairs of q and k where `llama.py` rotates halves, so rows of q and k are put in that order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from qkernels.errors import ConversionError
from qkernels.nn import QuantLinear
from qkernels.tensor import QuantTensor

from .llama import RMS_EPSILON, ROPE_BASE, Block, Llama

F32, F16, Q4_0 = 0, 1, 2  # enum ggml_type
ALIGNMENT = 32  # general.alignment's default
_U32, _F32, _STRING = 4, 6, 8  # enum gguf_metadata_value_type


def q4_0_bytes(weight: QuantTensor) -> Tensor:
    """`block_q4_0` of every 32 weights: fp16 scale, then 16 bytes with weights 0…15 in the low and 16…31 in the high nibbles.

    Raises:
        ConversionError: not symmetric 4-bit in groups of 32, or a scale that is no fp16 number.
    """
    scheme, scales = weight.scheme, weight.scales.half()
    exact = torch.equal(scales.float(), weight.scales.float())
    if scheme.bits != 4 or scheme.group_size != 32 or not scheme.symmetric or not exact:
        raise ConversionError(f"Q4_0 needs symmetric 4-bit weights in groups of 32 with fp16 scales, got {scheme}")
    codes = weight.codes.view(weight.N, -1, 2, 16)
    packed = codes[:, :, 0] | codes[:, :, 1] << 4
    return torch.cat([scales[..., None].view(torch.uint8), packed], -1)


def paired(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k, half by half in each head, in the order of neighbouring pairs."""
    halves = rows.view(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def tensors(model: Llama) -> Iterator[tuple[str, int, tuple[int, int], Tensor]]:
    """(name, type, (N, K), data) in the names of llama.cpp's "llama" architecture; a vector is (1, K)."""
    g = model.g
    yield "token_embd.weight", F16, (g.vocabulary, g.hidden), model.table.half()
    yield "output_norm.weight", F32, (1, g.hidden), model.norm.float()
    yield "output.weight", Q4_0, (g.vocabulary, g.hidden), _rows(model.head)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        q, k, v = _rows(block.qkv).split([heads * g.head_dim for heads in (g.heads, g.kv_heads, g.kv_heads)])
        gate, up = _rows(block.gate_up).chunk(2)
        layers = {
            "attn_q": (paired(q, g.heads), g.hidden),
            "attn_k": (paired(k, g.kv_heads), g.hidden),
            "attn_v": (v, g.hidden),
            "attn_output": (_rows(block.o), g.heads * g.head_dim),
            "ffn_gate": (gate, g.hidden),
            "ffn_up": (up, g.hidden),
            "ffn_down": (_rows(block.down), g.intermediate),
        }
        yield f"blk.{i}.attn_norm.weight", F32, (1, g.hidden), block.norm1.float()
        yield f"blk.{i}.ffn_norm.weight", F32, (1, g.hidden), block.norm2.float()
        for name, (rows, K) in layers.items():
            yield f"blk.{i}.{name}.weight", Q4_0, (rows.shape[0], K), rows


def _rows(layer: nn.Module) -> Tensor:
    assert isinstance(layer, QuantLinear), f"layer must be quantized, got {type(layer).__name__}"
    return q4_0_bytes(layer.quant_tensor())


def write(model: Llama, path: Path) -> None:
    """Write the model with everything that llama.cpp wants to know, without a tokenizer."""
    g = model.g
    sizes = {
        "block_count": g.layers, "context_length": model.positions.numel(), "embedding_length": g.hidden,
        "feed_forward_length": g.intermediate, "attention.head_count": g.heads, "attention.head_count_kv": g.kv_heads,
        "rope.dimension_count": g.head_dim, "vocab_size": g.vocabulary,
    }  # fmt: skip
    facts = [_string("general.architecture") + struct.pack("<I", _STRING) + _string("llama")]
    facts += [_string("tokenizer.ggml.model") + struct.pack("<I", _STRING) + _string("no_vocab")]
    facts += [_string(f"llama.{name}") + struct.pack("<II", _U32, value) for name, value in sizes.items()]
    facts += [
        _string(f"llama.{name}") + struct.pack("<If", _F32, value)
        for name, value in (("rope.freq_base", ROPE_BASE), ("attention.layer_norm_rms_epsilon", RMS_EPSILON))
    ]
    entries, offset, count = [], 0, 0
    for name, kind, (N, K), data in tensors(model):
        shape = (K,) if N == 1 else (K, N)  # fastest first
        entries.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        offset += _padded(data.numel() * data.element_size())
        count += 1
    header = struct.pack("<4sIQQ", b"GGUF", 3, count, len(facts)) + b"".join(facts) + b"".join(entries)
    with path.open("wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for _, _, _, data in tensors(model):
            raw = data.contiguous().view(torch.uint8).numpy().tobytes()
            file.write(raw.ljust(_padded(len(raw)), b"\0"))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
