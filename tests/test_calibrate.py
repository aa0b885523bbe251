"""`quantize` end to end on tiny random models: in memory and streamed, all methods, error propagation, every refusal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels import AWQ, GPTQ, HQQ, NF4, RTN, QuantLinear, SmoothQuant, load
from qkernels.calibrate import preview
from qkernels.errors import (
    ArgumentError,
    CalibrationError,
    CheckpointError,
    ConversionError,
    SchemeError,
    UnsupportedProblem,
)
from qkernels.layerwise.running import (
    Call,
    LayerInputs,
    Place,
    collect_statistics,
    input_groups,
    propagate,
    run_layer,
)
from qkernels.models.architectures import decoder_layers
from qkernels.nn.selection import A_HEAD
from qkernels.quantizers import InputStatistics
from tests.tiny_models import VOCABULARY, divergence, first_inputs, loud_model, run, tiny_model, token_windows

transformers = pytest.importorskip("transformers")

METHODS = {
    "rtn": RTN(4, 16),
    "gptq": GPTQ(4, 16, act_order="group"),
    "gptq static": GPTQ(3, 16, symmetric=False, act_order="static", clip="mse"),
    "gptq scaled": GPTQ(4, 16, symmetric=False, scales="awq"),
    "awq": AWQ(4, 16, grid=4),
    "hqq": HQQ(3, 16),
    "nf4": NF4(group_size=16, double_quant=True),
    "smoothquant": SmoothQuant(act=None),
    "awq symmetric": AWQ(3, 16, symmetric=True, grid=4, duo_scaling=False),
}
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_LINEARS = (*ATTENTION_INPUTS, "self_attn.o_proj", *MLP_INPUTS, "mlp.down_proj")


@pytest.mark.parametrize("name", METHODS)
def test_in_memory(name: str) -> None:
    model = loud_model()
    reference = copy.deepcopy(model)
    report = run(model, METHODS[name])
    replaced = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(replaced) == {f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in LLAMA_LINEARS}
    assert [m.name for m in report.modules] == list(replaced)
    assert report.skipped == {"lm_head": A_HEAD}
    assert not report.fallbacks
    for module in report.modules:
        assert module.scheme == str(METHODS[name].scheme) == str(replaced[module.name].scheme)
        assert module.method == METHODS[name].name
        assert 0 < module.error < 0.7
        assert module.error_of == ("weight" if name in ("rtn", "hqq", "nf4") else "output")
        assert module.bytes_after == replaced[module.name].quant_tensor().nbytes < module.bytes_before
    assert report.bytes_before - report.bytes_after == sum(m.bytes_before - m.bytes_after for m in report.modules)
    assert 0 < divergence(model, reference) < 0.1
    assert not model.training
    assert all(not hasattr(m, "forward") or "forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("model_type", "dtype"), [("qwen2", torch.float32), ("qwen2", torch.bfloat16), ("gpt2", torch.float32)]
)
def test_a_directory_gives_the_same_as_memory(name: str, model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, float tensors included: AWQ's folded norms and biases are written too. GPT-2's matrices lie transposed."""
    loud_model(model_type).to(dtype).save_pretrained(tmp_path / "source")
    run(tmp_path / "source", METHODS[name], save_to=tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    run(model, METHODS[name])
    streamed = load(tmp_path / "out", on_unsupported="reference")
    expected, got = model.state_dict(), streamed.state_dict()
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert value.dtype == got[key].dtype, key
        assert torch.equal(value, got[key]), key


@pytest.mark.parametrize(
    ("format", "method"), [("native", RTN(3, 16)), ("gptq", GPTQ(4, 16)), ("awq", AWQ(4, 16, grid=2))]
)
def test_formats_load_again(format: str, method: Any, tmp_path: Path) -> None:
    model = loud_model()
    model.save_pretrained(tmp_path / "source")
    report = run(tmp_path / "source", method, save_to=tmp_path / "out", format=format)
    loaded = load(tmp_path / "out", on_unsupported="reference")
    assert divergence(loaded, model) < 0.1
    assert loaded.model.layers[1].mlp.up_proj.quant_tensor().nbytes == report.modules[-2].bytes_after


def test_in_memory_with_save_to(tmp_path: Path) -> None:
    model = loud_model()
    run(model, GPTQ(4, 16), save_to=tmp_path / "out", format="gptq")
    loaded = load(tmp_path / "out", on_unsupported="reference")
    ids = token_windows(2)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "opt", "phi", "phi3", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_other_architectures(model_type: str, name: str) -> None:
    model = tiny_model(model_type)
    reference = copy.deepcopy(model)
    report = run(model, METHODS[name])
    assert len(report.modules) % 2 == 0
    assert not report.fallbacks
    assert 0 < divergence(model, reference) < 0.1


def test_gptq_needs_no_table() -> None:
    assert len(run(loud_model("stablelm"), GPTQ(4, 16)).modules) == 14


def test_calibrated_methods_beat_rounding() -> None:
    reference = loud_model()
    losses = {}
    methods = {
        "rtn": RTN(3, 16),
        "gptq": GPTQ(3, 16),
        "awq": AWQ(3, 16, symmetric=True),
        "both": GPTQ(3, 16, scales="awq"),
    }
    for label, method in methods.items():
        model = copy.deepcopy(reference)
        run(model, method, calibration=token_windows(64))
        losses[label] = divergence(model, reference)
    assert losses["gptq"] < losses["rtn"]
    assert losses["awq"] < losses["rtn"]
    assert losses["both"] < losses["awq"]  # trained models: docs/decisions/0032


def test_layers_are_calibrated_on_what_quantized_ones_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's statistics are those of a model whose first layer is quantized; the float model's differ."""
    seen: dict[str, Tensor] = {}
    hessian = InputStatistics.hessian

    def watched(statistics: InputStatistics, name: str = "") -> Tensor:
        seen[name] = hessian(statistics, name)
        return seen[name]

    model = loud_model()
    original = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(InputStatistics, "hessian", watched)
        run(model, GPTQ(3, 16))
    used = seen["model.layers.1.self_attn.q_proj"]

    def moments(first_layers_of: Any) -> Tensor:
        place = Place(torch.device("cpu"))
        _, layers = decoder_layers(original)
        chain = first_inputs(original, token_windows())
        calls = list(chain.calls.values())
        with torch.no_grad():
            first = list(run_layer(first_layers_of.model.layers[0], LayerInputs(chain.hidden, calls[0]), place))
            after = LayerInputs(first, calls[1])
            return collect_statistics(layers[1], ["self_attn.q_proj"], after, place)["self_attn.q_proj"].hessian()

    float_moments = moments(original)
    close = dict(rtol=0, atol=1e-4 * float(float_moments.max()))
    torch.testing.assert_close(used, moments(model), **close)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(used, float_moments, **close)


def test_input_groups_are_the_readers_of_one_tensor() -> None:
    model = loud_model()
    _, layers = decoder_layers(model)
    chain = first_inputs(model, token_windows())
    inputs = LayerInputs(chain.hidden, chain.calls["model.layers.0"])
    with torch.no_grad():
        groups = input_groups(layers[0], LLAMA_LINEARS, inputs, Place(torch.device("cpu")))
    assert groups == [list(ATTENTION_INPUTS), ["self_attn.o_proj"], list(MLP_INPUTS), ["mlp.down_proj"]]


def test_overrides_include_and_exclude() -> None:
    model = loud_model()
    report = run(
        model,
        GPTQ(4, 16),
        include=["model.layers.*"],
        exclude=["*.layers.1.mlp.*", "k_proj"],
        overrides={"*.down_proj": "w8a16_g8", "q_proj": "w3a16_channel_asym"},
    )
    schemes = {module.name.removeprefix("model.layers."): module.scheme for module in report.modules}
    assert schemes["0.mlp.down_proj"] == "w8a16_g8"
    assert schemes["1.self_attn.q_proj"] == "w3a16_channel_asym"
    assert schemes["0.mlp.up_proj"] == "w4a16_g16"
    assert len(schemes) == 14 - 2 - 3
    assert report.skipped["lm_head"] == "not in include"
    assert report.skipped["model.layers.1.mlp.up_proj"] == "excluded"
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)


def test_awq_scales_a_float_layer_along_with_its_quantized_siblings() -> None:
    """k is left out, reads the same scaled input, and must still compute what it did."""
    model = loud_model()
    before = copy.deepcopy(model)
    run(model, AWQ(8, "channel", grid=4), exclude=["lm_head", "k_proj"])
    assert not torch.equal(
        model.model.layers[0].self_attn.k_proj.weight, before.model.layers[0].self_attn.k_proj.weight
    )
    assert divergence(model, before) < 1e-4


def test_the_head_is_rounded_and_the_report_says_so() -> None:
    model = loud_model(tie_word_embeddings=False)
    report = run(model, GPTQ(4, 16), exclude=())
    assert isinstance(model.lm_head, QuantLinear)
    assert report.fallbacks == {"lm_head": "it is not in a decoder layer, and only those are calibrated"}


def test_a_failing_factorization_falls_back_and_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Fewer tokens than channels make the Hessian singular, and such a small damping does not change that."""
    model = loud_model()
    report = run(model, GPTQ(4, 16, damping=1e-12), calibration=token_windows(1, 8))
    assert report.fallbacks
    name, reason = next(iter(report.fallbacks.items()))
    assert f"the Hessian of {name}.weight is not positive definite" in reason
    assert f"{name} is rounded to nearest: the Hessian" in caplog.text
    assert f"- {name} was rounded to nearest: the Hessian" in report.to_markdown()
    assert {m.method for m in report.modules if m.fallback} == {"rtn"}


def test_report_is_json_and_markdown() -> None:
    report = run(loud_model(), RTN(4, 16))
    assert json.loads(json.dumps(report.to_json())) == report.to_json()
    lines = report.to_markdown().splitlines()
    assert lines[0].startswith("rtn w4a16_g16: 14 layers quantized in ")
    assert lines[2].startswith("| module ")
    assert len(lines) == 2 + 2 + 14 + 1
    assert lines[-1] == "- lm_head was skipped: " + A_HEAD


def test_plan_says_what_quantize_does(tmp_path: Path) -> None:
    loud_model().save_pretrained(tmp_path / "source")
    for method in (RTN(4, 16), GPTQ(4, 16), AWQ(4, 16)):
        planned = preview(tmp_path / "source", method, overrides={"*.down_proj": "w8a16_g8"}, samples=24, seq_len=16)
        report = run(tmp_path / "source", method, save_to=tmp_path / method.name, overrides={"*.down_proj": "w8a16_g8"})
        assert [(m.name, m.scheme, m.bytes_before) for m in planned.modules] == [
            (m.name, m.scheme, m.bytes_before) for m in report.modules
        ]
        # planned for a permuted group_index everywhere; an order that comes out natural needs none
        assert planned.bytes_after >= report.bytes_after
        assert planned.skipped == report.skipped
        assert planned.host_bytes == (0 if method.name == "rtn" else 24 * 16 * 32 * 4)
        assert "down_proj" in planned.to_markdown()
        assert json.dumps(planned.to_json())


def test_texts_are_tokenized_joined_and_cut() -> None:
    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    report = run(loud_model(), GPTQ(4, 16), calibration=["some text of " * 9, "more " * 8], tokenizer=tokenizer)
    assert (report.calibration_windows, report.seq_len) == ((9 * 13 + 8 * 5) // 16, 16)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "this method needs calibration: give a list of texts, of chats"),
        ([], "this method needs calibration"),
        ("text", "got one string: put it into a list"),
        (["text"], "calibration texts need a tokenizer: pass tokenizer="),
        (
            [[1, 2, 3], [4, 5]],
            "calibration has 5 tokens, less than one window of seq_len=16; give more text or a smaller seq_len",
        ),
        ([[1, 2.5]], r"got an item \[1, 2.5\]"),
        ([{"pixel_values": [1]}], "got an item {'pixel_values'"),
        (torch.zeros(4), r"got a torch.float32 tensor of shape \[4\]"),
        (torch.full((2, 16), VOCABULARY), r"token ids must be 0 … 63, got 64; is it another tokenizer's\?"),
        (torch.full((2, 16), -1), r"token ids must be 0 … 63, got -1"),
    ],
)
def test_calibration_that_cannot_be_used(calibration: Any, message: str) -> None:
    for method in (GPTQ(4, 16), AWQ(4, 16)):
        with pytest.raises(CalibrationError, match=message):
            run(loud_model(), method, calibration=calibration)


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("samples", True), ("seq_len", 0), ("seq_len", 1.5)])
def test_window_counts_that_are_none(option: str, value: Any) -> None:
    with pytest.raises(CalibrationError, match=f"{option} must be a positive integer, got {value}"):
        run(loud_model(), GPTQ(4, 16), **{option: value})


