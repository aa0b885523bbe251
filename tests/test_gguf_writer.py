"""What the writer of GGUF files writes reads back, is the format byte for byte, and appears whole or not at all."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels.errors import CheckpointError
from qkernels.storage.gguf import GgufSource
from qkernels.storage.gguf_header import MetaValue
from qkernels.storage.gguf_writer import Planned, gguf_writer
from tests.gguf_files import Gguf, Tensor

F32, Q4_0 = 0, 2
BLOCKS = bytes(range(36))
META = {
    "general.architecture": MetaValue("string", "llama"), "a.u16": MetaValue("u16", 7), "a.f32": MetaValue("f32", 0.5),
    "a.bool": MetaValue("bool", True), "a.tokens": MetaValue("[string]", ["", "▁x"]), "a.scores": MetaValue("[f32]", [0.5, -1.0]),
    "a.flags": MetaValue("[bool]", [True, False]),
}  # fmt: skip
PLAN = [
    Planned("w", "F32", (2, 3)),
    Planned("q", "Q4_0", (2, 32)),
    Planned("b", "BF16", (5,)),
    Planned("none", "F32", (4, 0)),
]
DATA = {
    "w": torch.arange(6.0).view(2, 3), "q": torch.frombuffer(bytearray(BLOCKS), dtype=torch.uint8).view(2, 18),
    "b": torch.arange(5, dtype=torch.bfloat16), "none": torch.empty(4, 0),
}  # fmt: skip


def write(path: Path, order: str = "wqb0", meta: dict[str, MetaValue] = META, **options: Any) -> None:
    with gguf_writer(path, meta, PLAN, **options) as writer:
        for name in order:
            name = "none" if name == "0" else name
            writer.add(name, DATA[name])


@pytest.mark.parametrize("order", ["wqb0", "0bqw"])
def test_what_is_written_reads_back(order: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", order)
    source = GgufSource.open(tmp_path / "m.gguf")
    assert list(source.entries) == ["w", "q", "b", "none"]
    for name, tensor in DATA.items():
        assert torch.equal(source.blocks(name) if name == "q" else source.read(name), tensor)
    for key, (kind, value) in META.items():
        found = source.metadata[key]
        assert found.kind == kind and (list(found.value) if isinstance(value, list) else found.value) == value
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_bytes_are_those_of_the_description(tmp_path: Path) -> None:
    with gguf_writer(tmp_path / "m.gguf", {"general.architecture": MetaValue("string", "llama")}, PLAN[:2]) as writer:
        writer.add("w", DATA["w"])
        writer.add("q", DATA["q"])
    tensors = [Tensor("w", (3, 2), F32, struct.pack("<6f", *range(6))), Tensor("q", (32, 2), Q4_0, BLOCKS)]
    assert (tmp_path / "m.gguf").read_bytes() == Gguf(tensors=tensors).bytes()


def test_split_writing(tmp_path: Path) -> None:
    meta = META | {"general.alignment": MetaValue("u32", 64)}
    write(tmp_path / "m.gguf", meta=meta, max_part_bytes=40)
    names = [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    source = GgufSource.open(tmp_path / names[2])
    assert [source.entry(name).path.name for name in ("w", "q", "b", "none")] == [*names, names[2]]
    assert torch.equal(source.blocks("q"), DATA["q"]) and torch.equal(source.read("b"), DATA["b"])
    assert source.get("a.u16") == 7 and source.metadata["split.count"] == MetaValue("u16", 3)
    with pytest.raises(
        CheckpointError, match=r"m-00001-of-00003\.gguf exists; choose another target, remove it, or pass"
    ):
        write(tmp_path / "m.gguf", meta=meta, max_part_bytes=40)
    write(tmp_path / "m.gguf", meta=meta, max_part_bytes=40, overwrite=True)


def test_nothing_appears_unless_everything_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="1 planned tensors were not added, for example q"):
        write(tmp_path / "m.gguf", "wb0")
    with pytest.raises(RuntimeError, match="stop"), gguf_writer(tmp_path / "m.gguf", META, PLAN):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a letter")
    with pytest.raises(CheckpointError, match=r"m\.gguf exists; choose another target"):
        write(path)
    with pytest.raises(CheckpointError, match="does not begin with b'GGUF', so it is not overwritten"):
        write(path, overwrite=True)
    Gguf().write(path)
    with pytest.raises(CheckpointError, match="is read to write it, and is kept"):
        write(path, overwrite=True, sources=[path])
    write(path, overwrite=True)
    assert GgufSource.open(path).names() == ["b", "none", "q", "w"]
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(CheckpointError, match="cannot write .*: .*Is a directory"):
        write(tmp_path / "d.gguf", overwrite=True)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("w", torch.zeros(2, 3).half(), r"tensor w must be float32 \[2, 3\] for F32, got float16 \[2, 3\]"),
        ("q", torch.zeros(2, 32), r"tensor q must be uint8 \[2, 18\] for Q4_0, got float32 \[2, 32\]"),
        ("other", torch.zeros(1), "tensor other was not planned, or was added twice"),
    ],
)
def test_tensors_that_were_not_planned(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message), gguf_writer(tmp_path / "m.gguf", META, PLAN) as writer:
        writer.add(name, tensor)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Planned("w", "Q4_2", (32,)), "tensor w has type 'Q4_2', expected one of F32, F16"),
        (
            Planned("w", "Q4_K", (128,)),
            "tensor w has rows of 128, which is no multiple of the blocks of 256 that Q4_K has",
        ),
        (Planned("n" * 64, "F32", (1,)), "needs a name of 1 … 63 bytes and at most 4 dimensions, got 64 and 1"),
        (Planned("w", "F32", (1,) * 5), "got 1 and 5"),
        (Planned("b", "F32", (1,)), "tensor b was planned twice"),
    ],
)
def test_plans_that_do_not_fit(plan: Planned, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message), gguf_writer(tmp_path / "m.gguf", META, [*PLAN, plan]):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (MetaValue("u8", 256), "key does not fit u8: 256"),
        (MetaValue("u32", "x"), "key does not fit u32: 'x'"),
        (MetaValue("[u32]", [-1]), r"key does not fit \[u32\]: \[-1\]"),
        (MetaValue("[u32]", 5), r"key does not fit \[u32\]: 5"),
        (MetaValue("[string]", [5]), r"key does not fit \[string\]: \[5\]"),
        (MetaValue("string", 5), "key does not fit string: 5"),
        (MetaValue("[array]", []), r"key has kind '\[array\]', expected one of u8, "),
        (MetaValue("int", 5), "key has kind 'int', expected one of u8, "),
    ],
)
def test_values_that_do_not_fit(value: MetaValue, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message), gguf_writer(tmp_path / "m.gguf", {"key": value}, ()):
        pass


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    left = tmp_path / ".m.gguf.qkernels-0123abcd.tmp"
    left.mkdir()
    (left / "m.gguf").write_bytes(b"GGUF")
    write(tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    def fill(full: Any) -> None:
        with gguf_writer(tmp_path / "m.gguf", META, [Planned("w", "F32", (1 << 20,))]) as writer:
            writer._files[0].close()
            writer._files[0] = full
            writer.add("w", torch.zeros(1 << 20))

    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(CheckpointError, match=r"no space left .*m\.gguf"),
    ):
        fill(full)
    assert list(tmp_path.iterdir()) == []
