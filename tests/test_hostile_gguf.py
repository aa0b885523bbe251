"""Whatever a GGUF file holds, the answer is a checkpoint, a tokenizer, or a `CheckpointError`: never another exception, never a
hang, and no memory by what a header claims."""

from __future__ import annotations

import random
import struct
import time
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkernels.checkpoint import open_checkpoint
from qkernels.errors import CheckpointError
from qkernels.storage.gguf import GgufSource
from qkernels.storage.gguf_header import MetaValue
from qkernels.storage.gguf_types import KINDS
from qkernels.texts import load_tokenizer
from tests.checkpoints import sound_or_refused, with_random_bytes
from tests.gguf_files import LETTERS, Gguf, Tensor
from tests.gguf_golden import FILES

JUNK = [
    MetaValue("u32", 0), MetaValue("u32", 1), MetaValue("u32", 2**32 - 1), MetaValue("i32", -1), MetaValue("u64", 2**63),
    MetaValue("f32", float("nan")), MetaValue("f64", 1e308), MetaValue("bool", True), MetaValue("string", ""),
    MetaValue("string", "llama"), MetaValue("[u32]", array("I", [])), MetaValue("[u32]", array("I", [1, 2])),
    MetaValue("[string]", []), MetaValue("[string]", ["a b"]), MetaValue("[f32]", array("f", [float("nan")])),
]  # fmt: skip


MORE = [
    "expert_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
]


def written(source: GgufSource, path: Path, metadata: dict[str, MetaValue]) -> Path:
    """The file again with other metadata, quickly."""
    keys: list[tuple[Any, int, Any]] = []
    for key, (kind, value) in metadata.items():
        element = KINDS[kind.strip("[]")]
        keys.append((key, 9, (element, list(value))) if kind.startswith("[") else (key, element, value))
    tensors = [
        Tensor(name, entry.shape[::-1], entry.type.id, bytes(source.blocks(name).numpy().tobytes()))
        for name, entry in source.entries.items()
    ]
    return Gguf(keys, tensors).write(path)


def model_or_refused(path: Path) -> bool:
    try:
        assert open_checkpoint(path).quantization.get("quant_method") in ("gguf", None)
    except CheckpointError:
        return False
    return True


def tokenizer_or_refused(path: Path) -> bool:
    try:
        load_tokenizer(path)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("name", ["llama-mixed", "gemma2", "phi3"])
def test_every_key_replaced_by_junk(name: str, tmp_path: Path) -> None:
    source = GgufSource.open(FILES / f"{name}.gguf")
    outcomes: dict[str, set[bool]] = {"model": set(), "tokenizer": set()}
    for key in [
        *source.metadata,
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.add_space_prefix",
        *(f"{source.get('general.architecture')}.{key}" for key in MORE),
    ]:
        for junk in JUNK:
            path = written(source, tmp_path / "m.gguf", {**source.metadata, key: junk})
            outcomes["model"].add(model_or_refused(path))
            if key.startswith("tokenizer"):
                outcomes["tokenizer"].add(tokenizer_or_refused(path))
    assert outcomes == {"model": {True, False}, "tokenizer": {True, False}}


def test_random_bytes_in_the_header(tmp_path: Path) -> None:
    whole, path, draw = (FILES / "llama-mixed.gguf").read_bytes(), tmp_path / "m.gguf", random.Random(0)
    end = min(entry.offset for entry in GgufSource.open(FILES / "llama-mixed.gguf").entries.values())
    outcomes = []
    for i in range(300):
        spoiled = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.choice(
                [draw.randrange(end), draw.randrange(400), draw.randrange(end - 1500, end)]
            )  # keys, tensors
            spoiled[at] = draw.choice([draw.randrange(256), 0, 255, spoiled[at] ^ 1 << draw.randrange(8)])
        path.write_bytes(spoiled)
        outcomes.append(sound_or_refused(path))
        if i % 10 == 0 and outcomes[-1]:
            tokenizer_or_refused(path)
    assert {True, False} == set(outcomes)


