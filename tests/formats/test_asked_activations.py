"""Activations that a file asks for: int8 where there are kernels, 16 bits with a word, or an error."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qkernels import QuantLinear, inspect, load, quantize, replace_linear, save
from qkernels.checkpoint import convert
from qkernels.cli.main import main, parser
from qkernels.errors import ArgumentError, CheckpointError, ConversionError, UnsupportedProblem
from qkernels.kernels import catalogue
from qkernels.ops import reference
from qkernels.quantizers import RTN
from qkernels.storage import read_json, write_json
from tests.checkpoints import logits, plain_checkpoint, small_llama

MODELS = Path(__file__).parent.parent / "golden" / "activations"
GOLDEN = load_file(MODELS / "logits.safetensors")
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
LAYER = "model.layers.0.mlp.up_proj"


def asking(path: Path, scheme: str, inputs: dict[str, Any] | None, outputs: dict[str, Any] | None = None) -> Path:
    """A model in pack-quantized whose config asks for quantized activations."""
    model = small_llama()
    replace_linear(model, scheme)
    save(model, path, format="compressed-tensors")
    config = read_json(path / "config.json")
    group = config["quantization_config"]["config_groups"]["group_0"]
    group |= {"input_activations": inputs, "output_activations": outputs}
    write_json(path / "config.json", config)
    return path


KINDS = pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("w8a8", "w8a8w_channel"), ("w8a8_zero", "w8a8z_channel_asym"), ("w4a8", "w4a8w_g32"),
        ("llm_int8", "w8a8o6_channel"), ("w8a8_static", "w8a8s_channel"), ("w4a8_static_zero", "w4a8sz_g32"),
    ],
)  # fmt: skip


@KINDS
def test_layers_compute_what_those_of_the_origin_do(name: str, scheme: str) -> None:
    """On the same x, in fp32: the codes of x are the same (tests/ops/test_roundings.py), so that a few roundings of sums are all
    that differs; and 1.8e-5 of them for LLM.int8, where bitsandbytes 0.50 has 6.200124e-05 for 1 / 127^2 (int8_mm_dequant)."""
    model = load(MODELS / name, activations="file")
    for layer, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        assert str(module.scheme) == scheme
        x, right = (GOLDEN[f"expected.{name}.{layer}.{part}"] for part in "xy")
        error, size = (module(x) - right).abs().max(), right.abs().max()
        assert error < (3e-5 if name == "llm_int8" else 2e-6) * size
        assert error < 1e-3
        floats = x @ module.dequantize(torch.float32).T
        assert (floats - right).abs().max() > 1e-3


@KINDS
def test_logits_are_those_of_the_origin(name: str, scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    """Within 1e-3 of its own int8 computation in fp32, but for tokens where a rounding of something else tips a code: -max |x|
    lies on the tie between -128 and -127, and its last bit decides. Most tokens are none; with 16-bit activations all are."""
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        off = (load(MODELS / name)(GOLDEN["ids"]).logits - GOLDEN[f"expected.{name}.logits"]).abs().amax(-1)
    assert caplog.text == ""
    assert inspect(MODELS / name).schemes == {scheme: 7}
    assert (off < 1e-3).float().mean() >= (1 if "static" in name else 0.75)  # a static scale puts nothing on a tie
    assert off.max() < 0.05
    plain = load(MODELS / name, activations="16bit")
    assert str(plain.get_submodule(LAYER).scheme) == re.sub("a8[a-z]+6?", "a16", scheme)
    with torch.inference_mode():
        off = (plain(GOLDEN["ids"]).logits - GOLDEN[f"expected.{name}.logits"]).abs().amax(-1)
    assert off.min() > 1e-3


def test_a_file_of_llm_compressor_runs_as_its_own_model(caplog: pytest.LogCaptureFixture) -> None:
    """Of its `oneshot` (SmoothQuant and static scales): codes of what goes into each layer bit for bit, layers and logits within
    roundings of its own computation in fp32."""
    path = MODELS / "llmcompressor_w8a8_static"
    made = load_file(MODELS / "llmcompressor_w8a8_static.safetensors")
    assert inspect(path).schemes == {"w8a8s_channel": 7}
    with caplog.at_level(logging.WARNING):
        model = load(path)
    assert caplog.text == ""
    cut = 0
    for layer, module in model.named_modules():
        if isinstance(module, QuantLinear):
            x, y, codes = (made[f"expected.{layer}.{part}"] for part in ("x", "y", "codes"))
            assert torch.equal(reference.quantize_rows_static(x, module.x_static)[0], codes)
            assert (module(x) - y).abs().max() < 2e-6 * y.abs().max()
            cut += int((codes == 127).sum())
    assert cut
    with torch.inference_mode():
        assert (model(made["ids"]).logits - made["expected.logits"]).abs().max() < 1e-5
        plain = load(path, activations="16bit")(made["ids"]).logits
    assert (plain - made["expected.logits"]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize(("name", "scheme"), [("w8a8", "w8a8w_channel"), ("w4a8_static_zero", "w4a8sz_g32")])
def test_the_plug_in_runs_them_too(name: str, scheme: str) -> None:
    from transformers import AutoModelForCausalLM

    from qkernels.integrations.transformers import enable

    enable()
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    assert str(model.get_submodule(LAYER).scheme) == scheme
    with torch.inference_mode():
        off = (model(GOLDEN["ids"]).logits - GOLDEN[f"expected.{name}.logits"]).abs().max()
    assert off < 1e-3


@pytest.mark.parametrize(
    "name", ["w8a8", "w8a8_zero", "w4a8", "w8a8_static", "w4a8_static_zero", "llmcompressor_w8a8_static"]
)
def test_they_are_written_as_they_were_read(name: str, tmp_path: Path) -> None:
    convert(MODELS / name, tmp_path / "again", "compressed-tensors")
    old, new = (load_file(path / "model.safetensors") for path in (MODELS / name, tmp_path / "again"))
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert torch.equal(new[key], tensor), key
    said = read_json(tmp_path / "again" / "config.json")["quantization_config"]
    assert said["format"] == ("pack-quantized" if name.startswith("w4a8") else "int-quantized")
    assert said["config_groups"]["group_0"]["input_activations"]["symmetric"] is not name.endswith("_zero")
    assert said["config_groups"]["group_0"]["input_activations"]["dynamic"] is ("static" not in name)
    for form in ("native", "cpu_tile_a8"):
        convert(tmp_path / "again", tmp_path / form, form)
        assert inspect(tmp_path / form).schemes == inspect(MODELS / name).schemes
        assert torch.equal(logits(load(tmp_path / form)), logits(load(MODELS / name)))


def test_a_format_without_a_field_loses_them_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(MODELS / "w8a8", tmp_path / "gptq", "gptq_v2")
    assert inspect(tmp_path / "gptq").schemes == {"w8a16_channel": 7}
    assert "gptq_v2 does not say that activations are quantized: 7 modules" in caplog.text
    with pytest.raises(ConversionError, match=r'no field for 8-bit activations .*activations="16bit"'):
        save(load(MODELS / "w8a8"), tmp_path / "other", format="gptq_v2")


def test_ours_by_127_is_not_what_compressed_tensors_has(tmp_path: Path) -> None:
    model = small_llama()
    replace_linear(model, "w8a8_channel")
    with pytest.raises(ConversionError, match=r"those of w8a8w_channel \(max |x| / 127.5\), got w8a8_channel"):
        save(model, tmp_path / "ct", format="compressed-tensors")


def test_where_no_kernel_has_them(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By default in 16 bits, and it is said; asked for, an error."""
    without = tuple(spec for spec in catalogue.KERNELS if spec.layout != "cpu_tile_a8")
    monkeypatch.setattr(catalogue, "KERNELS", without)
    assert str(load(MODELS / "w8a8").get_submodule(LAYER).scheme) == "w8a16_channel"
    assert "which no kernel here has: 7 modules" in caplog.text
    with pytest.raises(UnsupportedProblem, match="no kernel for w8a8w_channel"):
        load(MODELS / "w8a8", activations="file")
    model = load(MODELS / "w8a8", on_unsupported="reference")
    assert model.get_submodule(LAYER).layout == "reference_a8"


