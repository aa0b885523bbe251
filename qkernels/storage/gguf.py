"""`GgufSource`: the tensors and metadata of a GGUF file, or of all parts of a split one, validated first and mapped into memory.

Layout (versions 2 and 3): "GGUF", uint32 version, int64 numbers of tensors and of metadata keys; for each key a string, an int32
type and a value; for each tensor a string, uint32 number of dimensions, int64 sizes (the fastest first), int32 type and uint64
offset; then, from the next multiple of the alignment on, the tensors in that order, each padded to the alignment. Strings are
uint64 lengths and bytes. The header is checked completely before anything is allocated for a tensor.
"""

from __future__ import annotations

import mmap
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import no_such_tensor
from .gguf_header import Header, MetaValue, TensorInfo, read_header
from .gguf_types import GgmlType

SUFFIX: Final = ".gguf"
_PART: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Files of these names lie beside a model's, and are none: image and sound encoders, importance matrices.
_BESIDE: Final = re.compile(r"(^|[-_.])(mmproj|imatrix)([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class GgufEntry:
    """Where a tensor lies: bytes `offset … offset + nbytes` of the file `path`.

    Args:
        type: of its blocks, which run along the last dimension of `shape`.
        shape: as torch has it, in_features last.
    """

    path: Path
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufSource:
    """The tensors of a GGUF model. Make it with `GgufSource.open`.

    Args:
        path: the file that was opened; of a split model the first part.
        files: all parts.
        metadata: of the (first) file: (kind, value) by key.
        entries: the tensors in the order of the file.
    """

    path: Path
    files: tuple[Path, ...]
    byteorder: Literal["little", "big"]
    metadata: Mapping[str, MetaValue]
    entries: Mapping[str, GgufEntry]
    _mapped: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], offset: int = 0) -> GgufSource:
        """Read the header of a file, or of every part of a split one of which `path` is any, and check it against the file.

        Args:
            offset: where the GGUF begins, for one that is part of another file; it may end before that file does.

        Raises:
            CheckpointError: there is no such file; it is no GGUF of version 2 or 3; it is truncated; a count, length, type or
                size is out of range; names repeat; tensors do not follow each other as their types and the alignment say; or
                parts of a split file are missing or do not fit each other.
        """
        first = Path(path)
        if not first.is_file():
            raise CheckpointError(f"there is no file {first}")
        header = read_header(first, offset)
        count = header.integer("split.count", 0)
        named = _PART.fullmatch(first.name)
        if count <= 1:
            if named is not None and int(named["count"]) > 1 and "split.count" not in header.metadata:
                raise CheckpointError(
                    f"{first} is called a part of {int(named['count'])}, but has no split.count: it was not split by llama.cpp's "
                    "tools; bring it to one file, or rename it if it is one"
                )
            return cls(first, (first,), header.byteorder, header.metadata, _entries(first, header.tensors))
        if offset:
            raise CheckpointError(f"{first}: a GGUF inside another file cannot be part {count} files")
        return cls._open_parts(first, count, header)

    @classmethod
    def _open_parts(cls, opened: Path, count: int, header: Header) -> GgufSource:
        named = _PART.fullmatch(opened.name)
        if named is None or int(named["count"]) != count:
            raise CheckpointError(
                f"{opened} is part {header.integer('split.no', 0) + 1} of {count}, but its name does not say so: the parts are "
                f"called …-00001-of-{count:05d}.gguf; give them those names"
            )
        files = [opened.with_name(f"{named['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{opened} is one of {count} parts, {len(missing)} of which are missing: {missing[0]}"
            )
        entries: dict[str, GgufEntry] = {}
        headers = [header if path == opened else read_header(path, 0) for path in files]
        for i, (path, part) in enumerate(zip(files, headers)):
            number, among = part.integer("split.no", -1), part.integer("split.count", 0)
            if (number, among) != (i, count) or part.byteorder != header.byteorder:
                raise CheckpointError(
                    f"{path} says that it is part {number + 1} of {among}, {part.byteorder}-endian, expected part {i + 1} of "
                    f"{count}, {header.byteorder}-endian"
                )
            for name, entry in _entries(path, part.tensors).items():
                if name in entries:
                    raise CheckpointError(f"tensor {name} is in two parts, {entries[name].path.name} and {path.name}")
                entries[name] = entry
        announced = headers[0].integer("split.tensors.count", len(entries))
        if announced != len(entries):
            raise CheckpointError(f"{files[0]} announces {announced} tensors, the {count} parts have {len(entries)}")
        return cls(files[0], tuple(files), header.byteorder, headers[0].metadata, entries)

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; `default` where the file has no such key."""
        found = self.metadata.get(key)
        return default if found is None else found.value

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> GgufEntry:
        """Where the tensor is.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self.entries:
            raise no_such_tensor(self.path, name, self.entries)
        return self.entries[name]

    def blocks(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8 `[..., bytes of a row]`, mapped: not to be written to, and gone if the file is cut short
        under it. Numbers of several bytes in them are little-endian: those of a big-endian file are swapped, in memory of
        their own.

        Raises:
            CheckpointError: there is no such tensor; the file changed since it was opened; or the type has no big-endian form.
        """
        entry = self.entry(name)
        row = entry.shape[-1] // entry.type.elements * entry.type.nbytes if entry.shape else entry.nbytes
        shape = (*entry.shape[:-1], row)
        if entry.nbytes == 0:
            return torch.empty(shape, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # as said above
            found = torch.frombuffer(self._map(entry), dtype=torch.uint8, offset=entry.offset, count=entry.nbytes)
        return self._little(found.view(shape), entry, name)

    def read(self, name: str) -> Tensor:
        """A tensor of plain numbers, in memory of its own, with its dtype and shape.

        Raises:
            CheckpointError: as `blocks`; or it has blocks of quantized weights, which `formats.gguf` decodes.
        """
        entry = self.entry(name)
        if entry.type.dtype is None:
            raise CheckpointError(f"tensor {name} of {self.path} is {entry.type.name}, not plain numbers")
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.type.dtype)
        return self.blocks(name).flatten().clone().view(entry.type.dtype).view(entry.shape)

    def _map(self, entry: GgufEntry) -> mmap.mmap:
        try:
            if entry.path not in self._mapped:
                with entry.path.open("rb") as file:
                    self._mapped[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            size = entry.path.stat().st_size
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {entry.path}: {error}") from error
        if min(size, len(self._mapped[entry.path])) < entry.offset + entry.nbytes:
            raise CheckpointError(f"{entry.path} is shorter than when it was opened: {size} bytes")
        return self._mapped[entry.path]

    def _little(self, blocks: Tensor, entry: GgufEntry, name: str) -> Tensor:
        if self.byteorder == "little" or entry.type.swaps == ():
            return blocks
        if entry.type.swaps is None:
            raise CheckpointError(
                f"tensor {name} of {self.path} is {entry.type.name} in a big-endian file, which is not defined for that type; "
                "convert the file to little endian where it was made"
            )
        swapped = blocks.clone()
        fields = swapped.view(*swapped.shape[:-1], -1, entry.type.nbytes)
        for offset, width in entry.type.swaps:
            fields[..., offset : offset + width] = fields[..., offset : offset + width].flip(-1)
        return swapped


def gguf_at(path: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a path means: itself, or the only one (the first part of the only one) in a folder without safetensors.
    None where it means none.

    Raises:
        CheckpointError: the folder holds several.
    """
    given = Path(path).expanduser()
    if not given.is_dir():
        return given if given.is_file() and (given.suffix == SUFFIX or _begins_as_gguf(given)) else None
    found = sorted(p for p in given.iterdir() if p.suffix == SUFFIX and p.is_file() and not _BESIDE.search(p.stem))
    if not found or any(p.suffix == ".safetensors" for p in given.iterdir()):
        return None
    parts = {p: _PART.fullmatch(p.name) for p in found}
    models = {(m["stem"], m["count"]) if m is not None else p.name: p for p, m in reversed(parts.items())}
    if len(models) > 1:
        listed = ", ".join(p.name for p in list(models.values())[::-1][:4])
        raise CheckpointError(
            f"{given} holds {len(models)} GGUF models ({listed}{', …' * (len(models) > 4)}); name one of them"
        )
    return next(iter(models.values()))


def _begins_as_gguf(path: Path) -> bool:
    """Whether a file of another name is a GGUF all the same, as those in Ollama's store are."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _entries(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, GgufEntry]:
    return {name: GgufEntry(path, info.type, info.shape, info.offset, info.nbytes) for name, info in tensors.items()}
