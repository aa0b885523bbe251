"""`QuantEmbedding`: the bits of the table's rows, one memory with a tied head, and nothing that is out of range."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qkernels import QuantLinear, QuantTensor, inspect, load, save
from qkernels.checkpoint import to_gguf
from qkernels.errors import ArgumentError
from qkernels.formats.gguf import WRITABLE_TYPES, gguf_blocks, weight_of
from qkernels.nn import QuantEmbedding, model_bytes, packed_bytes
from qkernels.nn.embedding import scale_of
from qkernels.storage.gguf import GgufSource
from tests.gguf_golden import FILES
from tests.gguf_written import FIELDS, model_directory
from tests.tiny_models import tiny_model

IDS = torch.tensor([[0, 99, 31, 32], [64, 31, 98, 5]])


def table_of(type: str, dtype: torch.dtype, rows: int = 100) -> QuantLinear:
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1))
    return QuantLinear.from_quant_tensor(weight_of(gguf_blocks(weight, type), type), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("type", WRITABLE_TYPES)
def test_rows_are_those_of_the_dequantized_table(type: str, dtype: torch.dtype) -> None:
    table = table_of(type, dtype)
    embedding = QuantEmbedding(table)
    assert torch.equal(embedding(IDS), table.dequantize()[IDS])
    assert embedding(IDS[:0]).shape == (0, 4, 256)
    every = torch.arange(100).flip(0).repeat(3)
    assert torch.equal(embedding(every), table.dequantize()[every])


def test_many_tiles_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of("Q6_K", torch.float32, rows=2500)
    seen = []
    plain = QuantEmbedding._rows

    def watched(self: QuantEmbedding, tiles: Any, places: Any) -> Any:
        seen.append(len(tiles))
        return plain(self, tiles, places)

    monkeypatch.setattr(QuantEmbedding, "_rows", watched)
    monkeypatch.setattr("qkernels.nn.embedding.ROWS", {})  # as it is on a GPU
    ids = torch.arange(0, 2500, 3)
    assert torch.equal(QuantEmbedding(table)(ids), table.dequantize()[ids]) and seen == [8] * 9 + [7]
    seen.clear()
    QuantEmbedding(table)(torch.tensor([7]))
    assert seen == [1], "one tile for one row"


@pytest.mark.parametrize("wrong", [-1, 100, 127])
def test_ids_outside_of_the_vocabulary(wrong: int) -> None:
    """100 to 127 lie in the last tile, which is padded."""
    embedding = QuantEmbedding(table_of("Q4_K", torch.float32))
    with pytest.raises(ArgumentError, match=r"token ids must be 0 … 99, got"):
        embedding(torch.tensor([3, wrong]))
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="token ids must be 0 … 99"):
        compiled(torch.tensor([3, wrong]))


def test_compiled_whole() -> None:
    embedding = QuantEmbedding(table_of("Q4_K", torch.bfloat16))
    compiled = torch.compile(embedding, backend="aot_eager", fullgraph=True, dynamic=True)
    for ids in (IDS, IDS[:1], torch.tensor([[7]])):
        assert torch.equal(compiled(ids), embedding(ids))


class Doubled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2 + 1


def test_what_embeddings_compute_is_found_by_running_them() -> None:
    assert scale_of(nn.Embedding(10, 6)) is None
    gemma = tiny_model("gemma3_text").get_input_embeddings()
    scale = scale_of(gemma)
    assert scale is not None and float(scale) == float(gemma.embed_scale)
    with pytest.raises(ArgumentError, match="a Doubled computes more than rows of its weight"):
        scale_of(Doubled(10, 6))


def test_factors_of_gemma_go_with_the_rows(tmp_path: Path) -> None:
    to_gguf(FILES / "gemma3.gguf", tmp_path / "m.gguf", "Q8_0")
    model, before = load(tmp_path / "m.gguf", dtype="float32"), load(FILES / "gemma3.gguf", dtype="float32")
    embedding, plain = model.get_input_embeddings(), before.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding) and model.lm_head is embedding.table
    plain.weight.data = embedding.table.dequantize()
    ids = torch.arange(40)[None]
    assert torch.equal(embedding(ids), plain(ids)) and not torch.equal(embedding(ids), plain.weight[ids])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose head is a weight of its own, and one whose head is the embedding."""
    directory = tmp_path_factory.mktemp("embeddings")
    found = {}
    for name, tied in (("own", False), ("tied", True)):
        source = model_directory(directory / f"{name}-source")
        if tied:
            model = tiny_model("llama", **FIELDS, tie_word_embeddings=True)
            model.half().save_pretrained(source)
        found[name] = directory / f"{name}.gguf"
        to_gguf(source, found[name], "Q4_K_M")
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(24)[None] * 7 % 300).logits
    return found


