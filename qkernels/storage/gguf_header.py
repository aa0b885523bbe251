"""The header of one GGUF file, every rule of the format checked; `storage/gguf.py` has its layout."""

from __future__ import annotations

import math
import mmap
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from ..errors import CheckpointError
from .files import MAX_HEADER_BYTES
from .gguf_types import ARRAY, BY_ID, KIND_NAMES, REMOVED, SCALARS, STRING, GgmlType

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = "general.alignment"
DEFAULT_ALIGNMENT: Final = 32
MAX_NAME: Final = 63  # bytes
MAX_DIMS: Final = 4
MAX_LENGTH: Final = 2**30  # of a string or an array, in llama.cpp too
# The largest vocabularies have 262,144 tokens and as many merges. Each string costs 50 bytes and more here, however short.
MAX_STRINGS: Final = 4 * 2**20
_KEY_BYTES: Final = 8 + 1 + 4 + 1  # the least that a key, and that a tensor takes in a header
_TENSOR_BYTES: Final = 8 + 4 + 4 + 8


class MetaValue(NamedTuple):
    """A metadata value. Kinds: "u8", …, "f64", "bool", "string"; "[u32]" is an array (`array.array`; of strings a list)."""

    kind: str
    value: Any


class TensorInfo(NamedTuple):
    """A tensor: shape as torch has it, offset in the file."""

    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What one file says, and what was found to be true."""

    path: Path
    version: int
    byteorder: Literal["little", "big"]
    metadata: dict[str, MetaValue]
    tensors: dict[str, TensorInfo]

    def integer(self, key: str, default: int) -> int:
        """A metadata value that must be an integer if it is there.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.metadata[key].value if key in self.metadata else default
        if type(value) is not int:
            raise CheckpointError(f"{self.path}: {key} must be an integer, got {value!r:.40}")
        return value


class _Cursor:
    """Reads the header in order, and never past the end of the file or of the most that a header may have."""

    def __init__(self, path: Path, data: mmap.mmap, begin: int) -> None:
        self.path, self.data, self.position = path, data, begin
        self.limit = begin + MAX_HEADER_BYTES
        self.order = "<"
        self.strings = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def take(self, count: int, what: str) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise self.fail(
                f"{what} ends at byte {end} of a file of {len(self.data)} bytes; it is truncated or not a GGUF file"
            )
        if end > self.limit:
            raise self.fail(f"the header has more than {MAX_HEADER_BYTES} bytes, which no such file has ({what})")
        found = self.data[self.position : end]
        self.position = end
        return found

    def number(self, letter: str, what: str) -> Any:
        (value,) = struct.unpack(self.order + letter, self.take(struct.calcsize("=" + letter), what))
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > MAX_LENGTH:
            raise self.fail(f"{what} has a length of {length} bytes, expected at most {MAX_LENGTH}")
        self.strings += 1
        if self.strings > MAX_STRINGS:
            raise self.fail(f"the header has more than {MAX_STRINGS} strings, which no such file has ({what})")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason} at its byte {error.start}") from None

    def count(self, what: str, least: int) -> int:
        """A number of things of which each takes at least so many bytes."""
        value: int = self.number("q", f"the number of {what}")
        if not 0 <= value <= (len(self.data) - self.position) // least:
            raise self.fail(
                f"it announces {value} {what}, more than its {len(self.data)} bytes can hold; it is truncated or damaged"
            )
        return value


