"""GGUF files of DeepSeek and gpt-oss: tensors that lie in parts there, older files, other sources, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import load, load_tokenizer, quantize, save
from qkernels.checkpoint import to_gguf
from qkernels.errors import CheckpointError, ConversionError
from qkernels.models.gguf_names import Place
from qkernels.models.gguf_parts import joined, joined_shape, part_of, part_shape
from qkernels.quantizers import RTN
from qkernels.storage.gguf import GgufSource
from qkernels.storage.gguf_header import MetaValue
from tests.gguf_golden import FILES, Tensors, number, rewritten
from tests.llama_cpp import library, llama_cpp_logits
from tests.moe_models import shipped
from tests.tiny_models import tiny_model

IDS = torch.arange(12)[None] * 7 % 64


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def directory(path: Path, model_type: str, **fields: Any) -> Path:
    tiny_model(model_type, vocab_size=300, **fields).save_pretrained(path)
    load_tokenizer(FILES / "llama.gguf").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("place", "shape"),
    [
        (Place("kv", "latent", parts=2, latent=(3, 4, 5)), (27, 6)),
        (Place("gate_up", "experts", parts=2), (2, 8, 6)),
        (Place("gate_up", "experts", parts=2, turned=True), (2, 6, 8)),
        (Place("down", "experts", turned=True), (2, 4, 6)),
        (Place("bias", "parameter", parts=2, turned=True), (2, 8)),
    ],
)
def test_parts_lead_there_and_back(place: Place, shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    places = [place.__class__(**{**vars(place), "part": part}) for part in range(place.parts)]
    parts = [part_of(one, whole) for one in places]
    assert [tuple(part.shape) for part in parts] == [part_shape(one, shape) for one in places]
    assert torch.equal(joined(place, parts), whole)
    assert joined_shape(place, [tuple(part.shape) for part in parts], "x") == shape


def as_before(tensors: Tensors) -> None:
    """Keys and values of a head in one matrix, as llama.cpp's converter wrote them until it split them."""
    for layer in (0, 1):
        (_, keys), (_, values) = (tensors.pop(f"blk.{layer}.attn_{part}_b.weight") for part in "kv")
        tensors[f"blk.{layer}.attn_kv_b.weight"] = ("F16", torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1))


OLD = {
    "deepseek2.attention.head_count_kv": number(4), "deepseek2.attention.key_length_mla": None,
    "deepseek2.attention.value_length_mla": None,
}  # fmt: skip


def test_older_files_have_keys_and_values_in_one_matrix(tmp_path: Path) -> None:
    path = rewritten("deepseek2", tmp_path / "m.gguf", OLD, as_before)
    assert torch.equal(logits(load(path, dtype="float32")), logits(load(FILES / "deepseek2.gguf", dtype="float32")))
    to_gguf(path, tmp_path / "q.gguf", "Q8_0")
    written = GgufSource.open(tmp_path / "q.gguf")
    assert written.entry("blk.0.attn_k_b.weight").shape == (4, 32, 32) and "blk.0.attn_kv_b.weight" not in written


