"""load, save, convert and the writer below them: what comes back, what is refused, what is left on disk."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qkernels import QuantLinear, QuantScheme, UnsupportedProblem, load, replace_linear, save
from qkernels.checkpoint import CheckpointWriter, convert, open_checkpoint
from qkernels.checkpoint.registry import WRITTEN
from qkernels.errors import CheckpointError, ConversionError
from qkernels.models.building import empty_model
from qkernels.storage import TensorSource, atomic_directory, read_json
from tests.checkpoints import A16_FORMATS, edit_json, file_bytes, logits, plain_checkpoint, rewritten, small_llama
from tests.strategies import random_weight, same_weight

NAMES = list(A16_FORMATS)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def quantized(plain: Path) -> dict[str, Path]:
    """The same quantized model in every format."""
    model = load(plain)
    replace_linear(model, "w4a16_g32")
    for name in NAMES:
        save(model, plain.parent / name, name)
    return {name: plain.parent / name for name in NAMES}


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_plain_checkpoint_loads_as_transformers_loads_it(
    tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype | None
) -> None:
    directory = plain_checkpoint(tmp_path / "m", **fields)
    model = load(directory, dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto").eval()
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert model.dtype == reference.dtype == (dtype or torch.float32)
    assert torch.equal(logits(model), logits(reference))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == bool(fields.get("tie_word_embeddings"))
    assert all(not t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in reference.named_parameters()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w4a16_channel"])
def test_a_quantized_model_comes_back_bit_for_bit(tmp_path: Path, plain: Path, name: str, scheme: str) -> None:
    model = load(plain)
    replace_linear(model, scheme)
    save(model, tmp_path / "out", name)
    back = load(tmp_path / "out")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    for n, layer in layers.items():
        assert same_weight(back.get_submodule(n).quant_tensor(), layer.quant_tensor())
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("name", ["native", "gptq", "gptq_v2"])
def test_mixed_schemes_and_modules_left_out(tmp_path: Path, plain: Path, name: str) -> None:
    model = load(plain)
    replace_linear(
        model, "w4a16_g32", exclude=("lm_head", "*.1.mlp.up_proj"), overrides={"*.down_proj": "w8a16_channel"}
    )
    save(model, tmp_path / "out", name)
    back = load(tmp_path / "out")
    assert back.model.layers[1].mlp.down_proj.scheme == QuantScheme(8, "channel")
    assert isinstance(back.model.layers[1].mlp.up_proj, nn.Linear)
    assert torch.equal(logits(back), logits(model))
    if name != "native":
        rules = read_json(tmp_path / "out" / "config.json")["quantization_config"]["dynamic"]
        assert r"-:^model\.layers\.1\.mlp\.up_proj$" in rules
        assert not any("embed" in rule or "lm_head" in rule for rule in rules)


@pytest.mark.parametrize("name", ["awq", "compressed-tensors"])
def test_layers_outside_of_stacks_are_named_where_readers_would_miss_them(
    tmp_path: Path, plain: Path, name: str
) -> None:
    """A classifier's head or a projector has no number in its name, and would be taken for quantized."""
    model = load(plain)
    model.add_module("projector", nn.Linear(32, 16, bias=False))
    replace_linear(model, "w4a16_g32_asym", exclude=("lm_head", "projector"))
    save(model, tmp_path / "out", name)
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert "projector" in config["ignore" if name == "compressed-tensors" else "modules_to_not_convert"]