@pytest.mark.parametrize("command", ["generate", "eval", "serve"])
def test_the_command_line_spells_it(command: str) -> None:
    text = {"generate": ["--prompt", "It"], "eval": ["--text", "f"], "serve": []}[command]
    args = parser().parse_args([command, "out", *text, "--activations", "16bit"])
    assert args.activations == "16bit"
    assert parser().parse_args([command, "out", *text]).activations is None


def test_eval_runs_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def loading(*_: Any, activations: str | None, **__: Any) -> None:
        asked.append(activations)
        raise ArgumentError("far enough")

    monkeypatch.setattr("qkernels.checkpoint.load", loading)
    monkeypatch.setattr("qkernels.texts.load_tokenizer", lambda path: None)
    monkeypatch.setattr("qkernels.texts.token_ids", lambda tokenizer, text: torch.zeros(4, dtype=torch.int64))
    (tmp_path / "text").write_text("It was")
    assert main(["eval", "out", "--text", str(tmp_path / "text"), "--activations", "file"]) != 0
    assert asked == ["file"]


def test_inspect_says_what_stays_in_16_bits(tmp_path: Path) -> None:
    static = TOKEN | {"dynamic": False, "strategy": "channel"}
    (line,) = inspect(asking(tmp_path / "ct", "w8a16_channel", static)).oddities
    assert line.startswith(
        "the config asks for 8-bit int activations, with scales of their own in the file: 14 modules"
    )
    assert "16-bit activations instead" in line


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (TOKEN | {"dynamic": False, "strategy": "channel"}, None),
        (TOKEN | {"dynamic": False, "strategy": "tensor", "num_bits": 4}, None),
        (TOKEN | {"dynamic": "local"}, None),
        (TOKEN | {"strategy": "group", "group_size": 32}, None),
        (TOKEN | {"num_bits": 4}, None),
        (TOKEN, TOKEN),
    ],
)
def test_what_no_kernel_has(inputs: dict[str, Any], outputs: dict[str, Any] | None, tmp_path: Path) -> None:
    path = asking(tmp_path / "ct", "w8a16_channel", inputs, outputs)
    assert str(load(path).get_submodule(LAYER).scheme) == "w8a16_channel"
    with pytest.raises(CheckpointError, match=r'_proj: the config asks for .*; load it with activations="16bit"'):
        load(path, activations="file")


def test_a_file_of_ours_is_exact_and_needs_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "out"
    quantize(plain_checkpoint(tmp_path / "plain"), RTN().with_scheme("w8a8_channel"), save_to=path, progress=False)
    with caplog.at_level(logging.WARNING):
        assert str(load(path).get_submodule(LAYER).scheme) == "w8a8_channel"
        assert torch.equal(logits(load(path, activations="file")), logits(load(path)))
    assert "activations" not in caplog.text
    assert str(load(path, activations="16bit").get_submodule(LAYER).scheme) == "w8a16_channel"


def test_a_key_of_ours_in_a_config_means_nothing(tmp_path: Path) -> None:
    path = asking(tmp_path / "ct", "w8a16_channel", TOKEN | {"num_bits": 4})
    config = read_json(path / "config.json")
    config["quantization_config"]["__activations__"] = "file"
    write_json(path / "config.json", config)
    assert str(load(path).get_submodule(LAYER).scheme) == "w8a16_channel"


def test_other_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match='activations must be "file", "16bit", "int8" or None, got \'int4\''):
        load(tmp_path, activations="int4")  # type: ignore[arg-type]