def test_windows_are_capped_to_the_models_positions_and_taken_evenly() -> None:
    report = run(loud_model(), GPTQ(4, 16), calibration=[list(range(60)) * 10, [1]], seq_len=1000, samples=3)
    assert (report.calibration_windows, report.seq_len) == (3, 64)


@pytest.mark.parametrize("where", ["embedding", "layer"])
def test_nan_activations_are_located(where: str) -> None:
    model = loud_model()
    with torch.no_grad():
        if where == "embedding":
            model.model.embed_tokens.weight[5] = float("nan")
        else:
            model.model.layers[0].input_layernorm.weight[5] = float("inf")
    expected = {
        "embedding": r"the embedding has \d+ NaN or infinite activations in calibration batch 0, computed in float32",
        "layer": r"inputs of model\.layers\.0\.self_attn\.q_proj are NaN or infinite during calibration",
    }
    with pytest.raises(CalibrationError, match=expected[where]):
        run(model, GPTQ(4, 16))


def test_a_residual_beyond_float16_is_kept_in_float32(tmp_path: Path) -> None:
    """Layers are computed in fp32, and what goes from one to the next may be larger than the checkpoint's dtype can say."""
    model = loud_model().half()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 2000
        model.model.layers[0].mlp.up_proj.weight *= 20000
    model.save_pretrained(tmp_path / "source")
    full = copy.deepcopy(model).float()
    with torch.no_grad():
        last = full(input_ids=token_windows(), output_hidden_states=True).hidden_states[-2]
    assert float(last.abs().max()) > 65504 * 10
    report = run(tmp_path / "source", GPTQ(8, 16), save_to=tmp_path / "out")
    assert not report.fallbacks
    loaded = load(tmp_path / "out", dtype=torch.float32, on_unsupported="reference")
    assert divergence(loaded, full) < 1e-3


