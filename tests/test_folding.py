"""AWQ and SmoothQuant on models that the table knows, and on others: what is scaled, and what the report says."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import AWQ, GPTQ, RTN, SmoothQuant, load
from qkernels.calibrate import preview
from qkernels.errors import ArgumentError
from qkernels.layerwise import quantizing
from qkernels.layerwise.folds import Folds
from qkernels.layerwise.work import work_path
from qkernels.models.architectures import find_architecture
from qkernels.quantizers import Options
from tests.tiny_models import KINDS, divergence, loud_model, run

transformers = pytest.importorskip("transformers")

METHODS: dict[str, Options] = {"awq": AWQ(4, 16, grid=4), "smoothquant": SmoothQuant(4, 16, act=None)}
NOTHING_FOLDS = {
    "apply_residual_connection_post_layernorm": True
}  # of BLOOM: its norms feed the residual, q, k, v are one
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": KINDS * 2}  # of Gemma 4: keys and values

# with the linear layers that take no scale, by the end of their names
NEW: list[tuple[str, dict[str, Any], set[str]]] = [
    ("qwen3_5_text", {}, set()),
    ("cohere2", {}, set()),
    ("deepseek_v3", {}, {"self_attn.o_proj", "mlp.experts.down_proj"}),
    ("nemotron", {}, {"mlp.down_proj"}),
    ("gemma4_text", SHARED, {"self_attn.o_proj", "per_layer_input_gate", "per_layer_projection"}),
    ("stablelm", {}, set()),  # not in the table
]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("model_type", "changes", "unscaled"), NEW, ids=[model_type for model_type, *_ in NEW])
def test_architectures_with_and_without_an_entry(
    name: str, model_type: str, changes: dict[str, Any], unscaled: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What is not scaled has its reason, what the table expects comes true, and the model is about as good as with weights that
    were rounded, which one with a wrong fold is not."""
    model = loud_model(model_type, **changes)
    reference, rounded = copy.deepcopy(model), copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, quantizing.log.name):
        report = run(model, METHODS[name])
    assert not [record for record in caplog.records if "takes no scale" in record.getMessage()]
    assert not [module for module in report.fallbacks if ".layers." in module]
    ends = {module: next((end for end in unscaled if module.endswith(end)), module) for module in report.unscaled}
    assert set(ends.values()) == unscaled
    run(rounded, RTN(4, 16, symmetric=name != "awq"))
    assert 0 < divergence(model, reference) < 2 * divergence(rounded, reference)


