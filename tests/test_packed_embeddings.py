"""Embeddings of GGUF files stay packed in what `pack` makes for a kernel, and are read as they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qkernels import inspect, load, load_tokenizer
from qkernels.checkpoint import convert, open_checkpoint, to_gguf
from qkernels.errors import CheckpointError
from qkernels.nn import QuantEmbedding
from qkernels.storage.gguf import GgufSource
from tests.checkpoints import shapes_taken_apart
from tests.gguf_golden import FILES
from tests.gguf_written import FIELDS
from tests.tiny_models import tiny_model

transformers = pytest.importorskip("transformers")

LAYOUT = "cpu_tile_a16"
IDS = torch.arange(12)[None]
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module", params=["separate", "tied", "tied, half a tile"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bool]:
    """A GGUF file, what was packed of it, and whether its embedding is read as it lies."""
    root, tied = tmp_path_factory.mktemp("embeddings"), request.param != "separate"
    vocabulary = 304 if "half" in request.param else 320
    torch.manual_seed(0)
    fields = {**FIELDS, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    tiny_model("qwen3" if tied else "llama", **fields).save_pretrained(root / "hf")
    load_tokenizer(FILES / "llama.gguf").save_pretrained(root / "hf")
    to_gguf(root / "hf", root / "m.gguf", "Q4_K_M")
    convert(root / "m.gguf", root / "packed", LAYOUT)
    return root / "m.gguf", root / "packed", vocabulary == 320


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_they_load_as_they_do_from_the_file(made: tuple[Path, Path, bool], monkeypatch: Any) -> None:
    file, directory, whole = made
    taken_apart = shapes_taken_apart(monkeypatch)
    model, expected = load(directory), load(file)
    table = expected.model.embed_tokens.table
    shape = (table.out_features, table.in_features)
    assert (shape in taken_apart) is not whole
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    tied = expected.lm_head is expected.model.embed_tokens.table
    assert (model.lm_head is model.model.embed_tokens.table) is tied
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(load(directory, activations="int8")), logits(load(file, activations="int8")))
    checkpoint = open_checkpoint(directory)
    assert torch.equal(
        checkpoint.read(f"{EMBEDDING}.weight"), expected.model.embed_tokens.table.dequantize(torch.float32)
    )
    named = {name for name, module in checkpoint.in_file_order() if module is None}
    assert named == set(checkpoint.names()) and f"{EMBEDDING}.weight" in named
    told = next(layer for layer in inspect(directory).layers if layer.name == EMBEDDING)
    assert (told.scheme, told.out_features, told.in_features) == (str(table.scheme), *shape)


def test_from_pretrained_has_them_as_floats(made: tuple[Path, Path, bool], caplog: pytest.LogCaptureFixture) -> None:
    from qkernels.integrations.transformers import enable

    enable()
    file, directory, _ = made
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = load(file, dtype=torch.float32)
    assert torch.equal(model.get_input_embeddings().weight, expected.model.embed_tokens.table.dequantize(torch.float32))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is (
        expected.lm_head is expected.model.embed_tokens.table
    )
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert sum("embeddings are dequantized while loading" in line for line in caplog.messages) == 1


def test_other_formats_get_floats_and_say_so(
    made: tuple[Path, Path, bool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, directory, _ = made
    convert(directory, tmp_path / "native", "native")
    assert sum("embeddings are written as floats" in line for line in caplog.messages) == 1
    assert "embeddings" not in json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    torch.testing.assert_close(
        logits(load(tmp_path / "native", dtype="float32")), logits(load(file, dtype="float32")), rtol=1e-4, atol=1e-4
    )
    convert(directory, tmp_path / "again", LAYOUT)
    first, second = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_and_back_to_a_file(made: tuple[Path, Path, bool], tmp_path: Path) -> None:
    """Of rows with one outer factor, too (K = 256)."""
    file, directory, _ = made
    to_gguf(directory, tmp_path / "back.gguf")
    again, first = load(tmp_path / "back.gguf", dtype="float32"), load(file, dtype="float32")
    torch.testing.assert_close(logits(again), logits(first), rtol=1e-4, atol=1e-4)
    types = [GgufSource.open(path).entry("token_embd.weight").type.name for path in (file, tmp_path / "back.gguf")]
    assert types[0] == types[1]
    blocks = [GgufSource.open(path).blocks("token_embd.weight") for path in (file, tmp_path / "back.gguf")]
    assert torch.equal(*blocks)


@pytest.mark.parametrize("named", [["model.embed"], "model.embed_tokens", [3], {"model.embed_tokens": 1}])
def test_names_of_nothing_are_refused(named: Any, made: tuple[Path, Path, bool], tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["embeddings"] = named

    with pytest.raises(CheckpointError, match="embeddings must be names of quantized modules"):
        load(changed(made[1], tmp_path, change))


def test_an_embedding_that_is_not_named_is_no_layer(made: tuple[Path, Path, bool], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which is a Embedding, not a Linear"):
        load(changed(made[1], tmp_path, lambda config: config["quantization_config"].pop("embeddings")))


def test_a_broken_scale_is_told_of(made: tuple[Path, Path, bool], tmp_path: Path) -> None:
    directory = changed(made[1], tmp_path, lambda config: None)
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{EMBEDDING}.outer_scales"][0, 0, 3] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embed_tokens.*factors\.outer must be finite, got 1 NaN"):
        load(directory)


def changed(source: Path, tmp_path: Path, change: Any) -> Path:
    config = json.loads((source / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return tmp_path
