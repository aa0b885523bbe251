"""GGUF files for tests, written here byte by byte from the description of the format: nothing of the package writes them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file says it: `sizes` the fastest first; `offset` None where those before it end."""

    name: str | bytes
    sizes: Sequence[int]
    type: int
    data: bytes
    offset: int | None = None

    def named(self, name: str) -> Tensor:
        return replace(self, name=name)


@dataclass(frozen=True)
class Gguf:
    """A file to be spoiled: keys are (name, type, value), values of type 9 (element type, list)."""

    keys: Sequence[tuple[Any, int, Any]] = (("general.architecture", 8, "llama"),)
    tensors: Sequence[Tensor] = ()
    version: int = 3
    order: str = "<"
    magic: bytes = b"GGUF"
    alignment: int = 32
    counts: tuple[int | None, int | None] = (None, None)
    trailing: bytes = b""
    before: bytes = b""
    header_only: bool = field(default=False)

    def bytes(self) -> bytes:
        n_tensors, n_keys = (len(x) if n is None else n for n, x in zip(self.counts, (self.tensors, self.keys)))
        out = self.magic + struct.pack(f"{self.order}Iqq", self.version, n_tensors, n_keys)
        for key, kind, value in self.keys:
            out += self.string(key) + struct.pack(f"{self.order}i", kind) + self.value(kind, value)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            out += self.string(tensor.name) + struct.pack(f"{self.order}I", len(tensor.sizes))
            out += struct.pack(f"{self.order}{len(tensor.sizes)}qiQ", *tensor.sizes, tensor.type, offset)
            data += self.padded(tensor.data)
        return self.before + (out if self.header_only else self.padded(out) + data + self.trailing)

    def padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)

    def string(self, text: str | bytes) -> bytes:
        data = text.encode() if isinstance(text, str) else text
        return struct.pack(f"{self.order}Q", len(data)) + data

    def value(self, kind: int, value: Any) -> bytes:
        if isinstance(value, bytes):  # as it is to be
            return value
        if kind == 8:
            return self.string(value)
        if kind == 9:
            element, values = value
            head = struct.pack(f"{self.order}iQ", element, len(values))
            return head + b"".join(self.value(element, v) for v in values)
        return struct.pack(f"{self.order}{LETTERS[kind]}", value)

    def changed(self, **fields: Any) -> Gguf:
        return replace(self, **fields)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path
