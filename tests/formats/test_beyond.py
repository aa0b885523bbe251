"""What files ask beyond weights: every way to read a checkpoint honours it, refuses it by name, or says that it is left aside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qkernels import inspect, load, replace_linear, save
from qkernels.checkpoint import convert
from qkernels.errors import CheckpointError
from qkernels.integrations.transformers import enable
from tests.checkpoints import edit_json, logits, rewritten, small_llama

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def plugged_in() -> Iterator[None]:
    """The registries of transformers are global."""
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    enable()
    yield
    for mapping, old in zip((AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING), before, strict=True):
        mapping.clear()
        mapping.update(old)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each of some formats."""
    model = small_llama()
    replace_linear(model, "w4a16_g32_asym", progress=False)
    root = tmp_path_factory.mktemp("quantized")
    for name in ("gptq", "awq", "compressed-tensors"):
        save(model, root / name, format=name)
    return {path.name: path for path in root.iterdir()}


def asking(source: Path, target: Path, fields: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    """The same checkpoint with more in its quantization_config, and more tensors."""
    rewritten(source, target, lambda own: own.update(tensors or {}))
    edit_json(target / "config.json", lambda config: config["quantization_config"].update(fields))
    return target


READERS: dict[str, Callable[[Path], object]] = {
    "load": load,
    "inspect": inspect,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "convert": lambda path: convert(path, path.parent / "converted"),
}


def transforms(*locations: str) -> dict[str, Any]:
    uses = [{"targets": ["Linear"], "location": place, "inverse": False, "ignore": []} for place in locations]
    return {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": uses}}}}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("form", "fields", "tensors", "message"),
    [
        ("compressed-tensors", transforms("input", "weight_input"), {}, "has transform_config, which rotates .*R at input"),
        ("compressed-tensors", transforms("weight_output", "k_cache"), {}, "transform_config, .*R at k_cache"),
        ("compressed-tensors", {"transform_config": {"groups": 3}}, {}, "transform_config .* needs config_groups, got"),
        ("gptq", {"rotation": "hadamard"}, {}, "has rotation, which rotates activations .*'hadamard'"),
        ("gptq", {"meta": {"rotation": "random"}}, {}, "has rotation, which rotates"),
        ("awq", {}, {"model.layers.0.mlp.act.scales": torch.ones(96)}, r"mlp\.act\.scales divides what an activation"),
        ("gptq", {}, {f"{DOWN}.R4_input.weight": torch.eye(96)}, rf"{DOWN}\.R4_input\.weight lies under the quantized"),
        ("awq", {}, {f"{DOWN}.smooth": torch.ones(96)}, rf"tensor {DOWN}\.smooth lies under the quantized module {DOWN} "),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(
    reader: str,
    form: str,
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    message: str,
    quantized: dict[str, Path],
    tmp_path: Path,
) -> None:
    path = asking(quantized[form], tmp_path / "asks", fields, tensors)
    with pytest.raises(CheckpointError, match=message):
        READERS[reader](path)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "fields",
    [
        transforms("weight_input", "weight_output"),  # in the weights already
        {"transform_config": {}, "rotation": None, "transformers_version": "5.0"},
        {"transform_config": {"config_groups": {}}},
    ],
)
def test_what_asks_nothing_is_read(fields: dict[str, Any], quantized: dict[str, Path], tmp_path: Path) -> None:
    path = asking(quantized["compressed-tensors"], tmp_path / "asks", fields)
    assert torch.equal(logits(load(path)), logits(load(quantized["compressed-tensors"])))
    assert inspect(path).oddities == ()


def test_scales_of_a_cache_are_left_aside_and_said(
    quantized: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    attention = [f"model.layers.{i}.self_attn" for i in range(2)]
    scales = {f"{name}.{leaf}": torch.tensor([0.02]) for name in attention for leaf in ("k_scale", "v_scale")}
    scales |= {f"{name}.k_proj.output_scale": torch.tensor([0.1]) for name in attention}  # as older files have them
    plain = quantized["compressed-tensors"]
    path = asking(plain, tmp_path / "asks", {"kv_cache_scheme": scheme}, scales)
    want = logits(load(plain))
    with caplog.at_level(logging.WARNING, "qkernels"):
        assert torch.equal(logits(load(path)), want)
    assert "asks for a KV cache of 8-bit float numbers" in caplog.text
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), want)
    found = inspect(path)
    assert [line for line in found.oddities if line.startswith("scales of a quantized KV cache: 4 modules")]
    assert not any(name in str(tensor.name) for tensor in found.unquantized for name in scales)
    convert(path, tmp_path / "converted", "gptq")
    assert torch.equal(logits(load(tmp_path / "converted")), want)


def test_quantized_outputs_are_said(quantized: dict[str, Path], tmp_path: Path) -> None:
    path = asking(quantized["compressed-tensors"], tmp_path / "asks", {})
    outputs = {"num_bits": 8, "type": "float", "dynamic": False}
    edit_json(
        path / "config.json",
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(output_activations=outputs),
    )
    assert torch.equal(logits(load(path)), logits(load(quantized["compressed-tensors"])))
    assert "8-bit float output activations, with scales of their own in the file" in inspect(path).oddities[0]


def test_a_config_of_transformers_for_a_quantized_checkpoint_is_taken(quantized: dict[str, Path]) -> None:
    """Scripts written for optimum pass one; the checkpoint says what it is, and that counts."""
    from transformers import AwqConfig, GPTQConfig

    enable()  # a second time changes nothing
    for name, config in (("gptq", GPTQConfig(bits=4)), ("awq", AwqConfig(bits=4))):
        with pytest.warns(UserWarning, match="quantization_config"):
            model = AutoModelForCausalLM.from_pretrained(quantized[name], quantization_config=config)
        assert torch.equal(logits(model), logits(load(quantized[name])))