def test_llama_cpp_computes_what_we_read_of_older_files(tmp_path: Path) -> None:
    """It rounds activations to float16, as the weights are."""
    library()
    path = rewritten("deepseek2", tmp_path / "m.gguf", OLD, as_before)
    ours, theirs = logits(load(path, dtype="float32"))[0], llama_cpp_logits(path, IDS[0], 300)
    assert float((ours - theirs).norm() / ours.norm()) < 2e-3


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("deepseek_v2", {}),  # queries without a low rank, as in the Lite models
        ("deepseek_v2", {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "num_nextn_predict_layers": 0}),
    ],
)
def test_configs_are_read_back(model_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source = directory(tmp_path / "hf", model_type, **fields)
    to_gguf(source, tmp_path / "m.gguf", "F32")
    assert torch.equal(logits(load(tmp_path / "m.gguf")), logits(load(source, dtype="float32")))


def test_quantized_latents_lose_nothing(tmp_path: Path) -> None:
    """Half of a quantized matrix, transposed, has no blocks of its own: floats. All else keeps its codes."""
    source = directory(
        tmp_path / "hf", "deepseek_v3", moe_intermediate_size=32, intermediate_size=64, q_lora_rank=32, kv_lora_rank=32
    )
    quantize(source, RTN(4, 32), save_to=tmp_path / "q", on_unsupported="reference", progress=False)
    load_tokenizer(FILES / "llama.gguf").save_pretrained(tmp_path / "q")
    to_gguf(tmp_path / "q", tmp_path / "m.gguf")
    entries = GgufSource.open(tmp_path / "m.gguf").entries
    kinds = {name: entries[f"blk.1.{name}.weight"].type.name for name in ("attn_k_b", "attn_v_b", "ffn_up_exps")}
    assert kinds["attn_k_b"] == kinds["attn_v_b"] == "F32" and kinds["ffn_up_exps"].startswith("Q4")
    before, after = (load(tmp_path / name, dtype="float32", on_unsupported="reference") for name in ("q", "m.gguf"))
    torch.testing.assert_close(logits(after), logits(before), rtol=1e-5, atol=1e-6)


def test_gpt_oss_as_shipped_keeps_its_blocks(tmp_path: Path) -> None:
    """Rows of gate and up take turns in openai's file, and lie apart in GGUF."""
    floats = shipped(tmp_path / "hf")
    load_tokenizer(FILES / "gpt-oss.gguf").save_pretrained(tmp_path / "hf")
    config = (tmp_path / "hf" / "config.json").read_text()
    model = load(tmp_path / "hf", dtype="float32")
    assert '"vocab_size": 64' in config and model.config.vocab_size == 64
    with pytest.raises(ConversionError, match="has ids up to 299, the embedding 64 rows"):
        to_gguf(tmp_path / "hf", tmp_path / "m.gguf")
    model.resize_token_embeddings(300)
    save(model, tmp_path / "wide")
    load_tokenizer(FILES / "gpt-oss.gguf").save_pretrained(tmp_path / "wide")
    to_gguf(tmp_path / "wide", tmp_path / "m.gguf")
    entries = GgufSource.open(tmp_path / "m.gguf").entries
    assert {entries[f"blk.0.ffn_{part}_exps.weight"].type.name for part in ("gate", "up", "down")} == {"MXFP4"}
    assert {entries[f"blk.0.ffn_{part}_exps.bias"].type.name for part in ("gate", "up", "down")} == {"F32"}
    again = load(tmp_path / "m.gguf", dtype="float32")
    for name, value in floats.items():
        experts, _, leaf = name.rpartition(".")
        assert torch.equal(again.get_submodule(experts).dequantize(torch.float32)[leaf], value)
    assert torch.equal(logits(again), logits(model))


def change(name: str, shape: slice | None) -> Any:
    def apply(tensors: Tensors) -> None:
        kind, tensor = tensors.pop(name)
        if shape is not None:
            tensors[name] = (kind, tensor[shape].contiguous())

    return apply


@pytest.mark.parametrize(
    ("name", "meta", "changed", "message"),
    [
        ("deepseek2", {}, change("blk.0.attn_v_b.weight", None), r"kv_b_proj\.weight needs 2 tensors such as blk\.0\.attn_k_b"),
        ("deepseek2", {}, change("blk.1.attn_k_b.weight", slice(0, 3)), r"must be \[4, L, 32\] and \[4, 32, L\]"),
        ("deepseek2", {"deepseek2.expert_weights_norm": MetaValue("bool", True)}, None, "has a router that no model"),
        ("deepseek2", {"deepseek2.nextn_predict_layers": number(1)}, None, "layers that predict further tokens"),
        ("deepseek2", {"deepseek2.rope.dimension_count": number(40)}, None, "leaves none of keys"),
        ("deepseek3", {"deepseek2.rope.scaling.yarn_log_multiplier": None}, None, "yarn_log_multiplier must be a positive"),
        ("deepseek3", {"deepseek2.expert_gating_func": number(4)}, None, "expert_gating_func 4"),
        ("gpt-oss", {}, change("blk.0.ffn_up_exps.bias", None), r"gate_up_proj_bias needs 2 tensors"),
        ("gpt-oss", {}, change("blk.0.ffn_up_exps.bias", slice(0, 3)), "must be of one shape"),
        ("gpt-oss", {}, change("blk.1.attn_sinks.weight", None), r"layers\.1\.self_attn\.sinks"),
    ],
)  # fmt: skip
def test_what_is_missing_or_unknown_is_an_error(
    name: str, meta: dict[str, MetaValue | None], changed: Any, message: str, tmp_path: Path
) -> None:
    path = rewritten(name, tmp_path / "m.gguf", meta, changed)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_latents_that_become_floats_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(FILES / "deepseek3.gguf")
    assert (
        "keys and values of latent attention, apart in the file and one matrix in the model, are dequantized"
        in caplog.text
    )


def test_attention_that_files_cannot_say_is_refused(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    source = directory(tmp_path / "hf", "deepseek_v3", rope_parameters=yarn)
    with pytest.raises(ConversionError, match="which a model without mscale_all_dim does not"):
        to_gguf(source, tmp_path / "m.gguf", "F16")
