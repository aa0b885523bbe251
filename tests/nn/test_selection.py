"""`select_linears`: one answer to which layers, which scheme and why not the others, whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qkernels import RTN, load, quantize, replace_linear, save
from qkernels.calibrate import preview
from qkernels.errors import ArgumentError, ConversionError, SchemeError, UnsupportedProblem
from qkernels.nn import ReplaceReport, Selection, select_linears
from qkernels.nn.selection import A_HEAD, as_patterns, first_match, heads, matches
from tests.tiny_models import tiny_model

OPTIONS: dict[str, Any] = {
    "include": ["model.layers.*", "lm_head"],
    "exclude": "*.1.mlp.*",
    "overrides": {"*.down_proj": "w8a16_g16", "*.0.*": "w3a16_g16", "down_proj": "w4a16_channel"},
}
SCHEME = "w4a16_g16"


def schemes(selection: Selection) -> dict[str, str]:
    return {name: str(scheme) for name, scheme in selection.chosen.items()}


def test_everybody_chooses_alike(tmp_path: Path) -> None:
    """`replace_linear`, `quantize` in memory and from a directory, its preview, and the plug-in while it loads."""
    transformers = pytest.importorskip("transformers")
    from qkernels.integrations.transformers import QKernelsConfig

    tiny_model("llama").save_pretrained(tmp_path / "source")
    selection = select_linears(tiny_model("llama"), SCHEME, **OPTIONS)
    chosen, skipped = schemes(selection), selection.skipped
    assert chosen["model.layers.0.mlp.down_proj"] == "w8a16_g16"
    assert chosen["model.layers.0.mlp.up_proj"] == "w3a16_g16"
    assert chosen["model.layers.1.self_attn.q_proj"] == SCHEME
    assert len(chosen) == 7 + 4 + 1
    assert skipped == {f"model.layers.1.mlp.{leaf}_proj": "excluded" for leaf in ("gate", "up", "down")}

    replaced = replace_linear(tiny_model("llama"), SCHEME, **OPTIONS, progress=False)
    in_memory = quantize(tiny_model("llama"), RTN(4, 16), **OPTIONS, progress=False)
    streamed = quantize(tmp_path / "source", RTN(4, 16), save_to=tmp_path / "out", **OPTIONS, progress=False)
    previewed = preview(tmp_path / "source", RTN(4, 16), **OPTIONS)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=QKernelsConfig(SCHEME, **OPTIONS)
    ).hf_quantizer.report
    for report in (in_memory, streamed, previewed):
        assert {module.name: module.scheme for module in report.modules} == chosen
        assert report.skipped == skipped
    for report in (replaced, loaded):
        assert {name: str(layer.scheme) for name, layer in report.replaced.items()} == chosen
        assert report.skipped == skipped


class Tied(nn.Module):
    """As transformers has it while a model loads: two parameters on meta that a table says will be one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64, device=device)
        self.body = nn.Linear(64, 64, device=device)
        self.head = nn.Linear(64, 50, bias=False, device=device)
        self.all_tied_weights_keys = {"head.weight": "embedding.weight"}


def test_weights_that_will_be_tied_are_left() -> None:
    """On meta the table is all there is; of weights that are there, only those that are one."""
    on_meta = select_linears(Tied("meta"), "w4a16_g32")
    assert on_meta.skipped == {"head": "its weight is tied to another module's"}
    assert list(on_meta.chosen) == ["body"]
    apart, shared = Tied("cpu"), Tied("cpu")
    assert list(select_linears(apart, "w4a16_g32").chosen) == ["body", "head"]
    shared.head.weight = shared.embedding.weight
    assert select_linears(shared, "w4a16_g32").skipped == {"head": "its weight is shared with embedding"}


def test_a_layer_without_a_kernel() -> None:
    """Asked only where a kernel is wanted."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(60, 64))
    rules = {"1": "w4a16_g12"}
    assert list(select_linears(model, "w4a16_g32", overrides=rules).chosen) == ["0", "1"]
    assert list(select_linears(model, "w4a16_g32", overrides=rules, on_unsupported="reference").chosen) == ["0", "1"]
    skipping = select_linears(model, "w4a16_g32", overrides=rules, on_unsupported="skip")
    assert list(skipping.chosen) == ["0"]
    assert "group_size 12 is not a multiple of 8" in skipping.skipped["1"]
    with pytest.raises(UnsupportedProblem, match=r"^1: no kernel for w4a16_g12"):
        select_linears(model, "w4a16_g32", overrides=rules, on_unsupported="raise")


def test_nothing_left_to_quantize_is_said_before_the_work(tmp_path: Path) -> None:
    """Also where "skip" has left every layer."""
    model = nn.Sequential(nn.Linear(60, 64))
    with pytest.raises(ArgumentError, match="(?s)no linear layer to quantize:.*skipped 0: no kernel for w4a16_g12"):
        quantize(model, RTN(4, 12), on_unsupported="skip", save_to=tmp_path / "out", progress=False)
    with pytest.raises(ArgumentError, match="(?s)found no layer to replace:.*skipped 0: no kernel for w4a16_g12"):
        replace_linear(model, "w4a16_g12", on_unsupported="skip", progress=False)
    assert not (tmp_path / "out").exists()
    assert isinstance(model[0], nn.Linear)


def test_an_existing_target_is_refused_before_a_model_in_memory_changes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="out exists and is not empty"):
        quantize(model, RTN(4, 16), save_to=tmp_path / "out", progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("options", [{"include": "router"}, {"overrides": {"*.experts": "w8a16_g32"}}])
def test_a_pattern_must_mean_a_linear_layer(options: dict[str, Any]) -> None:
    """A router that is no linear layer is in no pattern's reach, for nothing would come of it."""
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "router": nn.ParameterDict({"weight": torch.ones(4, 64)})})
    assert select_linears(model, "w4a16_g32").skipped == {
        "router.weight": "a matrix ([4, 64], 1,024 bytes) of ParameterDict, which is not an nn.Linear"
    }
    with pytest.raises(ArgumentError, match="matches no linear layer; names look like body"):
        select_linears(model, "w4a16_g32", **options)
    with pytest.raises(SchemeError, match="a scheme looks like"):
        select_linears(model, "int4")