def test_the_generation_config_is_the_models(tmp_path: Path, plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not that of the directory it came from, which may have changed in memory since."""
    model = load(plain)
    replace_linear(model, "w4a16_g32")
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json")["max_new_tokens"] == 7
    (plain / "generation_config.json").write_text('{"max_new_tokens": 5}')
    model.generation_config.temperature, model.generation_config.do_sample = (
        0.5,
        False,
    )  # transformers writes no such file
    save(model, tmp_path / "other")
    assert read_json(tmp_path / "other" / "generation_config.json") == {"max_new_tokens": 5}
    assert "generation_config.json is that of the model's origin" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_head_ends_a_tie(tmp_path: Path, name: str) -> None:
    model = load(plain_checkpoint(tmp_path / "m", tie_word_embeddings=True))
    replace_linear(model, "w4a16_g32")
    model.lm_head = QuantLinear.from_quant_tensor(random_weight("w4a16_g32", 64, 64), dtype=torch.float32)
    save(model, tmp_path / "out", name)
    back = load(tmp_path / "out")
    assert isinstance(back.lm_head, QuantLinear)
    assert isinstance(back.model.embed_tokens, nn.Embedding)
    assert back.config.tie_word_embeddings is False
    assert torch.equal(logits(back), logits(model))


def test_a_tie_that_the_tensors_deny(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain_checkpoint(tmp_path / "m", tie_word_embeddings=False)
    edit_json(tmp_path / "m" / "config.json", lambda c: c.update(tie_word_embeddings=True))
    model = load(tmp_path / "m")
    assert torch.equal(logits(model), logits(small_llama()))
    assert model.config.tie_word_embeddings is False
    assert "lm_head.weight are tied by config.json, but differ in the checkpoint; they are not tied" in caplog.text


def test_other_dtypes_of_activations(quantized: dict[str, Path]) -> None:
    model = load(quantized["gptq"], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    layer = model.get_submodule(Q)
    assert layer.dtype == torch.bfloat16
    assert layer.quant_tensor().scales.dtype == torch.float16  # as in the file


def test_the_class_is_that_of_config_json_or_a_causal_lm(tmp_path: Path, plain: Path) -> None:
    copy = rewritten(plain, tmp_path / "m", lambda t: None)
    edit_json(copy / "config.json", lambda c: c.pop("architectures"))
    assert type(load(copy)) is LlamaForCausalLM
    edit_json(copy / "config.json", lambda c: c.update(architectures=["os.system"]))
    assert type(load(copy)) is LlamaForCausalLM


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation", "auto_map"])
def test_a_config_cannot_fetch_code(tmp_path: Path, plain: Path, key: str) -> None:
    copy = rewritten(plain, tmp_path / "m", lambda t: None)
    reference = load(copy)
    edit_json(copy / "config.json", lambda c: c.update({key: "kernels-community/flash-attn3"}))
    model = load(copy)
    assert "kernels-community" not in json.dumps(model.config.to_dict())
    assert model.config._attn_implementation == reference.config._attn_implementation
    assert torch.equal(logits(model), logits(reference))


def test_parameters_are_on_meta_while_the_model_is_built(plain: Path) -> None:
    model = empty_model(TensorSource.open(plain).config, torch.bfloat16, plain)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model.model.rotary_emb.inv_freq.is_meta
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_other_threads_keep_their_parameters(plain: Path) -> None:
    """While a model is built on meta, another thread builds a layer, which is real; and so is one that is built afterwards."""
    built: list[nn.Linear] = []

    def meanwhile(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if not built and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
            thread.start()
            thread.join()

    handle = register_module_parameter_registration_hook(meanwhile)
    try:
        model = empty_model(TensorSource.open(plain).config, torch.bfloat16, plain)
    finally:
        handle.remove()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not built[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_old_folders_have_their_config_beside_config_json(tmp_path: Path, quantized: dict[str, Path]) -> None:
    copy = rewritten(quantized["gptq"], tmp_path / "m", lambda t: None)
    (copy / "model.safetensors").rename(copy / "gptq_model-4bit-32g.safetensors")
    edit_json(copy / "config.json", lambda c: c.pop("quantization_config"))
    old = ("quant_method", "checkpoint_format", "meta")
    edit_json(copy / "quantize_config.json", lambda c: [c.pop(key) for key in old])
    assert torch.equal(logits(load(copy)), logits(load(quantized["gptq"])))


def test_biases_of_zeros_that_the_model_has_not(tmp_path: Path, quantized: dict[str, Path]) -> None:
    """AutoGPTQ gives one to every module."""
    zeros = rewritten(quantized["gptq"], tmp_path / "a", lambda t: t.update({f"{Q}.bias": torch.zeros(64)}))
    assert torch.equal(logits(load(zeros)), logits(load(quantized["gptq"])))
    ones = rewritten(quantized["gptq"], tmp_path / "b", lambda t: t.update({f"{Q}.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=f"{Q}.bias: the model has no bias there, got one that is not zero"):
        load(ones)


def test_computed_buffers_of_older_files_are_passed_over(tmp_path: Path, plain: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    old = rewritten(plain, tmp_path / "m", lambda t: t.update({name: torch.zeros(8)}))
    assert torch.equal(logits(load(old)), logits(load(plain)))


def test_a_label_that_lies_warns_once(
    tmp_path: Path, quantized: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    copy = rewritten(quantized["gptq_v2"], tmp_path / "m", lambda t: None)
    edit_json(copy / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(load(copy)), logits(load(quantized["gptq_v2"])))
    (record,) = caplog.records
    assert "zero points are stored as gptq_v2 although the config says gptq: 14 modules, first model.layers.0" in (
        record.getMessage()
    )


def test_no_kernel_no_load_unless_allowed(tmp_path: Path) -> None:
    model = small_llama()
    replace_linear(model, "w4a16_g4", on_unsupported="reference")
    save(model, tmp_path / "m")
    with pytest.raises(UnsupportedProblem, match="no kernel for w4a16_g4, "):
        load(tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m", on_unsupported="reference")), logits(model))


def set_field(name: str, index: Any, value: Any) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[f"{Q}.{name}"].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.qzeros"), rf"{Q} lacks qzeros \(it has g_idx, qweight, scales\), expected for gptq"),
        (lambda t: t.pop(f"{Q}.qweight"), f"{Q} lacks qweight"),
        (
            lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}),
            f"{Q} has both a float weight and g_idx, qweight, qzeros, scales; one of them is left over",
        ),
        (
            lambda t: [t.pop(f"{Q}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")],
            f"missing, for example {Q}.weight",
        ),
        (lambda t: t.pop("model.norm.weight"), "1 tensors it needs are missing, for example model.norm.weight"),
        (lambda t: t.update(x=torch.zeros(1)), "1 tensors are unknown to it, for example x"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(63)}),
            r"norm.weight: the model needs a float tensor \[64\], got",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64).int()}),
            r"needs a float tensor \[64\], got int32 \[64\]",
        ),
        (
            set_field("scales", (0, 0), float("nan")),
            f"{Q}: scales must be finite, got 1 NaN or infinite entries of 128",
        ),
        (
            set_field("scales", (1, 5), float("-inf")),
            f"{Q}: scales must be finite, got 1 NaN or infinite entries of 128",
        ),
        (set_field("g_idx", 3, -1), rf"{Q}: g_idx must lie in 0 … 1 \(G=2\), got -1"),
        (set_field("g_idx", 3, 2), rf"{Q}: g_idx must lie in 0 … 1 \(G=2\), got 2"),
        (set_field("g_idx", 3, 1), f"{Q}: g_idx gives group 0 31 members, expected 32"),
        (lambda t: t.update({f"{Q}.qweight": torch.zeros(7, 64).int()}), rf"{Q}: qweight must be int32 \[8, 64\]"),
        (
            lambda t: t.update({k.replace("q_proj", "z_proj"): t.pop(k) for k in list(t) if k.startswith(f"{Q}.")}),
            "has a quantized model.layers.0.self_attn.z_proj, which LlamaForCausalLM does not",
        ),
        (
            lambda t: t.update(
                {k.replace("self_attn.q_proj", "mlp"): t.pop(k) for k in list(t) if k.startswith(f"{Q}.")}
            ),
            "has a quantized model.layers.0.mlp, which is a LlamaMLP, not a Linear",
        ),
        (
            lambda t: t.update(
                {f"{Q}.{s}": v for s, v in WRITTEN["gptq"].write(random_weight("w4a16_g32", 32, 64)).items()}
            ),
            rf"{Q}: the model needs a weight \[64, 64\], got \[32, 64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, quantized: dict[str, Path], change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    spoiled = rewritten(quantized["gptq"], tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        load(spoiled)


def quantization(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantization(quant_method="frobnicate"), "declares {'quant_method': 'frobnicate'.* which is not known"),
        (quantization(quant_method="awq", checkpoint_format="marlin"), "a kind that is not read yet"),
        (quantization(bits=8), r"model.layers.0.mlp.down_proj: qweight must be int32 \[24, 64\] \(8 bits"),
        (
            quantization(group_size=64),
            r"down_proj: scales must be .* \[2, 64\] \(K=96, group_size 64\), got float16 \[3, 64\]",
        ),
        (lambda c: c.update(quantization_config=[1]), "quantization_config of .* must be an object, got"),
        (lambda c: c.pop("quantization_config"), "has no quantization_config, but .*qweight looks like part of a"),
        (lambda c: c.update(model_type="nope"), "knows no model_type 'nope'"),
        (lambda c: c.pop("model_type"), "knows no model_type None"),
        (lambda c: c.update(hidden_size="wide"), "does not describe a llama model that can be built"),
        (lambda c: c.update(num_hidden_layers=3), "missing, for example model.layers.2"),
        (lambda c: c.update(num_hidden_layers=1), "has a quantized model.layers.1.*, which LlamaForCausalLM does not"),
        (lambda c: c.update(dtype="int8"), "needs dtype to be float16, bfloat16 or float32, got 'int8'"),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, quantized: dict[str, Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    copy = rewritten(quantized["gptq"], tmp_path / "m", lambda t: None)
    (copy / "quantize_config.json").unlink()
    edit_json(copy / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


# --- save -------------------------------------------------------------------------------------------------------------


def test_what_lies_beside_the_weights(plain: Path, quantized: dict[str, Path]) -> None:
    common = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    for name, directory in quantized.items():
        files = file_bytes(directory)
        assert set(files) == common | ({"quantize_config.json"} if name.startswith("gptq") else set())
        assert files["tokenizer.json"] == (plain / "tokenizer.json").read_bytes()
        config = read_json(directory / "config.json")
        assert config["architectures"] == ["LlamaForCausalLM"]
        if name.startswith("gptq"):
            assert read_json(directory / "quantize_config.json") == config["quantization_config"]


def test_a_model_that_came_from_nowhere_has_its_generation_config(tmp_path: Path) -> None:
    model = small_llama()
    replace_linear(model, "w4a16_g32")
    save(model, tmp_path / "out")
    assert set(file_bytes(tmp_path / "out")) == {"config.json", "generation_config.json", "model.safetensors"}


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = load(plain_checkpoint(tmp_path / "m", tie_word_embeddings=True))
    replace_linear(model, "w4a16_g32")
    save(model, tmp_path / "out")
    names = TensorSource.open(tmp_path / "out").names()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_save_refuses(tmp_path: Path, plain: Path) -> None:
    model = load(plain)
    with pytest.raises(
        ConversionError, match="needs a transformers model with QuantLinear modules, got LlamaForCausalLM with 0"
    ):
        save(model, tmp_path / "out")
    layer = QuantLinear.from_quant_tensor(random_weight("w4a16_g32", 8, 32))
    with pytest.raises(ConversionError, match="got Sequential with 1 of them and no config"):
        save(nn.Sequential(layer), tmp_path / "out")
    replace_linear(model, "w4a16_g32", overrides={"*.1.mlp.up_proj": "w8a16_g32"})
    with pytest.raises(
        ConversionError, match=r"model.layers.1.mlp.up_proj: awq cannot store this weight: bits must be 4"
    ):
        save(model, tmp_path / "out", "awq")
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save(model, tmp_path / "out")
    save(model, tmp_path / "out", "gptq", overwrite=True)
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["quant_method"] == "gptq"


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_converting_there_and_back_gives_the_same_bytes(
    tmp_path: Path, quantized: dict[str, Path], first: str, second: str
) -> None:
    convert(quantized[first], tmp_path / "there", second)
    convert(tmp_path / "there", tmp_path / "back", first)
    assert file_bytes(tmp_path / "there").keys() == file_bytes(quantized[second]).keys()
    assert file_bytes(tmp_path / "back") == file_bytes(quantized[first])
    assert torch.equal(logits(load(tmp_path / "there")), logits(load(quantized[first])))


def with_act_order(directory: Path, target: Path) -> Path:
    with atomic_directory(target) as temporary:
        source = open_checkpoint(directory)
        writer = CheckpointWriter(temporary, source.source.config, "gptq")
        for module in source.modules:
            weight = source.weight(module).weight
            writer.add_quantized(module, random_weight(weight.scheme, weight.N, weight.K, act_order=True))
        for name in source.others:
            writer.add_tensor(name, source.source.read(name))
        writer.close()
    return target


def test_convert_refuses_what_the_target_cannot_hold(tmp_path: Path, plain: Path, quantized: dict[str, Path]) -> None:
    ordered = with_act_order(quantized["gptq"], tmp_path / "ordered")
    assert read_json(ordered / "config.json")["quantization_config"]["desc_act"] is True
    with pytest.raises(
        ConversionError,
        match=r"^model\.layers\.0\.mlp\.down_proj: awq cannot store this weight: its columns are in act-order",
    ):
        convert(ordered, tmp_path / "out", "awq")
    with pytest.raises(ConversionError, match="holds no quantized weights; quantize it first"):
        convert(plain, tmp_path / "out", "gptq")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(quantized["awq"], ordered, "gptq")
    assert [p.name for p in tmp_path.iterdir()] == ["ordered"]
    convert(ordered, tmp_path / "out", "native")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(ordered)))


def test_convert_keeps_its_source(tmp_path: Path, quantized: dict[str, Path]) -> None:
    copy = rewritten(quantized["gptq"], tmp_path / "m", lambda t: None)
    before = file_bytes(copy)
    with pytest.raises(CheckpointError, match="is read to write it, and is kept; choose another target"):
        convert(copy, copy, "native", overwrite=True)
    assert file_bytes(copy) == before
    convert(copy, tmp_path / "native")
    assert "quantize_config.json" not in file_bytes(tmp_path / "native")
    convert(copy, tmp_path / "native", "gptq", overwrite=True)  # what was written here may be replaced
    assert "quantize_config.json" in file_bytes(tmp_path / "native")
