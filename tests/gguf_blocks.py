"""What golden GGUF data is made of: blocks of every type that anybody can make again, and a vocabulary that shows where text is
split."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from qkernels.storage.gguf import GgufSource
from qkernels.storage.gguf_header import MetaValue
from qkernels.storage.gguf_types import GGML_TYPES

RANDOM_BLOCKS = 512


def of_type(name: str) -> Tensor:
    """As `tests/golden/gguf/make_blocks.py`: random bytes, and each byte alone."""
    size = GGML_TYPES[name].nbytes
    random = torch.frombuffer(
        bytearray(hashlib.shake_256(name.encode()).digest(RANDOM_BLOCKS * size)), dtype=torch.uint8
    )
    return torch.cat([random.view(-1, size), torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, size)])


def bits_of(values: Tensor) -> Tensor:
    """int32: the bits of float32 numbers; every NaN alike."""
    return torch.where(torch.isnan(values), 0x7FC00000, values.view(torch.int32)).to(torch.int32)


# Merges over places where some vocabularies split a text and others do not.
ACROSS = (
    "12 3", "123 4", "n '", "n 't", "r '", "' s", "r' s", "Ċ Ċ", "Ġ Ġ", "Ċ Ġ", "- -", "P S", "T T", "TT P", "_ 1",
    "x _", "! Ġ", ", Ġ",
)  # fmt: skip


def split_as(pre: str, source: GgufSource) -> dict[str, MetaValue]:
    """The metadata of a byte-level file with another way to split text, and with tokens that lie across such places."""
    tokens, merges = list(source.get("tokenizer.ggml.tokens")), list(source.get("tokenizer.ggml.merges"))
    count = len(ACROSS)
    return {
        **source.metadata,
        "tokenizer.ggml.pre": MetaValue("string", pre),
        "tokenizer.ggml.tokens": MetaValue("[string]", tokens[:-count] + [pair.replace(" ", "") for pair in ACROSS]),
        "tokenizer.ggml.merges": MetaValue("[string]", merges[:-count] + list(ACROSS)),
    }