def read_header(path: Path, begin: int = 0) -> Header:
    """The header of the GGUF that begins at a byte of a file, checked completely.

    Raises:
        CheckpointError: see `GgufSource.open`.
    """
    try:
        size = path.stat().st_size
        if size < begin + 24:
            raise CheckpointError(f"{path} has {size} bytes, too few for a GGUF header at byte {begin}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(_Cursor(path, data, begin), begin)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _header(cursor: _Cursor, begin: int) -> Header:
    if (magic := cursor.take(4, "the magic")) != MAGIC:
        raise cursor.fail(f"a GGUF file begins with {MAGIC!r}, got {magic!r}")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:  # a small number the other way round
        cursor.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in VERSIONS:
        way = "; convert the model again" if version < VERSIONS[0] else "; it is newer than this version of qkernels"
        raise cursor.fail(f"GGUF versions 2 and 3 are read, got {version}{way}")
    tensors = cursor.count("tensors", _TENSOR_BYTES)
    keys = cursor.count("metadata keys", _KEY_BYTES)
    metadata: dict[str, MetaValue] = {}
    for index in range(keys):
        key = cursor.string(f"metadata key {index}")
        if not key or key in metadata:
            raise cursor.fail(f"metadata key {key!r:.80} appears twice" if key else f"metadata key {index} is empty")
        metadata[key] = _value(cursor, key)
    alignment = _alignment(cursor, metadata)
    infos = [_tensor(cursor, index) for index in range(tensors)]
    start = begin + _padded(cursor.position - begin, alignment)
    byteorder: Literal["little", "big"] = "little" if cursor.order == "<" else "big"
    return Header(cursor.path, version, byteorder, metadata, _placed(cursor, infos, start, alignment, begin))


def _value(cursor: _Cursor, key: str) -> MetaValue:
    what = f"the value of {key}"
    kind = cursor.number("i", f"the type of {key}")
    if kind in SCALARS:
        return MetaValue(KIND_NAMES[kind], cursor.number(SCALARS[kind], what))
    if kind == STRING:
        return MetaValue("string", cursor.string(what))
    if kind != ARRAY:
        raise cursor.fail(f"{what} has type {kind}, expected 0 … 12")
    element = cursor.number("i", f"the element type of {key}")
    if element == ARRAY or element not in KIND_NAMES:
        what_is = "arrays, which GGUF does not allow" if element == ARRAY else f"elements of type {element}"
        raise cursor.fail(f"{key} is an array of {what_is}")
    length = cursor.number("Q", f"the length of {key}")
    if length > MAX_LENGTH:
        raise cursor.fail(f"{key} has {length} elements, expected at most {MAX_LENGTH}")
    if element == STRING:
        if length * 8 > len(cursor.data) - cursor.position:
            raise cursor.fail(
                f"{key} announces {length} strings, more than the file can hold; it is truncated or damaged"
            )
        return MetaValue("[string]", [cursor.string(f"element {i} of {key}") for i in range(length)])
    letter = "B" if SCALARS[element] == "?" else SCALARS[element]
    values = array(letter)
    values.frombytes(cursor.take(length * struct.calcsize("=" + letter), what))
    if cursor.order == ">":
        values.byteswap()
    return MetaValue(f"[{KIND_NAMES[element]}]", values)


def _alignment(cursor: _Cursor, metadata: dict[str, MetaValue]) -> int:
    found = metadata.get(ALIGNMENT, MetaValue("u32", DEFAULT_ALIGNMENT))
    kind, alignment = found.kind, found.value
    if kind != "u32" or alignment == 0 or alignment & (alignment - 1):
        raise cursor.fail(f"{ALIGNMENT} must be a u32 that is a power of two, got {kind} {alignment!r:.40}")
    return int(alignment)


def _tensor(cursor: _Cursor, index: int) -> tuple[str, GgmlType, tuple[int, ...], int, int]:
    """(name, type, shape, bytes, offset as the file says) of a tensor."""
    name = cursor.string(f"the name of tensor {index}")
    if not name or len(name.encode()) > MAX_NAME:
        raise cursor.fail(f"the name of tensor {index} must have 1 … {MAX_NAME} bytes, got {name!r:.80}")
    what = f"tensor {name}"
    dims = cursor.number("I", f"the dimensions of {what}")
    if dims > MAX_DIMS:
        raise cursor.fail(f"{what} has {dims} dimensions, expected at most {MAX_DIMS}")
    sizes = [cursor.number("q", f"the shape of {what}") for _ in range(dims)]
    if any(size < 0 for size in sizes) or math.prod(sizes) >= 2**63:
        raise cursor.fail(f"{what} has the shape {sizes[::-1]}, expected sizes of at least 0 with a product below 2^63")
    number, offset = cursor.number("i", f"the type of {what}"), cursor.number("Q", f"the offset of {what}")
    ggml = BY_ID.get(number)
    if ggml is None:
        removed = REMOVED.get(number)
        why = f"{removed}, which is not stored any more; convert the model again" if removed else (
            "which no known version of llama.cpp has; a fork's file needs that fork"
        )  # fmt: skip
        raise cursor.fail(f"{what} has type {number}, {why}")
    row = sizes[0] if sizes else 1
    if row % ggml.elements:
        raise cursor.fail(
            f"{what} is {ggml.name} with rows of {row}, which is no multiple of its blocks of {ggml.elements}"
        )
    nbytes = math.prod(sizes) // ggml.elements * ggml.nbytes
    if nbytes >= 2**63:
        raise cursor.fail(f"{what} would take {nbytes} bytes")
    return name, ggml, tuple(reversed(sizes)), nbytes, offset


def _placed(
    cursor: _Cursor,
    infos: list[tuple[str, GgmlType, tuple[int, ...], int, int]],
    start: int,
    alignment: int,
    begin: int,
) -> dict[str, TensorInfo]:
    """The tensors by name, if each lies where those before it end, and all of them in the file."""
    size = len(cursor.data)
    placed: dict[str, TensorInfo] = {}
    expected, end, before = 0, start, "the header"
    for name, ggml, shape, nbytes, offset in infos:
        if name in placed:
            raise cursor.fail(f"tensor {name} appears twice")
        if offset != expected:
            raise cursor.fail(
                f"tensor {name} begins at byte {offset} of the data, expected {expected}, where {before} ends: the file is "
                "damaged, or made by a fork whose blocks of that type have another size"
            )
        end = start + offset + nbytes
        if end > size:
            raise cursor.fail(
                f"tensor {name} ({ggml.name} {list(shape)}) ends at byte {end} of a file of {size} bytes: it is truncated, or "
                "made by a fork whose blocks of that type have another size"
            )
        placed[name] = TensorInfo(ggml, shape, start + offset, nbytes)
        expected, before = _padded(offset + nbytes, alignment), f"tensor {name} ({ggml.name} {list(shape)})"
    if begin == 0 and size > max(start + expected, end):
        raise cursor.fail(
            f"{size - start - expected} bytes follow {before}: the file is damaged, or made by a fork whose blocks of that type "
            "have another size"
        )
    return placed


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
