"""Storage: tensors come back as written, and headers that lie are refused before anything is allocated."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.storage import ShardWriter, TensorSource, copy_side_files, read_json, write_json

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn,
]  # fmt: skip


def bits_of(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).contiguous().view(torch.uint8).tolist()) if tensor.numel() else b""


def checkpoint(directory: Path, tensors: dict[str, Tensor], shard_bytes: int = 2**30) -> Path:
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    write_json(directory / "config.json", {"model_type": "none"})
    return directory


def raw(directory: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A directory whose only shard has this header, taken as bytes or spelled as JSON."""
    directory.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = (len(text) if length is None else length).to_bytes(8, "little")
    (directory / "model.safetensors").write_bytes(count + text + data)
    write_json(directory / "config.json", {})
    return directory


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# --- reading and writing ----------------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=8),
    dtype=st.sampled_from(DTYPES),
    shard_bytes=st.sampled_from([1, 64, 2**30]),
)
def test_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype, shard_bytes: int
) -> None:
    tensors = {f"t{i}": (torch.randn(shape) * 3).to(dtype) for i, shape in enumerate(shapes)}
    directory = checkpoint(tmp_path_factory.mktemp("c"), tensors, shard_bytes)
    source = TensorSource.open(directory)
    assert source.names() == sorted(tensors)
    for name, tensor in tensors.items():
        back = source.read(name)
        assert (source.dtype(name), list(source.shape(name))) == (dtype, list(tensor.shape))
        assert (back.dtype, back.shape, source.nbytes(name)) == (dtype, tensor.shape, tensor.nbytes)
        assert bits_of(back) == bits_of(tensor)


@pytest.mark.parametrize("shard_bytes", [2**30, 100])
def test_the_safetensors_library_reads_what_we_write(tmp_path: Path, shard_bytes: int) -> None:
    tensors = {f"t{i}": torch.randn(3, i) for i in range(6)}
    checkpoint(tmp_path, tensors, shard_bytes)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int8), "c": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors", {"note": "x"})
    write_json(tmp_path / "config.json", {})
    source = TensorSource.open(tmp_path)
    assert source.metadata == {"note": "x"}
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)


def test_shards(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100)
    for i in range(4):
        writer.add(f"t{i}", torch.full((15,), float(i)))  # 60 bytes: one each
    writer.add("large", torch.zeros(60))  # 240 bytes: more than a shard
    writer.close({"note": "x"})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)] + ["model.safetensors.index.json"]
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"] == {"note": "x", "total_size": 480}
    assert index["weight_map"]["large"] == "model-00005-of-00005.safetensors"


def test_strided_tensors_and_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "row": base[2], "column": base[:, 3], "expanded": base[:1].expand(3, 6)}
    source = TensorSource.open(checkpoint(tmp_path, tensors))
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_nothing_to_write_is_a_valid_file(tmp_path: Path) -> None:
    assert TensorSource.open(checkpoint(tmp_path, {})).names() == []


def test_names_and_dtypes_the_writer_refuses(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.zeros(1))
    with pytest.raises(CheckpointError, match="tensor a was added twice"):
        writer.add("a", torch.zeros(1))
    with pytest.raises(CheckpointError, match="__metadata__ is a reserved name"):
        writer.add("__metadata__", torch.zeros(1))
    with pytest.raises(
        CheckpointError, match=r"tensor z has dtype torch.complex128, which a safetensors file cannot hold"
    ):
        writer.add("z", torch.zeros(1, dtype=torch.complex128))


def test_unknown_names_get_a_hint(tmp_path: Path) -> None:
    source = TensorSource.open(checkpoint(tmp_path, {"model.norm.weight": torch.zeros(2)}))
    with pytest.raises(
        CheckpointError, match=r"has no tensor model\.norm\.wieght; the nearest name is model\.norm\.weight"
    ):
        source.read("model.norm.wieght")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    source = TensorSource.open(checkpoint(tmp_path, {"a": torch.zeros(100)}))
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="ended inside tensor a: expected 400 bytes, got 390"):
        source.read("a")


def test_side_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    checkpoint(source, {"a": torch.zeros(1)}, 1)
    target.mkdir()
    kept = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE", "eval.txt"]
    remade = ["quantize_config.json", ".gitattributes", "model.safetensors.index.json", "qkernels_report.json"]
    left = ["pytorch_model.bin", "README.md", "params.json", "consolidated.safetensors", "adapter_config.json"]
    for name in [*kept, *remade, *left]:
        (source / name).write_text(name)
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "x.jinja").write_text("x")
    (source / "original").mkdir()
    (source / "merges.txt").symlink_to(source / "LICENSE")
    (target / "LICENSE").write_text("ours")
    (source / "dead").symlink_to(source / "nothing")
    with caplog.at_level(logging.WARNING, "qkernels"):
        found = copy_side_files(source, target)
    assert found.copied == [
        "chat_template.jinja", "chat_templates", "eval.txt", "generation_config.json", "merges.txt", "tokenizer.json",
    ]  # fmt: skip
    assert sorted(found.left) == sorted([*left, "dead"])
    assert "README" not in caplog.text
    assert all(name in caplog.text for name in [*left, "dead"] if name != "README.md")
    assert (target / "LICENSE").read_text() == "ours"
    assert not (target / "merges.txt").is_symlink()
    assert (target / "chat_templates" / "x.jinja").read_text() == "x"
    assert not (target / "config.json").exists()


