"""Importance files: what another writer wrote, what we write, and what is refused."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from qkernels.errors import ArgumentError, CheckpointError
from qkernels.formats.gguf import ImportanceFile, InputSquares, read_importance, write_importance
from tests.checkpoints import with_random_bytes
from tests.gguf_files import Gguf, Tensor
from tests.gguf_golden import FILES

Q = "blk.0.attn_q.weight"


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def entry(name: str, sums: Sequence[float], counts: Sequence[float]) -> tuple[Tensor, Tensor]:
    experts = len(counts)
    return (
        Tensor(f"{name}.in_sum2", (len(sums) // experts, experts), 0, floats(*sums)),
        Tensor(f"{name}.counts", (1, experts), 0, floats(*counts)),
    )


KEYS = [("general.type", 8, "imatrix"), ("imatrix.chunk_count", 4, 2), ("imatrix.datasets", 9, (8, ["a.txt"]))]
SOUND = Gguf(KEYS, entry(Q, (1, 2, 3, 4), (8,)))


def dat(*entries: tuple[str, int, Sequence[float]], tail: bytes = struct.pack("<ii5s", 7, 5, b"a.txt")) -> bytes:
    """A file of the older format."""
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)) + floats(*values)
    return out + tail


def test_what_gguf_py_wrote() -> None:
    found = read_importance(FILES / "importance.gguf")
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("calibration.txt",), 3, 512)
    assert torch.equal(found.entries[Q].importance(16, 64), torch.arange(64) * 0.75 / 1536)
    experts = found.entries["blk.0.ffn_up_exps.weight"].importance(3, 16, 32)
    assert torch.equal(experts[0], torch.arange(32) / 100)
    assert torch.equal(experts[1], torch.ones(32)), "no token reached it"
    assert torch.equal(experts[2], torch.arange(64, 96) / 1436)


def test_round_trip(tmp_path: Path) -> None:
    content = ImportanceFile(
        {Q: InputSquares(torch.rand(1, 8), torch.ones(1)), "b": InputSquares(torch.rand(2, 8), torch.tensor([1.0, 0]))},
        ("x", "y"),
        4,
        256,
    )
    write_importance(tmp_path / "i.gguf", content)
    found = read_importance(tmp_path / "i.gguf")
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("x", "y"), 4, 256)
    assert list(found.entries) == sorted(content.entries)
    for name, value in content.entries.items():
        assert torch.equal(found.entries[name].sums, value.sums)
        assert torch.equal(found.entries[name].counts, value.counts)
    with pytest.raises(CheckpointError, match="exists"):
        write_importance(tmp_path / "i.gguf", content)
    with pytest.raises(ArgumentError, match="must have an entry"):
        write_importance(tmp_path / "j.gguf", ImportanceFile({}))


def test_the_older_format(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(dat((Q, 4, (4, 8)), ("exps", 2, (2, 4, 6, 8))))
    found = read_importance(path)
    assert (found.datasets, found.chunk_count) == (("a.txt",), 7)
    assert found.entries[Q].importance(3, 2).tolist() == [1, 2]
    assert found.entries["exps"].importance(2, 3, 2).tolist() == [[1, 2], [3, 4]]
    path.write_bytes(dat((Q, 4, (4, 8)), tail=b""))
    assert read_importance(path).datasets == ()


def test_another_model() -> None:
    squares = InputSquares(torch.ones(1, 8), torch.ones(1))
    for shape in ((4, 6), (2, 4, 8), (8,)):
        with pytest.raises(ArgumentError, match="measured on another model"):
            squares.importance(*shape)
    with pytest.raises(ArgumentError, match="measured on another model"):
        InputSquares(torch.ones(3, 4), torch.ones(3)).importance(2, 4, 6)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        (SOUND.changed(keys=[("general.type", 8, "model")]), "general.type 'model', expected 'imatrix'"),
        (SOUND.changed(tensors=()), "no tensor that ends in .in_sum2"),
        (SOUND.changed(tensors=entry(Q, (1, 2), (1,))[:1]), "has .*in_sum2 and no .*counts"),
        (SOUND.changed(tensors=entry(Q, (1, 2), (1,))[1:]), "has .*counts and no .*in_sum2"),
        (SOUND.changed(tensors=entry(Q, (1, -2), (1,))), "sums must be finite and not negative"),
        (SOUND.changed(tensors=entry(Q, (1, float("inf")), (1,))), "sums must be finite"),
        (SOUND.changed(tensors=entry(Q, (1, 2), (float("nan"),))), "counts must be finite"),
        (SOUND.changed(tensors=(entry(Q, (1, 2, 3), (1,))[0], entry(Q, (1, 2), (1, 1))[1])), "do not fit each other"),
        (SOUND.changed(tensors=(entry(Q, (1, 2), (1,))[0], Tensor(f"{Q}.counts", (2,), 1, b"\0" * 4))), "must be F32"),
        (SOUND.changed(keys=[("imatrix.datasets", 8, "x")]), "must be an array of strings"),
        (SOUND.changed(keys=[("imatrix.chunk_count", 8, "x")]), "must be an integer"),
        (dat(), "announces 0 entries"),
        (struct.pack("<i", 2**30) + bytes(64), "announces 1073741824 entries"),
        (dat((Q, 4, (4, 8)))[:30], "it is cut short"),
        (dat((Q, 4, (4, 8)), (Q, 4, (4, 8))), "it is damaged"),
        (dat((Q, 4, ())), "with 0 values"),
        (dat((Q, 4, (4, float("nan")))), "must be finite"),
        (dat((Q, 4, (4, 8)), tail=struct.pack("<ii1sx", 7, 1, b"a")), "goes on for 1 bytes"),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe" + bytes(20), "not UTF-8"),
        (b"", "cut short"),
    ],
)
def test_damage_is_named(file: Gguf | bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "importance"
    path.write_bytes(file if isinstance(file, bytes) else file.bytes())
    with pytest.raises(CheckpointError, match=match):
        read_importance(path)
    assert read_importance(SOUND.write(path)).entries[Q].counts.tolist() == [8]


@pytest.mark.parametrize("whole", [SOUND.bytes, lambda: dat((Q, 4, (4, 8, 1, 1)))], ids=["gguf", "dat"])
def test_any_bytes(whole: Callable[[], bytes], tmp_path: Path) -> None:
    """A file of importance, or a CheckpointError."""
    path, draw, refused = tmp_path / "importance", random.Random(0), 0
    for _ in range(300):
        path.write_bytes(with_random_bytes(whole(), 0, draw)[: draw.choice([None, None, draw.randrange(1, 200)])])
        try:
            read_importance(path)
        except CheckpointError:
            refused += 1
    assert 0 < refused <= 300