def test_patterns() -> None:
    assert as_patterns(None) is None
    assert as_patterns("a") == ("a",)
    assert as_patterns(["a", "b"]) == ("a", "b")
    assert matches("model.layers.0.up_proj", "up_proj")
    assert matches("model.layers.0.up_proj", "model.*")
    assert not matches("model.layers.0.up_proj", "layers.*")
    assert first_match("a.b", {"b": 1, "a.*": 2}, 3) == 1
    assert first_match("a.c", {"b": 1, "a.*": 2}, 3) == 2
    assert first_match("x", {"b": 1, "a.*": 2}, 3) == 3


def test_the_report_of_a_selection_has_its_reasons() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    selection = select_linears(model, "w4a16_g32", exclude="1")
    report = ReplaceReport.of(selection, model)
    assert (report.replaced, report.skipped) == ({}, {"1": "excluded"})
    assert report.bytes_before == 2 * (64 * 64 + 64) * 4


@pytest.mark.parametrize(
    ("name", "fields", "found"),
    [
        ("LlamaForCausalLM", {}, {"lm_head"}),
        ("LlamaForSequenceClassification", {}, {"score"}),
        ("GPTNeoXForCausalLM", {}, {"lm_head"}),
        ("LlamaModel", {}, set()),
        ("BertForMaskedLM", {}, {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        ("BertForQuestionAnswering", {}, {"qa_outputs"}),
        ("RobertaForSequenceClassification", {}, {"classifier.dense", "classifier.out_proj"}),
        ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}, {"lm_head"}),
    ],
)  # fmt: skip
def test_heads_are_left_alone_unless_they_are_named(name: str, fields: dict[str, int], found: set[str]) -> None:
    import transformers

    sizes = fields or {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(vocab_size=64, tie_word_embeddings=False, **sizes))
    assert heads(model) == found
    selection = select_linears(model, "w4a16_g32")
    assert {name for name, why in selection.skipped.items() if why == A_HEAD} == found
    assert selection.chosen and not found & selection.chosen.keys()
    every = select_linears(model, "w4a16_g32", exclude=())
    tied = {name for name in found if "shared" in every.skipped.get(name, "")}  # T5's is, whatever its config says
    assert tied == (found if name.startswith("T5") else set()) and found - tied <= every.chosen.keys()
    if found - tied:
        assert select_linears(model, "w4a16_g32", include=sorted(found)).chosen.keys() == found


def test_heads_of_other_models() -> None:
    """Without a base to tell, heads have usual names; a model that is nothing but a head has none."""
    body, head = nn.Linear(32, 32), nn.Linear(32, 8)
    assert heads(nn.ModuleDict({"body": body, "embed_out": head})) == {"embed_out"}
    only = nn.ModuleDict({"out": head})
    only.base_model = nn.Identity()
    assert heads(only) == set()
    assert "body" in select_linears(nn.ModuleDict({"body": body, "score": head}), "w4a16_g32").chosen


def test_weights_that_a_model_scales_in_place_stay_and_are_not_saved_scaled(tmp_path: Path) -> None:
    """RWKV divides some weights of block i by 2^(i // rescale_every) before its first pass."""
    import transformers

    config = transformers.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, rescale_every=1)
    model = transformers.RwkvForCausalLM(config).eval()
    report = replace_linear(model, "w8a16_g32", progress=False)
    reason = "RwkvModel scales its weight in place when it first runs"
    scaled = ("attention.output", "feed_forward.value")
    assert {name for name, why in report.skipped.items() if why == reason} == {
        f"rwkv.blocks.{index}.{leaf}" for index in range(2) for leaf in scaled
    }
    save(model, tmp_path / "before")
    logits = model(torch.arange(8)[None])[0]
    assert torch.equal(load(tmp_path / "before")(torch.arange(8)[None])[0], logits)
    with pytest.raises(ConversionError, match=r"rwkv\.blocks\.1\.attention\.output was scaled in place .*model\.train"):
        save(model, tmp_path / "after")
    with pytest.raises(ConversionError, match="was scaled in place"):
        model.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()
    model.train()(torch.arange(8)[None])
    save(model, tmp_path / "after")
    assert torch.equal(load(tmp_path / "after")(torch.arange(8)[None])[0], logits)