def llava() -> Any:
    """A Llama behind a vision tower."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=63, image_seq_length=4)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_5_text", "llava"])
def test_a_directory_gives_the_same_as_memory(model_type: str, tmp_path: Path) -> None:
    """Bit for bit, layers of several kinds, experts in 16 bits and a vision tower that is rounded to nearest included."""
    original = llava() if model_type == "llava" else loud_model(model_type)
    original.save_pretrained(tmp_path / "source")
    report = run(tmp_path / "source", METHODS["awq"], save_to=tmp_path / "out")
    calibrated = {module.name for module in report.modules} - report.fallbacks.keys()
    assert calibrated and all(".vision_tower." not in name for name in calibrated)
    assert len(report.unscaled) < len(calibrated)
    model = type(original).from_pretrained(tmp_path / "source")
    run(model, METHODS["awq"])
    expected, got = model.state_dict(), load(tmp_path / "out", on_unsupported="reference").state_dict()
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


def test_the_report_says_what_is_not_scaled_and_why() -> None:
    report = run(loud_model("phi3"), METHODS["awq"])
    reasons = {
        "self_attn.o_proj": "self_attn.qkv_proj: what it puts out reaches self_attn.o_proj through more than a scale per channel",
        "mlp.down_proj": "mlp.gate_up_proj: what it puts out reaches mlp.down_proj through more than a scale per channel",
    }
    assert report.unscaled == {f"model.layers.{i}.{leaf}": why for i in (0, 1) for leaf, why in reasons.items()}
    lines = report.to_markdown().splitlines()
    assert f"- model.layers.*.mlp.down_proj (2): its inputs are not scaled: {reasons['mlp.down_proj']}" in lines
    assert report.to_json()["modules"][0]["unscaled"] == reasons["self_attn.o_proj"]
    assert not run(loud_model(), METHODS["awq"]).unscaled
    assert not run(loud_model("phi3"), GPTQ(4, 16)).unscaled


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_where_nothing_takes_a_scale_it_is_said_before_the_work(where: str, tmp_path: Path) -> None:
    model = loud_model("bloom", **NOTHING_FOLDS)
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "source")
    message = (
        r"AWQ folds scales into the norms and linear layers before, and no block of BloomForCausalLM lets one through "
        r"\(input_layernorm: what it puts out reaches mlp.dense_h_to_4h through more than a scale per channel; .*\); "
        r"use GPTQ without scales, or RTN"
    )
    with pytest.raises(ArgumentError, match=message):
        run(model if where == "memory" else tmp_path / "source", METHODS["awq"], save_to=tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "out").exists() and not work_path(tmp_path / "out").exists()
    assert len(run(model, GPTQ(4, 16)).modules) == 8


def test_a_layer_that_takes_none_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers of the first kind take no scale, those of other kinds are asked; one that cannot be run before its turn, since
    it reads keys and values of others, is given its turn."""
    trace = quantizing.find_folds
    asked = []

    def blind(layer: Any, inputs: Any, place: Any, name: str) -> Folds:
        asked.append(name)
        found = trace(layer, inputs, place, name)
        return Folds() if name.endswith(("layers.0", "layers.1")) else found

    monkeypatch.setattr(quantizing, "find_folds", blind)
    report = run(loud_model("gemma4_text", **SHARED), METHODS["awq"])
    layers = [f"model.layers.{i}" for i in range(4)]
    assert asked == [layers[0], layers[2], *layers]
    unscaled = {name for name in report.unscaled if name.endswith("up_proj")}
    assert unscaled == {f"{name}.mlp.up_proj" for name in layers[:2]}


def test_a_fold_of_the_table_that_does_not_come_true_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A model of a known type that somebody changed: what the norm puts out goes round the MLP as well."""
    model = loud_model()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x
    reference = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, quantizing.log.name):
        report = run(model, METHODS["awq"])
    reason = "something that is no linear layer reads it, too"
    fold = "post_attention_layernorm takes no scale for mlp.gate_proj, mlp.up_proj"
    assert [record.getMessage() for record in caplog.records] == [f"model.layers.1: {fold}: {reason}"]
    assert report.unscaled == {
        f"model.layers.1.mlp.{name}_proj": f"post_attention_layernorm: {reason}" for name in ("gate", "up")
    }
    assert divergence(model, reference) < 0.1


def test_encoders_and_decoders_are_scaled() -> None:
    """Cross attention and the position bias that T5's first block makes for the others included."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    report = run(transformers.T5ForConditionalGeneration(config).eval(), METHODS["awq"])
    scaled = {module.name for module in report.modules} - report.unscaled.keys() - report.fallbacks.keys()
    assert {
        "encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wi",
        "encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.1.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.0.SelfAttention.o",
    } <= scaled  # fmt: skip
    assert {name for name in report.unscaled if "decoder" not in name} == set()
    assert all(".EncDecAttention." in name for name in report.unscaled)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        (
            "cohere2",
            "expected of cohere2, and proved on each layer when it is at hand: input_layernorm -> self_attn.q_proj, ",
        ),
        (
            "stablelm",
            "nothing is known of stablelm: what takes a scale is found and proved on each layer when it is at hand",
        ),
    ],
)
def test_a_dry_run_says_what_is_known(model_type: str, said: str, tmp_path: Path) -> None:
    loud_model(model_type).save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"seq_len": 16, "on_unsupported": "reference"}
    previewed = preview(tmp_path / "source", METHODS["awq"], **options)
    assert previewed.scales is not None and previewed.scales.startswith(said)
    assert f"- scales: {said}" in previewed.to_markdown()
    assert preview(tmp_path / "source", GPTQ(4, 16), **options).scales is None
    assert (find_architecture(model_type) is None) == said.startswith("nothing")
