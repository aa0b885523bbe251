"""The golden GGUF files, and copies of them with other metadata and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qkernels.storage.gguf import GgufSource
from qkernels.storage.gguf_header import MetaValue
from qkernels.storage.gguf_types import GGML_TYPES
from qkernels.storage.gguf_writer import Planned, gguf_writer

FILES = Path(__file__).parent / "golden" / "gguf"
MODELS = sorted(path.stem for path in FILES.glob("*.gguf") if path.stem != "importance")
Change = Mapping[str, MetaValue | None]
Tensors = dict[str, tuple[str, Tensor]]  # name -> type and blocks or numbers


def tensors_of(source: GgufSource) -> Tensors:
    return {
        name: (entry.type.name, source.blocks(name) if entry.type.dtype is None else source.read(name))
        for name, entry in source.entries.items()
    }


def rewritten(
    name: str, path: Path, meta: Change = {}, change: Callable[[Tensors], object] | None = None, **options: Any  # noqa: B006
) -> Path:  # fmt: skip
    """A golden file with other metadata (None: without that key) and tensors."""
    source = GgufSource.open(FILES / f"{name}.gguf")
    tensors = tensors_of(source)
    if change is not None:
        change(tensors)
    metadata = {key: value for key, value in {**source.metadata, **meta}.items() if value is not None}
    with gguf_writer(path, metadata, [planned(*found) for found in tensors.items()], **options) as writer:
        for key, (_, tensor) in tensors.items():
            writer.add(key, tensor)
    return path


def planned(name: str, tensor: tuple[str, Tensor]) -> Planned:
    """A tensor of this type and these blocks or numbers."""
    ggml, data = GGML_TYPES[tensor[0]], tensor[1]
    blocks = data.shape if ggml.dtype is not None else (*data.shape[:-1], data.shape[-1] // ggml.nbytes * ggml.elements)
    return Planned(name, ggml.name, tuple(blocks))


def number(value: int) -> MetaValue:
    return MetaValue("u32", value)