@pytest.mark.parametrize("name", ["own", "tied"])
def test_a_loaded_model_keeps_it_packed(
    name: str, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(files[name], dtype="float32")
    assert "dequantized" not in caplog.text
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert (model.lm_head is embedding.table) == (name == "tied")
    file = GgufSource.open(files[name])
    stored = sum(entry.nbytes for entry in file.entries.values())
    assert model_bytes(model) <= 1.15 * stored
    assert packed_bytes(embedding.table) <= 1.04 * file.entry("token_embd.weight").nbytes + 32 * 256

    floats = load(files[name], dtype="float32")
    floats.model.embed_tokens = nn.Embedding.from_pretrained(embedding.table.dequantize())
    expected = logits(floats)
    assert torch.equal(logits(model), expected)

    copied = copy.deepcopy(model)
    assert (copied.lm_head is copied.model.embed_tokens.table) == (name == "tied")
    assert torch.equal(logits(copied), expected)
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    kept.seek(0)
    copied.model.embed_tokens.table.scales.zero_()
    copied.load_state_dict(torch.load(kept, weights_only=True))
    assert torch.equal(logits(copied), expected)
    assert copied.bfloat16().get_input_embeddings()(torch.tensor([5])).dtype == torch.bfloat16
    hidden = model.get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad_()
    model(inputs_embeds=hidden).logits.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.any())

    save(model, tmp_path / "saved")
    assert "packed embeddings are written as floats: model.embed_tokens" in caplog.text
    assert model.get_input_embeddings() is embedding and torch.equal(logits(model), expected)
    again = load(tmp_path / "saved", dtype="float32")
    assert torch.equal(again.get_input_embeddings().weight, embedding.table.dequantize())
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)  # a tied head is floats now
    assert inspect(files[name]).to_json()


def test_save_pretrained_and_adapters(files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import qkernels.integrations.transformers  # noqa: F401

    model = load(files["tied"], dtype="float32")
    expected = logits(model)
    model.save_pretrained(tmp_path / "hf")
    assert "packed embeddings are written as floats: model.embed_tokens" in caplog.text
    assert isinstance(model.get_input_embeddings(), QuantEmbedding) and torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(load(tmp_path / "hf", dtype="float32")), expected, rtol=1e-5, atol=1e-5)
    peft = pytest.importorskip("peft")
    from qkernels.integrations.peft import on_quantized

    config = on_quantized(peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = peft.get_peft_model(model, config)
    names = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert names and not any("embed_tokens" in name or "lm_head" in name for name in names)
    assert torch.equal(logits(adapted), expected)


def parts_of(type: str, sizes: tuple[int, ...]) -> list[QuantTensor]:
    weight = torch.randn(sum(sizes), 256, generator=torch.Generator().manual_seed(2))
    return [weight_of(blocks, type) for blocks in gguf_blocks(weight, type).split(sizes)]


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q3_K", "Q4_K", "Q8_0", "MXFP4", "IQ4_NL"])
@pytest.mark.parametrize("sizes", [(64, 128, 7), (5,), (64,), (64, 64)])
def test_parts_make_the_buffers_of_the_whole(type: str, sizes: tuple[int, ...]) -> None:
    whole = table_of_parts(parts_of(type, (sum(sizes),)), sum(sizes))
    layer = table_of_parts(parts_of(type, sizes), sum(sizes))
    assert (layer.layout, layer.scheme, layer.out_features) == (whole.layout, whole.scheme, sum(sizes))
    assert layer.packed().keys() == whole.packed().keys()
    for name, buffer in whole.packed().items():
        mine = layer.packed()[name]
        assert (mine is None) == (buffer is None), name
        if buffer is not None:
            assert mine.dtype == buffer.dtype and torch.equal(mine.view(torch.uint8), buffer.view(torch.uint8)), name
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), QuantLinear.from_quant_tensor(parts_of(type, (sum(sizes),))[0])(x))


def table_of_parts(parts: list[QuantTensor], rows: int) -> QuantLinear:
    return QuantLinear.from_parts(parts, rows, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("sizes", "rows", "message"),
    [
        ((5, 64), 69, "whole tiles"),
        ((64,), 70, "only 64 rows"),
        ((64, 64), 100, "64 more after 64"),
        ((), 3, "no part"),
    ],
)
def test_parts_that_are_no_weight(sizes: tuple[int, ...], rows: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        table_of_parts(parts_of("Q8_0", sizes) if sizes else [], rows)