def test_a_layer_that_overflows_is_named() -> None:
    """Nothing is wrong with any linear's input, only with the layer's output."""

    class Overflowing(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            return (hidden_states * 1e38 * 1e38,)

    inputs = LayerInputs([torch.ones(2, 3, 4, dtype=torch.float16)], [Call((), {})])
    with pytest.raises(
        CalibrationError,
        match=r"the output of model\.layers\.0 has 24 NaN or infinite activations in calibration batch 0, computed in float32",
    ):
        propagate(Overflowing(), inputs, Place(torch.device("cpu")), "model.layers.0")


@pytest.mark.parametrize("method", [RTN(4, 16), GPTQ(4, 16), AWQ(4, 16)])
def test_a_weight_that_is_not_finite_is_named(method: Any) -> None:
    model = loud_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        ArgumentError, match=r"model\.layers\.0\.mlp\.down_proj\.weight \[32, 48\] has 1 NaN or infinite entries"
    ):
        run(model, method)


def test_refusals_before_the_work_begins(tmp_path: Path) -> None:
    model = loud_model()
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ArgumentError, match=r"method must be RTN.*GPTQ.*AWQ.* or SmoothQuant.*, got 'gptq'"):
        run(model, "gptq")
    with pytest.raises(ArgumentError, match=r"pattern '\*\.wo' matches no linear layer"):
        run(model, GPTQ(4, 16), overrides={"*.wo": "w8a16_g16"})
    with pytest.raises(SchemeError, match=r"a scheme looks like .*, got 'int8'"):
        run(model, GPTQ(4, 16), overrides={"*.down_proj": "int8"})
    with pytest.raises(ArgumentError, match="there is no linear layer to quantize"):
        run(model, GPTQ(4, 16), exclude=["*"])
    with pytest.raises(UnsupportedProblem, match=r"model\.layers\.0\.self_attn\.q_proj: no kernel for w3a16_g5"):
        run(model, RTN(3, 5), on_unsupported="raise")
    with pytest.raises(ArgumentError, match="needs save_to=, the directory to make"):
        run(tmp_path / "source", GPTQ(4, 16))
    with pytest.raises(ArgumentError, match="format must be one of native"):
        run(tmp_path / "source", GPTQ(4, 16), save_to=tmp_path / "out", format="gguf")
    with pytest.raises(ConversionError, match="awq cannot store this weight: columns are in act-order"):
        run(tmp_path / "source", GPTQ(4, 16), save_to=tmp_path / "out", format="awq")
    with pytest.raises(CalibrationError, match=r"calibration texts need a tokenizer, and .*source has none"):
        run(tmp_path / "source", GPTQ(4, 16), save_to=tmp_path / "out", calibration=["text"])
    with pytest.raises(CheckpointError, match="nowhere does not exist; a checkpoint is"):
        run(tmp_path / "nowhere", GPTQ(4, 16), save_to=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    run(tmp_path / "source", RTN(4, 16), save_to=tmp_path / "done")
    with pytest.raises(ArgumentError, match="done is quantized already"):
        run(tmp_path / "done", RTN(4, 16), save_to=tmp_path / "out")
    with pytest.raises(CheckpointError, match="done exists and is not empty"):
        run(tmp_path / "source", RTN(4, 16), save_to=tmp_path / "done")
    run(tmp_path / "source", RTN(3, 16), save_to=tmp_path / "done", overwrite=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "intermediate_size",
            64,
            r"gate_proj\.weight: the model that config\.json describes needs \[64, 32\], got \[48, 32\]",
        ),
        (
            "num_hidden_layers",
            3,
            r"does not fit LlamaForCausalLM: 9 tensors it needs are missing, .* model\.layers\.2\.",
        ),
        ("num_hidden_layers", 1, r"does not fit LlamaForCausalLM: 9 tensors are unknown to it, .* model\.layers\.1\."),
    ],
)
def test_a_config_that_contradicts_the_tensors(field: str, value: int, message: str, tmp_path: Path) -> None:
    """Before anything is written, and in the preview already."""
    loud_model().save_pretrained(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        preview(tmp_path / "source", RTN(4, 16))
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "source", RTN(4, 16), save_to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_leaves_no_directory(tmp_path: Path) -> None:
    model = loud_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ArgumentError, match=r"layers\.1\.mlp\.up_proj"):
        run(tmp_path / "source", GPTQ(4, 16), save_to=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_skip_leaves_layers_without_a_kernel() -> None:
    model = loud_model()
    report = run(model, RTN(4, 16), overrides={"*.down_proj": "w3a16_g5"}, on_unsupported="skip")
    assert all("no kernel for" in report.skipped[f"model.layers.{i}.mlp.down_proj"] for i in (0, 1))
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)


def test_training_mode_and_dtypes_are_restored() -> None:
    model = loud_model().to(torch.bfloat16).train()
    run(model, AWQ(4, 16, grid=2))
    assert model.training
    assert model.model.layers[0].self_attn.q_proj.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].self_attn.q_proj.scales.dtype == torch.bfloat16
