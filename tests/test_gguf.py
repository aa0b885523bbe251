"""The container: files written byte by byte are read, and every rule of the format is a check."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels.errors import CheckpointError
from qkernels.storage.gguf import GgufSource, gguf_at
from qkernels.storage.gguf_header import MAX_HEADER_BYTES, MetaValue
from qkernels.storage.gguf_types import GGML_TYPES, REMOVED
from tests.gguf_files import Gguf, Tensor

F32, F16, Q4_0, I32 = 0, 1, 2, 26
NUMBERS = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
BLOCKS = bytes(range(36))
KEYS: list[tuple[Any, int, Any]] = [
    ("general.architecture", 8, "llama"),
    ("a.u8", 0, 255),
    ("a.i8", 1, -1),
    ("a.u16", 2, 65535),
    ("a.i16", 3, -2),
    ("a.u32", 4, 7),
    ("a.i32", 5, -7),
    ("a.f32", 6, 0.5),
    ("a.bool", 7, True),
    ("a.text", 8, "groß"),
    ("a.empty", 8, ""),
    ("a.numbers", 9, (5, [1, -2])),
    ("a.texts", 9, (8, ["x", "▁y"])),
    ("a.flags", 9, (7, [True, False])),
    ("a.u64", 10, 2**63),
    ("a.i64", 11, -(2**62)),
    ("a.f64", 12, 1e300),
]
SOUND = Gguf(
    KEYS, [Tensor("w", (3, 2), F32, NUMBERS), Tensor("q", (32, 1, 2), Q4_0, BLOCKS), Tensor("none", (0, 4), F32, b"")]
)


def opened(file: Gguf, path: Path) -> GgufSource:
    return GgufSource.open(file.write(path / "m.gguf"), len(file.before))


@pytest.mark.parametrize(
    "file", [SOUND, SOUND.changed(version=2), SOUND.changed(before=bytes(77)), SOUND.changed(before=b"x" * 64, trailing=b"zip")]
)  # fmt: skip
def test_a_file_is_read(file: Gguf, tmp_path: Path) -> None:
    source = opened(file, tmp_path)
    assert (
        source.byteorder == "little"
        and source.names() == ["none", "q", "w"]
        and list(source.entries) == ["w", "q", "none"]
    )
    assert torch.equal(source.read("w"), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert source.read("none").shape == (4, 0)
    assert source.blocks("q").shape == (2, 1, 18) and bytes(source.blocks("q").flatten().tolist()) == BLOCKS
    assert source.entry("q").shape == (2, 1, 32) and source.entry("q").type is GGML_TYPES["Q4_0"]
    for key, _, value in KEYS:
        found = source.get(key)
        assert (list(found) if isinstance(found, array) else found) == (value[1] if isinstance(value, tuple) else value)
    assert source.metadata["a.numbers"].kind == "[i32]" and source.metadata["a.bool"] == MetaValue("bool", True)
    assert source.get("absent", 5) == 5


def test_a_big_endian_file_is_read(tmp_path: Path) -> None:
    swapped = b"".join(BLOCKS[i : i + 2][::-1] + BLOCKS[i + 2 : i + 18] for i in (0, 18))  # the half of each block
    tensors = [Tensor("w", (3, 2), F32, struct.pack(">6f", *range(1, 7))), Tensor("q", (32, 1, 2), Q4_0, swapped)]
    file = SOUND.changed(order=">", tensors=[*tensors, Tensor("q5", (32,), 6, bytes(22))])
    source = opened(file, tmp_path)
    assert source.byteorder == "big" and source.get("a.u16") == 65535 and list(source.get("a.numbers")) == [1, -2]
    assert torch.equal(source.read("w"), torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert bytes(source.blocks("q").flatten().tolist()) == BLOCKS
    with pytest.raises(CheckpointError, match="tensor q5 of .* is Q5_0 in a big-endian file, which is not defined"):
        source.blocks("q5")


def test_another_alignment(tmp_path: Path) -> None:
    keys = [*KEYS, ("general.alignment", 4, 64)]
    source = opened(SOUND.changed(keys=keys, alignment=64), tmp_path)
    assert source.entry("q").offset == source.entry("w").offset + 64
    assert torch.equal(source.read("w").flatten(), torch.arange(1.0, 7))


def test_the_last_padding_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND.changed(tensors=SOUND.tensors[:1]).bytes()[:-8])
    assert torch.equal(GgufSource.open(path).read("w").flatten(), torch.arange(1.0, 7))


def test_blocks_are_mapped_and_numbers_are_not(tmp_path: Path) -> None:
    source = opened(SOUND, tmp_path)
    first, again = source.blocks("q"), source.blocks("q")
    assert first.data_ptr() == again.data_ptr()
    source.read("w").zero_()
    assert torch.equal(source.read("w").flatten(), torch.arange(1.0, 7))


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    source = opened(SOUND, tmp_path)
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate(40)
    with pytest.raises(CheckpointError, match="is shorter than when it was opened: 40 bytes"):
        source.read("w")
    with pytest.raises(CheckpointError, match="has no tensor ww; the nearest name is w"):
        source.blocks("ww")
    with pytest.raises(CheckpointError, match="tensor q of .* is Q4_0, not plain numbers"):
        source.read("q")


# --- every rule is a check ------------------------------------------------------------------------------------------------------

BIG, HUGE = struct.pack("<Q", 2**30 + 1), struct.pack("<Q", 2**62)
RULES: dict[str, tuple[Gguf, str]] = {
    "empty": (
        SOUND.changed(magic=b"", header_only=True, keys=(), tensors=()),
        "has 20 bytes, too few for a GGUF header",
    ),
    "magic": (SOUND.changed(magic=b"GGML"), "a GGUF file begins with b'GGUF', got b'GGML'"),
    "version 0": (SOUND.changed(version=0), "versions 2 and 3 are read, got 0; convert the model again"),
    "version 1": (SOUND.changed(version=1), "versions 2 and 3 are read, got 1; convert the model again"),
    "version 4": (SOUND.changed(version=4), "versions 2 and 3 are read, got 4; it is newer"),
    "version 1, big": (SOUND.changed(version=1, order=">"), "got 1; convert"),
    "tensors < 0": (SOUND.changed(counts=(-1, None)), "announces -1 tensors"),
    "tensors": (
        SOUND.changed(counts=(2**40, None)),
        "announces 1099511627776 tensors, more than its .* bytes can hold",
    ),
    "keys < 0": (SOUND.changed(counts=(None, -5)), "announces -5 metadata keys"),
    "keys": (SOUND.changed(counts=(None, 2**62)), "announces 4611686018427387904 metadata keys"),
    "one key too many": (
        Gguf(counts=(None, 2), header_only=True),
        "ends at byte .*; it is truncated or not a GGUF file",
    ),
    "empty key": (SOUND.changed(keys=[("", 4, 1)]), "metadata key 0 is empty"),
    "key twice": (SOUND.changed(keys=[("a", 4, 1), ("b", 4, 1), ("a", 4, 2)]), "metadata key 'a' appears twice"),
    "key, UTF-8": (SOUND.changed(keys=[(b"\xff\xfe", 4, 1)]), "metadata key 0 is not UTF-8"),
    "value, UTF-8": (
        SOUND.changed(keys=[("a", 8, b"\1" + bytes(7) + b"\xff")]),
        "the value of a is not UTF-8: invalid start byte",
    ),
    "type": (SOUND.changed(keys=[("a", 13, b"")]), "the value of a has type 13, expected 0 … 12"),
    "type < 0": (SOUND.changed(keys=[("a", -1, b"")]), "the value of a has type -1"),
    "string": (
        SOUND.changed(keys=[("a", 8, BIG)]),
        "the value of a has a length of 1073741825 bytes, expected at most 1073741824",
    ),
    "string, huge": (SOUND.changed(keys=[("a", 8, HUGE)]), "the value of a has a length of 4611686018427387904 bytes"),
    "array, huge": (SOUND.changed(keys=[("a", 9, struct.pack("<i", 0) + HUGE)]), "a has 4611686018427387904 elements"),
    "string, past the end": (SOUND.changed(keys=[("a", 8, struct.pack("<Q", 2**29))]), "the value of a ends at byte"),
    "array": (
        SOUND.changed(keys=[("a", 9, struct.pack("<i", 0) + BIG)]),
        "a has 1073741825 elements, expected at most 1073741824",
    ),
    "array, past the end": (
        SOUND.changed(keys=[("a", 9, struct.pack("<iQ", 10, 2**29))]),
        "the value of a ends at byte",
    ),
    "strings, past the end": (
        SOUND.changed(keys=[("a", 9, struct.pack("<iQ", 8, 2**29))]),
        "a announces 536870912 strings, more than",
    ),
    "arrays of arrays": (
        SOUND.changed(keys=[("a", 9, struct.pack("<iQ", 9, 1))]),
        "a is an array of arrays, which GGUF does not allow",
    ),
    "array of what": (
        SOUND.changed(keys=[("a", 9, struct.pack("<iQ", 77, 1))]),
        "a is an array of elements of type 77",
    ),
    "alignment 0": (
        SOUND.changed(keys=[("general.alignment", 4, 0)]),
        "general.alignment must be a u32 that is a power of two, got u32 0",
    ),
    "alignment 24": (SOUND.changed(keys=[("general.alignment", 4, 24)]), "a power of two, got u32 24"),
    "alignment u64": (
        SOUND.changed(keys=[("general.alignment", 10, 32)]),
        "must be a u32 that is a power of two, got u64 32",
    ),
    "name of 64": (
        SOUND.changed(tensors=[Tensor("n" * 64, (1,), F32, bytes(4))]),
        "the name of tensor 0 must have 1 … 63 bytes",
    ),
    "no name": (
        SOUND.changed(tensors=[Tensor("", (1,), F32, bytes(4))]),
        "the name of tensor 0 must have 1 … 63 bytes, got ''",
    ),
    "name twice": (SOUND.changed(tensors=[Tensor("w", (1,), F32, bytes(4))] * 2), "tensor w appears twice"),
    "5 dimensions": (
        SOUND.changed(tensors=[Tensor("w", (1,) * 5, F32, bytes(4))]),
        "tensor w has 5 dimensions, expected at most 4",
    ),
    "size < 0": (
        SOUND.changed(tensors=[Tensor("w", (2, -1), F32, b"")]),
        r"tensor w has the shape \[-1, 2\], expected sizes of at least 0",
    ),
    "product": (SOUND.changed(tensors=[Tensor("w", (2**32, 2**32), F32, b"")]), "with a product below 2.63"),
    "bytes": (
        SOUND.changed(tensors=[Tensor("w", (2**62,), F32, b"")]),
        "tensor w would take 18446744073709551616 bytes",
    ),
    "row": (
        SOUND.changed(tensors=[Tensor("w", (33, 2), Q4_0, BLOCKS)]),
        "tensor w is Q4_0 with rows of 33, which is no multiple of its blocks of 32",
    ),
    "type of a fork": (
        SOUND.changed(tensors=[Tensor("w", (64,), 43, b"")]),
        "tensor w has type 43, which no known version of llama.cpp has",
    ),
    "type of a tensor < 0": (SOUND.changed(tensors=[Tensor("w", (64,), -1, b"")]), "tensor w has type -1"),
    "overlap": (
        SOUND.changed(tensors=[SOUND.tensors[0], Tensor("q", (32, 2), Q4_0, BLOCKS, offset=0)]),
        r"tensor q begins at byte 0 of the data, expected 32, where tensor w \(F32 \[2, 3\]\) ends",
    ),
    "gap": (
        SOUND.changed(tensors=[SOUND.tensors[0], Tensor("q", (32, 2), Q4_0, BLOCKS, offset=64)]),
        "begins at byte 64 of the data, expected 32",
    ),
    "unaligned": (
        SOUND.changed(tensors=[SOUND.tensors[0], Tensor("q", (32, 2), Q4_0, BLOCKS, offset=24)]),
        "begins at byte 24 of the data",
    ),
    "offset": (
        SOUND.changed(tensors=[Tensor("w", (1,), F32, bytes(4), offset=2**64 - 32)]),
        "begins at byte 18446744073709551584 of the data",
    ),
    "truncated": (
        SOUND.changed(tensors=[Tensor("w", (64,), F32, bytes(128))]),
        r"tensor w \(F32 \[64\]\) ends at byte .* of a file of",
    ),
    "trailing": (SOUND.changed(trailing=bytes(32)), "32 bytes follow tensor none"),
    # PrismML's fork has blocks of 128 in 34 bytes under the number of Q2_0, which has blocks of 64 in 18.
    "a fork's block": (
        SOUND.changed(tensors=[Tensor("w", (128, 16), 42, bytes(16 * 34)), SOUND.tensors[0].named("v")]),
        r"tensor v begins at byte 544 of the data, expected 576, where tensor w \(Q2_0 \[16, 128\]\) ends: .* made by a fork",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_checked(rule: str, tmp_path: Path) -> None:
    file, message = RULES[rule]
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufSource.open(file.write(tmp_path / "m.gguf"))
    assert str(caught.value).startswith(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("number", REMOVED)
def test_types_that_are_gone_are_named(number: int, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"tensor w has type {number}, {REMOVED[number]}.*convert the model again"
    ):
        opened(SOUND.changed(tensors=[Tensor("w", (256,), number, b"")]), tmp_path)


def test_a_header_larger_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_HEADER_BYTES == 100_000_000
    monkeypatch.setattr("qkernels.storage.gguf_header.MAX_HEADER_BYTES", 200)
    with pytest.raises(CheckpointError, match="the header has more than 200 bytes, which no such file has"):
        opened(SOUND, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("qkernels.storage.gguf_header.MAX_STRINGS", 20)
    with pytest.raises(CheckpointError, match="the header has more than 20 strings"):
        opened(SOUND, tmp_path)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole, path = SOUND.bytes(), tmp_path / "m.gguf"
    end = GgufSource.open(SOUND.write(path)).entry("none").offset
    for length in range(end - 28):  # the padding of the last tensor with data may be missing
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GgufSource.open(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*m\.gguf"):
        GgufSource.open(tmp_path / "m.gguf")


# --- split files ----------------------------------------------------------------------------------------------------------------


def parts(path: Path, count: int = 2, **changes: Any) -> list[Path]:
    """A model of `count` parts, each with one tensor; `changes`: keys of the last part, by name with _ for a dot."""
    files = []
    for i in range(count):
        keys: dict[str, tuple[int, Any]] = {
            "split.no": (2, i),
            "split.count": (2, count),
            "split.tensors.count": (5, count),
        }
        if i == 0:
            keys = {"general.architecture": (8, "llama")} | keys
        if i == count - 1:
            keys |= {name.replace("_", "."): value for name, value in changes.items()}
        tensors = [Tensor(f"w{i}", (1,), F32, struct.pack("<f", i))]
        file = Gguf([(name, *value) for name, value in keys.items()], tensors)
        files.append(file.write(path / f"m-{i + 1:05d}-of-{count:05d}.gguf"))
    return files


def test_parts_are_one_model_whichever_is_opened(tmp_path: Path) -> None:
    for file in (files := parts(tmp_path, 3)):
        source = GgufSource.open(file)
        assert (
            source.path == files[0] and source.files == tuple(files) and source.get("general.architecture") == "llama"
        )
        assert [float(source.read(name)) for name in source.names()] == [0, 1, 2]


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    files = parts(tmp_path, 3)
    files[1].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 parts, 1 of which are missing: .*m-00002-of-00003\.gguf"):
        GgufSource.open(files[0])
    with pytest.raises(CheckpointError, match="is part 2 of 3, but its name does not say so"):
        GgufSource.open(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").rename(files[1])
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 2 of 3, little-endian, expected part 3 of 3"):
        GgufSource.open(files[0])
    lone = SOUND.write(tmp_path / "n-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"is called a part of 2, but has no split\.count"):
        GgufSource.open(lone)
    embedded = Gguf([("split.count", 2, 2)], before=b"x" * 32).write(tmp_path / "e.gguf")
    with pytest.raises(CheckpointError, match="inside another file cannot be part 2 files"):
        GgufSource.open(embedded, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_count": (2, 3)}, "says that it is part 2 of 3, little-endian, expected part 2 of 2"),
        ({"split_no": (8, "x")}, "split.no must be an integer, got 'x'"),
    ],
)
def test_parts_that_say_something_else(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        GgufSource.open(parts(tmp_path, 2, **changes)[0])


def test_tensors_of_parts_are_counted(tmp_path: Path) -> None:
    first = Gguf(
        [("split.no", 2, 0), ("split.count", 2, 2), ("split.tensors.count", 5, 3)], [Tensor("w0", (1,), F32, bytes(4))]
    )
    files = parts(tmp_path, 2)
    first.write(files[0])
    with pytest.raises(CheckpointError, match="announces 3 tensors, the 2 parts have 2"):
        GgufSource.open(files[0])
    first.changed(tensors=[Tensor("w1", (1,), F32, bytes(4))]).write(files[0])
    with pytest.raises(
        CheckpointError, match=r"tensor w1 is in two parts, m-00001-of-00002\.gguf and m-00002-of-00002\.gguf"
    ):
        GgufSource.open(files[0])


# --- which file a path means ------------------------------------------------------------------------------------------


def test_the_file_that_a_path_means(tmp_path: Path) -> None:
    assert gguf_at(tmp_path) is None and gguf_at(tmp_path / "absent.gguf") is None
    blob = SOUND.write(tmp_path / "sha256-0123")
    assert gguf_at(blob) == blob
    assert gguf_at(tmp_path) is None
    files = parts(tmp_path, 2)
    SOUND.write(tmp_path / "mmproj-F16.gguf")
    SOUND.write(tmp_path / "imatrix_unsloth.gguf")
    assert gguf_at(tmp_path) == files[0] and gguf_at(str(files[1])) == files[1]
    SOUND.write(tmp_path / "a.gguf")
    with pytest.raises(
        CheckpointError, match=r"holds 2 GGUF models \(a\.gguf, m-00001-of-00002\.gguf\); name one of them"
    ):
        gguf_at(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert gguf_at(tmp_path) is None