def test_folders_beside_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that sentence-transformers runs are part of the model, weights included; other weights are not."""
    source, target = tmp_path / "s", tmp_path / "t"
    checkpoint(source, {"a": torch.zeros(1)}, 1)
    target.mkdir()
    parts = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (source / "modules.json").write_text(json.dumps(parts))
    files = [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/.cache/x",
        "custom_generate/generate.py", "original/params.json", "original/consolidated.00.pth", "onnx/model.onnx",
        "out-4bit/model.safetensors", ".cache/y/z",
    ]  # fmt: skip
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "loop").symlink_to(source)
    with caplog.at_level(logging.WARNING, "qkernels"):
        found = copy_side_files(source, target)
    assert found.copied == ["1_Pooling", "2_Dense", "custom_generate", "modules.json"]
    travelled = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert travelled == [*files[:3], files[4], "modules.json"]
    assert found.left == dict.fromkeys(["onnx", "original", "out-4bit"], "a folder with weights") | {
        "loop": "a link to a folder"
    }
    assert "left behind: loop (a link to a folder), onnx (a folder with weights)" in caplog.text


def test_other_weights_in_the_folder_do_not_count(tmp_path: Path) -> None:
    """Mistral's own shards lie beside those that the index names; a single file of theirs, or an adapter, beside ours."""
    directory = checkpoint(tmp_path / "shards", {f"t{i}": torch.full((4,), i) for i in range(5)}, 32)
    for path in sorted(directory.glob("model-*.safetensors")):
        shutil.copy(path, directory / path.name.replace("model-", "consolidated-"))
    assert TensorSource.open(directory).read("t3").tolist() == [3] * 4
    older = checkpoint(tmp_path / "older", {"a": torch.zeros(1)}, 1)
    (older / "model.safetensors").rename(older / "gptq_model-4bit-128g.safetensors")
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        (older / name).write_bytes(b"not even safetensors")
    assert TensorSource.open(older).names() == ["a"]
    (older / "gptq_model-4bit-128g.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no weights under the model's own names, only adapter_model\.safetensors"
    ):
        TensorSource.open(older)