def test_random_bytes_in_the_data(tmp_path: Path) -> None:
    """Codes can be anything; scales cannot."""
    whole, path, draw = (FILES / "llama-mixed.gguf").read_bytes(), tmp_path / "m.gguf", random.Random(0)
    begin = min(entry.offset for entry in GgufSource.open(FILES / "llama-mixed.gguf").entries.values())
    outcomes = []
    for _ in range(100):
        path.write_bytes(with_random_bytes(whole, begin, draw))
        outcomes.append(sound_or_refused(path))
    assert {True, False} == set(outcomes)


# --- drawn by hypothesis -----------------------------------------------------------------------------------------------

sizes = st.one_of(st.integers(0, 64), st.sampled_from([-1, 2**30, 2**31, 2**40, 2**62, 2**63 - 1]))
lengths = st.one_of(st.integers(0, 40), st.sampled_from([2**20, 2**30, 2**30 + 1, 2**40, 2**62, 2**64 - 1]))
names = st.sampled_from(
    ["token_embd.weight", "blk.0.attn_q.weight", "blk.9.ffn_up.weight", "output.weight", "w", "", "n" * 70]
)
keys = st.sampled_from(
    ["general.architecture", "general.alignment", "llama.block_count", "llama.attention.head_count", "llama.context_length",
     "llama.embedding_length", "llama.feed_forward_length", "llama.attention.layer_norm_rms_epsilon", "split.count", "split.no",
     "x", ""]
)  # fmt: skip


@st.composite
def values(draw: st.DrawFn) -> tuple[int, Any]:
    """A type and a value of it, or what only looks like one: a length without its bytes."""
    kind = draw(st.one_of(st.sampled_from([4, 6, 8, 9]), st.integers(-1, 14)))
    if kind == 8:
        length = draw(lengths)
        return kind, struct.pack("<Q", length) + draw(st.sampled_from([b"llama", b"\xff", b"", bytes(40)]))
    if kind == 9:
        return kind, struct.pack("<iQ", draw(st.integers(-1, 14)), draw(lengths)) + draw(st.binary(max_size=40))
    if kind not in LETTERS:
        return kind, draw(st.binary(max_size=8))
    size = struct.calcsize("=" + LETTERS[kind])
    return kind, draw(st.one_of(st.binary(min_size=size, max_size=size), st.just(bytes([32]) + bytes(size - 1))))


@st.composite
def files(draw: st.DrawFn) -> Gguf:
    """A file whose parts fit each other, mostly: a whole little model, or keys and tensors at random."""
    fields = draw(st.lists(st.tuples(keys, values()), max_size=4))
    some = [
        ("general.architecture", 8, "llama"), ("llama.block_count", 4, 1), ("llama.attention.head_count", 4, 2),
        ("llama.context_length", 4, 8), ("llama.embedding_length", 4, 32), ("llama.feed_forward_length", 4, 32),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
    ]  # fmt: skip
    kept = some if draw(st.integers(0, 3)) else []
    metadata = [*kept, *((key, kind, value) for key, (kind, value) in fields)]
    tensors = []
    for name in draw(st.lists(names, max_size=3)):
        shape = draw(st.one_of(st.just((32, 32)), st.lists(sizes, max_size=5).map(tuple)))
        kind = draw(st.sampled_from([0, 0, 1, 2, 8, 12, 30, 39, 42, 43, 4, -1]))
        data = bytes(draw(st.sampled_from([0, 576, 1088, 2048, 4096])))
        tensors.append(Tensor(name, shape, kind, data, draw(st.one_of(st.none(), lengths))))
    counts = draw(st.one_of(st.just((None, None)), st.tuples(sizes, sizes)))
    return Gguf(metadata, tensors, draw(st.sampled_from([3, 3, 3, 2, 1, 9])), counts=counts)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@settings(
    max_examples=500, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(file=files(), cut=st.one_of(st.none(), st.none(), st.integers(0, 600)))
def test_drawn_files(tmp_path: Path, little_room: None, file: Gguf, cut: int | None) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file.bytes()[:cut])
    start = time.process_time()
    sound_or_refused(path)
    assert time.process_time() - start < 2


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_the_limits_bite(tmp_path: Path, little_room: None) -> None:
    """The control: a sound file is read in so little room, and what needs more is noticed."""
    with pytest.raises(MemoryError):
        bytearray(2**30)
    (tmp_path / "m.gguf").write_bytes((FILES / "llama-mixed.gguf").read_bytes())
    assert sound_or_refused(tmp_path / "m.gguf")
