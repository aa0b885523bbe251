"""Importance files: how much the error of each input column of a weight counts, as llama.cpp's `llama-imatrix` measures it.

A GGUF with `general.type` "imatrix" holds for a weight `name` the tensors `name.in_sum2`, float32 sums of squared inputs, one
row for each expert, and `name.counts`, the number of tokens that each row sums. The older format (`.dat`, little endian) is int32
number of entries; for each int32 length and bytes of a name, int32 number of calls, int32 number of values, and float32 values,
which are the mean squares times the number of calls; then int32 number of chunks, int32 length and bytes of the data set's name.
Facts: tools/imatrix/imatrix.cpp of llama.cpp (MIT). Files are hostile until validated.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ...errors import ArgumentError, CheckpointError
from ...storage.gguf import GgufSource
from ...storage.gguf_header import MAGIC, MetaValue
from ...storage.gguf_writer import Planned, gguf_writer
from ...text import describe

KIND: Final = "imatrix"  # general.type
_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_MOST_BYTES: Final = 2**31  # of a .dat: the largest models have some hundred MB


@dataclass(frozen=True, eq=False)
class InputSquares:
    """Sums of squared inputs of one weight.

    Args:
        sums: float32 `[E, K]`, finite, not negative; E is 1 but for experts. Files of dense tools may have `[1, E * K]`.
        counts: float32 `[E]`: the tokens in each row.

    Raises:
        ArgumentError: other shapes, dtypes or values.
    """

    sums: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        sums, counts = self.sums, self.counts
        if sums.dtype != torch.float32 or sums.dim() != 2 or not sums.numel():
            raise ArgumentError(f"sums must be float32 [E, K], got {describe(sums)}")
        if counts.dtype != torch.float32 or counts.shape != sums.shape[:1]:
            raise ArgumentError(f"counts must be float32 [E] = [{len(sums)}], got {describe(counts)}")
        for name, value in (("sums", sums), ("counts", counts)):
            if not bool((value.isfinite() & (value >= 0)).all()):
                raise ArgumentError(f"{name} must be finite and not negative; measure the importance again")

    def importance(self, *shape: int) -> Tensor:
        """The mean square of each input, as `gguf_blocks` takes it: float32 `[K]` for a weight `[N, K]`, `[E, K]` for one
        `[E, N, K]`. Rows that no token reached count each column alike, as in llama.cpp.

        Raises:
            ArgumentError: the weight is of another size.

        >>> import torch
        >>> from qkernels.formats.gguf import InputSquares
        >>> InputSquares(torch.tensor([[8.0, 2.0]]), torch.tensor([4.0])).importance(16, 2)
        tensor([2.0000, 0.5000])
        """
        *lead, _, columns = (1, *shape) if len(shape) < 2 else shape
        experts = 1
        for size in lead:
            experts *= size
        if len(shape) < 2 or self.sums.numel() != experts * columns or experts % len(self.counts):
            raise ArgumentError(
                f"importance of a weight {list(shape)} must have {experts} x {columns} sums, got {list(self.sums.shape)}; it was "
                "measured on another model"
            )
        counts = self.counts[:, None]
        mean = torch.where(counts > 0, self.sums / counts.clamp(min=1e-30), 1.0)
        return mean.reshape(*lead, columns)


@dataclass(frozen=True, eq=False)
class ImportanceFile:
    """What an importance file holds.

    Args:
        entries: by the name of the weight in the model's own file ("blk.0.attn_q.weight").
        datasets: what it was measured on, as the file says.
        chunk_count, chunk_size: how many chunks of how many tokens; 0 where the file does not say.
    """

    entries: Mapping[str, InputSquares]
    datasets: Sequence[str] = ()
    chunk_count: int = 0
    chunk_size: int = 0


def read_importance(path: str | os.PathLike[str]) -> ImportanceFile:
    """An importance file of llama.cpp, in either format.

    Raises:
        CheckpointError: there is no such file, it is none, or it is damaged: a sum without counts or the other way round, another
            dtype, sizes that do not fit, numbers that are negative or not finite.
    """
    file = Path(path).expanduser()
    try:
        with file.open("rb") as stream:
            begins = stream.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    return _read_gguf(file) if begins == MAGIC else _read_dat(file)


def write_importance(path: str | os.PathLike[str], content: ImportanceFile, overwrite: bool = False) -> None:
    """Write a GGUF that `llama-quantize --imatrix` and `read_importance` read.

    Raises:
        ArgumentError: there is no entry.
        CheckpointError: a name is too long for the format, `path` exists, or the disk refuses.
    """
    if not content.entries:
        raise ArgumentError("an importance file must have an entry, got none; calibrate on more text")
    metadata = {
        "general.type": MetaValue("string", KIND),
        "imatrix.datasets": MetaValue("[string]", list(content.datasets)),
        "imatrix.chunk_count": MetaValue("u32", content.chunk_count),
        "imatrix.chunk_size": MetaValue("u32", content.chunk_size),
    }
    data: dict[str, Tensor] = {}
    for name in sorted(content.entries):
        entry = content.entries[name]
        data[name + _SUMS], data[name + _COUNTS] = entry.sums, entry.counts[:, None]
    planned = [Planned(name, "F32", tuple(value.shape)) for name, value in data.items()]
    with gguf_writer(path, metadata, planned, overwrite) as writer:
        for name, value in data.items():
            writer.add(name, value)


def _read_gguf(path: Path) -> ImportanceFile:
    source = GgufSource.open(path)
    kind = source.metadata.get("general.type")
    if kind is not None and kind.value != KIND:
        raise CheckpointError(f"{path} is a GGUF of general.type {kind.value!r:.40}, expected {KIND!r}")
    names = [
        {name.removesuffix(suffix) for name in source.entries if name.endswith(suffix)} for suffix in (_SUMS, _COUNTS)
    ]
    if not names[0] | names[1]:
        raise CheckpointError(f"{path} has no tensor that ends in {_SUMS}: it holds no importance")
    if alone := sorted(names[0] ^ names[1]):
        has, lacks = (_SUMS, _COUNTS) if alone[0] in names[0] else (_COUNTS, _SUMS)
        raise CheckpointError(f"{path} has {alone[0]}{has} and no {alone[0]}{lacks}; it is damaged")
    entries = {}
    for name in (n.removesuffix(_SUMS) for n in source.entries if n.endswith(_SUMS)):
        sums, counts = _plain(source, name + _SUMS), _plain(source, name + _COUNTS)
        if not counts.numel() or sums.numel() % counts.numel():
            raise CheckpointError(
                f"{path}: {name} has {sums.numel()} sums and {counts.numel()} counts, which do not fit each other"
            )
        entries[name] = _entry(path, name, sums.reshape(counts.numel(), -1), counts.flatten())
    datasets = source.metadata.get("imatrix.datasets", MetaValue("[string]", []))
    if datasets.kind != "[string]":
        raise CheckpointError(f"{path}: imatrix.datasets must be an array of strings, got {datasets.kind}")
    count, size = (_unsigned(source, f"imatrix.chunk_{what}") for what in ("count", "size"))
    return ImportanceFile(entries, tuple(datasets.value), count, size)


def _plain(source: GgufSource, name: str) -> Tensor:
    if source.entry(name).type.name != "F32":
        raise CheckpointError(f"{source.path}: {name} must be F32, got {source.entry(name).type.name}")
    return source.read(name)


def _unsigned(source: GgufSource, key: str) -> int:
    value = source.metadata[key].value if key in source.metadata else 0
    if type(value) is not int or not 0 <= value < 2**32:
        raise CheckpointError(f"{source.path}: {key} must be an integer of 32 bits, got {value!r:.40}")
    return value


def _entry(path: Path, name: str, sums: Tensor, counts: Tensor) -> InputSquares:
    try:
        return InputSquares(sums, counts)
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from None


def _read_dat(path: Path) -> ImportanceFile:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; an importance file has at most {_MOST_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    at = 0

    def take(count: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise CheckpointError(
                f"{path} is no importance file (GGUF or .dat of llama-imatrix), or it is cut short: {what} of {count} bytes at "
                f"byte {at} of {len(data)}"
            )
        at += count
        return data[at - count : at]

    def number(what: str) -> int:
        (value,) = struct.unpack("<i", take(4, what))
        return int(value)

    def string(what: str) -> str:
        try:
            return take(number(f"the length of {what}"), what).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{path}: {what} is not UTF-8; it is no importance file, or damaged") from None

    entries: dict[str, InputSquares] = {}
    count = number("the number of entries")
    if not 0 < count <= len(data) // 16:
        raise CheckpointError(f"{path} announces {count} entries in {len(data)} bytes; it is no importance file")
    for index in range(count):
        name = string(f"the name of entry {index}")
        calls, values = number(f"the calls of {name:.80}"), number(f"the size of {name:.80}")
        if not name or name in entries or values < 1:
            raise CheckpointError(f"{path}: entry {index} is {name!r:.80} with {values} values; it is damaged")
        numbers = torch.frombuffer(bytearray(take(4 * values, f"the values of {name:.80}")), dtype=torch.float32)
        entries[name] = _entry(path, name, numbers[None], torch.tensor([float(max(calls, 1))]))
    if at == len(data):  # of before the file named its data set
        return ImportanceFile(entries)
    chunks = number("the number of chunks")
    named = (string("the name of the data set"),) if at < len(data) else ()
    if at != len(data) or chunks < 0:
        raise CheckpointError(f"{path} goes on for {len(data) - at} bytes after its end, or has {chunks} chunks")
    return ImportanceFile(entries, named, chunks)
