"""`gguf_writer`: a GGUF file (version 3, little endian), or the parts of a split one, all or nothing."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..text import describe
from .atomic import atomic_files
from .files import memory_of, write_error
from .gguf_header import ALIGNMENT, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_LENGTH, MAX_NAME, MetaValue, read_header
from .gguf_types import ARRAY, GGML_TYPES, KINDS, SCALARS, STRING, GgmlType

VERSION: Final = 3
MAX_PARTS: Final = 65535  # split.count is a uint16


class Planned(NamedTuple):
    """A tensor to be written: the name of its type ("Q4_K", "F32"), and its shape as torch has it."""

    name: str
    type: str
    shape: tuple[int, ...]


class _Place(NamedTuple):
    part: int
    offset: int
    type: GgmlType
    shape: tuple[int, ...]


class GgufWriter:
    """Writes tensors, in any order, to the places that the header gives them. Made by `gguf_writer`."""

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        metadata: Mapping[str, MetaValue],
        parts: Sequence[Sequence[Planned]],
    ) -> None:
        alignment = metadata.get(ALIGNMENT, MetaValue("u32", DEFAULT_ALIGNMENT)).value
        self.paths = [directory / name for name in names]
        self._files: list[BinaryIO] = []
        self._places: dict[str, _Place] = {}
        total = sum(map(len, parts))
        for number, (path, tensors) in enumerate(zip(self.paths, parts)):
            keys = dict(metadata) if number == 0 else {}
            if len(parts) > 1:
                keys |= {
                    "split.no": MetaValue("u16", number), "split.count": MetaValue("u16", len(parts)),
                    "split.tensors.count": MetaValue("i32", total),
                }  # fmt: skip
            if number and alignment != DEFAULT_ALIGNMENT:
                keys[ALIGNMENT] = metadata[ALIGNMENT]
            self._begin(path, number, keys, tensors, alignment)

    def add(self, name: str, data: Tensor) -> None:
        """Write a tensor: plain numbers of the planned dtype and shape, or uint8 blocks `[..., bytes of a row]`.

        Raises:
            CheckpointError: it was not planned or was added before, has another dtype or shape than planned, or the disk refuses.
        """
        place = self._places.pop(name, None)
        if place is None:
            raise CheckpointError(f"tensor {name} was not planned, or was added twice")
        dtype, shape = place.type.dtype, list(place.shape)
        if dtype is None:
            shape[-1] = shape[-1] // place.type.elements * place.type.nbytes
        wanted = torch.empty(shape, dtype=dtype or torch.uint8, device="meta")
        if data.dtype != wanted.dtype or data.shape != wanted.shape:
            raise CheckpointError(
                f"tensor {name} must be {describe(wanted)} for {place.type.name}, got {describe(data)}"
            )
        try:
            self._files[place.part].seek(place.offset)
            self._files[place.part].write(memory_of(data.detach().cpu().contiguous()))
        except OSError as error:
            raise write_error(error, self.paths[place.part]) from error

    def close(self) -> None:
        """Finish the files, and read their headers back.

        Raises:
            CheckpointError: a planned tensor is missing, or the disk refuses.
        """
        self.abandon()
        if self._places:
            raise CheckpointError(
                f"{len(self._places)} planned tensors were not added, for example {next(iter(self._places))}"
            )
        for path in self.paths:
            read_header(path)

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files:
            file.close()

    def _begin(
        self, path: Path, number: int, metadata: Mapping[str, MetaValue], tensors: Sequence[Planned], alignment: int
    ) -> None:
        header = bytearray(MAGIC + struct.pack("<Iqq", VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            header += _string(key, "a metadata key") + _encoded(key, value)
        offset = 0
        for tensor in tensors:
            ggml, nbytes = _checked(tensor)
            header += _string(tensor.name, "a tensor's name") + struct.pack(
                f"<I{len(tensor.shape)}qiQ", len(tensor.shape), *reversed(tensor.shape), ggml.id, offset
            )
            if tensor.name in self._places:
                raise CheckpointError(f"tensor {tensor.name} was planned twice")
            self._places[tensor.name] = _Place(number, offset, ggml, tuple(tensor.shape))
            offset = -(-(offset + nbytes) // alignment) * alignment
        start = -(-len(header) // alignment) * alignment
        for tensor in tensors:
            place = self._places[tensor.name]
            self._places[tensor.name] = place._replace(offset=start + place.offset)
        try:
            file = path.open("wb")
            self._files.append(file)
            file.write(header)
            file.truncate(start + offset)  # padding is zeros
        except OSError as error:
            raise write_error(error, path) from error


@contextmanager
def gguf_writer(
    target: str | os.PathLike[str],
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[Planned],
    overwrite: bool = False,
    max_part_bytes: int | None = None,
    sources: Collection[Path] = (),
) -> Iterator[GgufWriter]:
    """Write a GGUF file: yields a writer that takes every planned tensor; `target` appears when all are there, or not at all.

    Args:
        target: the file. Split, its parts are called `<stem>-00001-of-0000N.gguf` beside it.
        metadata: keys in their order, general.architecture among them.
        tensors: in the order of the file.
        overwrite: replace a GGUF file.
        max_part_bytes: a new part begins before its tensors would exceed this; a larger tensor gets a part of its own.
        sources: files that are read meanwhile, which `target` must not be.

    Raises:
        CheckpointError: a value or tensor does not fit the format; a tensor is missing at the end; `target` exists; or the disk
            refuses.
    """
    path = Path(target).expanduser().resolve()
    parts = _parts(tensors, max_part_bytes)
    if len(parts) > MAX_PARTS:
        raise CheckpointError(f"{path} would have {len(parts)} parts, expected at most {MAX_PARTS}; allow larger ones")
    names = [path.name] if len(parts) == 1 else [
        f"{path.name.removesuffix('.gguf')}-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))
    ]  # fmt: skip
    with atomic_files(path.parent, names, MAGIC, overwrite, sources) as temporary:
        writer: GgufWriter | None = None
        try:
            writer = GgufWriter(temporary, names, metadata, parts)
            yield writer
            writer.close()
        finally:
            if writer is not None:
                writer.abandon()


def _parts(tensors: Sequence[Planned], most: int | None) -> list[list[Planned]]:
    parts: list[list[Planned]] = [[]]
    room = most
    for tensor in tensors:
        nbytes = _checked(tensor)[1]
        if room is not None and most is not None:
            if parts[-1] and nbytes > room:
                parts.append([])
                room = most
            room -= nbytes
        parts[-1].append(tensor)
    return parts


def _checked(tensor: Planned) -> tuple[GgmlType, int]:
    """The type of a tensor and its bytes."""
    ggml = GGML_TYPES.get(tensor.type)
    if ggml is None:
        raise CheckpointError(f"tensor {tensor.name} has type {tensor.type!r}, expected one of {', '.join(GGML_TYPES)}")
    if not 0 < len(tensor.name.encode()) <= MAX_NAME or len(tensor.shape) > MAX_DIMS:
        raise CheckpointError(
            f"tensor {tensor.name!r:.80} needs a name of 1 … {MAX_NAME} bytes and at most {MAX_DIMS} dimensions, got "
            f"{len(tensor.name.encode())} and {len(tensor.shape)}"
        )
    row = tensor.shape[-1] if tensor.shape else 1
    if row % ggml.elements:
        raise CheckpointError(
            f"tensor {tensor.name} has rows of {row}, which is no multiple of the blocks of {ggml.elements} that {ggml.name} has"
        )
    return ggml, math.prod(tensor.shape) // ggml.elements * ggml.nbytes


def _string(text: str, what: str) -> bytes:
    data = text.encode()
    if len(data) > MAX_LENGTH:
        raise CheckpointError(f"{what} must have at most {MAX_LENGTH} bytes, got {len(data)}")
    return struct.pack("<Q", len(data)) + data


def _encoded(key: str, value: MetaValue) -> bytes:
    kind, content = value
    element = KINDS.get(kind.removeprefix("[").removesuffix("]"))
    try:
        if kind == "string":
            return struct.pack("<i", STRING) + _string(content, f"the value of {key}")
        if kind == "[string]":
            return struct.pack("<iiQ", ARRAY, STRING, len(content)) + b"".join(_string(text, key) for text in content)
        if element in SCALARS and kind.startswith("["):
            return struct.pack(f"<iiQ{len(content)}{SCALARS[element]}", ARRAY, element, len(content), *content)
        if element in SCALARS:
            return struct.pack(f"<i{SCALARS[element]}", element, content)
    except (struct.error, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{key} does not fit {kind}: {content!r:.40} ({error})") from error
    raise CheckpointError(
        f"{key} has kind {kind!r}, expected one of {', '.join(KINDS)}, or an array of one such as [u32]"
    )