# --- directories that are not sound -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, bytes(4), "tensor a ends at byte .* the file is truncated"),
        ({"a": entry(0, 4)}, bytes(8), "but its tensors end at byte"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "tensor a and tensor b overlap at byte"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "tensor a and tensor b overlap"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8), "tensor a and tensor b leave a gap"),
        ({"a": entry(2, 4)}, bytes(4), "the header and tensor a leave a gap"),
        ({"a": entry(4, 0, [4])}, bytes(4), r"data_offsets \[4, 0\], expected \[begin, end\]"),
        ({"a": entry(0, 4, [5])}, bytes(4), r"tensor a is U8 \[5\] = 5 bytes, but its offsets span 4"),
        ({"a": entry(0, 4, [2**62, 2**62])}, bytes(4), "but its offsets span 4"),
        ({"a": entry(0, 4, [-4])}, bytes(4), r"shape \[-4\], expected a list of at most 16 sizes"),
        ({"a": entry(0, 4, [2.0, 2])}, bytes(4), r"shape \[2.0, 2\]"),
        ({"a": entry(0, 4, [True, 4])}, bytes(4), r"shape \[True, 4\]"),
        ({"a": entry(0, 1, [1] * 17)}, bytes(1), "expected a list of at most 16 sizes"),
        ({"a": entry(0, 4, dtype="U3")}, bytes(4), "dtype 'U3', expected one of BOOL"),
        ({"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}, bytes(4), r"dtype \['U8'\]"),
        ({"a": {"dtype": "U8"}}, b"", "tensor a needs dtype, shape and data_offsets"),
        ({"a": 3}, b"", "tensor a needs dtype, shape and data_offsets, got 3"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__ that does not map strings to strings"),
        ([1], b"", "must hold a JSON object, got list"),
        (b"{", b"", "is not valid JSON"),
        (b"\xff\xfe", b"", "is not UTF-8"),
        (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}', b"", "key 'a' appears twice"),
        (b"[" * 100_000, b"", "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "is not valid JSON"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        TensorSource.open(raw(tmp_path, header, data))


@pytest.mark.parametrize("length", [100, 2**40, 2**63])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"too few for the header of {length} bytes that it announces"):
        TensorSource.open(raw(tmp_path, {}, length=length))


def test_an_absurd_header_is_not_read(tmp_path: Path) -> None:
    raw(tmp_path, {}, length=200_000_000)
    os.truncate(tmp_path / "model.safetensors", 300_000_000)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match="announces a header of 200000000 bytes; at most 100000000 are read"):
        TensorSource.open(tmp_path)


def test_a_file_too_short_for_anything(tmp_path: Path) -> None:
    raw(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="has 3 bytes, too few for the header; it is truncated"):
        TensorSource.open(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"a": torch.arange(6.0), "b": torch.arange(3)}) / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            TensorSource.open(tmp_path)
    path.write_bytes(whole)
    TensorSource.open(tmp_path)


def _edit_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = read_json(directory / "model.safetensors.index.json")
    change(index["weight_map"])
    write_json(directory / "model.safetensors.index.json", index)


def _missing_shard(d: Path) -> None:
    (d / "model-00002-of-00003.safetensors").unlink()


def _missing_index(d: Path) -> None:
    (d / "model.safetensors.index.json").unlink()


def _one_shard_left(d: Path) -> None:
    _missing_index(d)
    _missing_shard(d)
    (d / "model-00003-of-00003.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing_shard, "lacks 1 of the 3 shards that model.safetensors.index.json names: model-00002-of-00003"),
        (_missing_index, "has 3 safetensors files but no model.safetensors.index.json"),
        (_one_shard_left, "has the shard model-00001-of-00003.safetensors but no model.safetensors.index.json"),
        (
            lambda d: _edit_index(d, lambda m: m.update(x=m["t0"])),
            "says that tensor x is in model-00001.*no shard holds it",
        ),
        (lambda d: _edit_index(d, lambda m: m.update(t2=m["t0"])), "tensor t2 is in model-00001.*it is in model-00002"),
        (
            lambda d: _edit_index(d, lambda m: m.pop("t0")),
            "tensor t0 is in model-00001-of-00003.safetensors, but .* not list it",
        ),
        (
            lambda d: _edit_index(d, lambda m: m.pop("t4")),
            "has the shard model-00003-of-00003.safetensors, which .* not name",
        ),
        (
            lambda d: _edit_index(d, lambda m: m.update(t0="../t0.safetensors")),
            "names '../t0.safetensors', which is not a",
        ),
        (lambda d: _edit_index(d, lambda m: m.update(t0="t0.bin")), "names 't0.bin', which is not a"),
        (lambda d: _edit_index(d, lambda m: m.update(t0=3)), "needs a weight_map from tensor names to file names"),
        (lambda d: _edit_index(d, lambda m: m.clear()), "needs a weight_map"),
        (
            lambda d: shutil.copy(d / "model-00001-of-00003.safetensors", d / "model.safetensors"),
            "has both model.safetensors",
        ),
        (
            lambda d: shutil.copy(d / "model-00001-of-00003.safetensors", d / "model-00002-of-00003.safetensors"),
            "tensor t0 is in two shards, model-00001-of-00003.safetensors and model-00002-of-00003",
        ),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json is not UTF-8"),
        (
            lambda d: (d / "config.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}'),
            "config.json: key 'c' appears twice",
        ),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda d: (d / "config.json").write_text("3"), "config.json must hold a JSON object, got int"),
        (lambda d: os.truncate(d / "config.json", 20_000_000), "config.json is larger than 16000000 bytes"),
    ],
)
def test_directories_that_are_not_sound(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    directory = checkpoint(tmp_path, {f"t{i}": torch.zeros(4) for i in range(5)}, 32)
    TensorSource.open(directory)
    spoil(directory)
    with pytest.raises(CheckpointError, match=message):
        TensorSource.open(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.ckpt"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "config.json", {})
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=f"holds only pickled weights \\({name}\\), which may run code"):
        TensorSource.open(tmp_path)


def test_the_pickle_of_hqq_is_refused_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    (tmp_path / "qmodel.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match=r"holds HQQ's qmodel.pt, a pickle, .*--method hqq"):
        TensorSource.open(tmp_path)


def test_places_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"org/model does not exist; a checkpoint is a local folder"):
        TensorSource.open("org/model")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"link is a link to .*gone, which does not exist; a checkpoint is"):
        TensorSource.open(tmp_path / "link")
    (tmp_path / "text").write_text("GPUF")
    with pytest.raises(CheckpointError, match="text is a file, but no GGUF file; a checkpoint is"):
        TensorSource.open(tmp_path / "text")
    write_json(tmp_path / "config.json", {})
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors file"):
        TensorSource.open(tmp_path)


def test_one_file_of_any_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    assert torch.equal(TensorSource.open(tmp_path).read("a"), torch.ones(2))
