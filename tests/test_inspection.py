"""inspect: what it reports of a sound checkpoint, and that it names everything that is broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import QuantScheme, inspect, load, replace_linear, save
from qkernels.checkpoint import CheckpointWriter
from qkernels.engines import ENGINES, engines_for, engines_table
from qkernels.errors import CheckpointError
from qkernels.inspection import Engine, Inspection
from tests.checkpoints import A16_FORMATS, edit_json, plain_checkpoint, rewritten
from tests.strategies import random_weight

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("c")
    model = load(plain_checkpoint(root / "plain"))
    replace_linear(model, "w4a16_g32")
    for name in A16_FORMATS:
        save(model, root / name, name)
    return {name: root / name for name in ("plain", *A16_FORMATS)}


def engine(found: Inspection, name: str) -> Engine:
    return next(engine for engine in found.engines if engine.name == name)


def written(directory: Path, format: str, act_order: bool = False, **schemes: str) -> Path:
    """A checkpoint of 32 x 64 modules `layers.0.<name>`, scheme by name."""
    directory.mkdir()
    writer = CheckpointWriter(directory, {}, format)
    for name, scheme in schemes.items():
        writer.add_quantized(f"layers.0.{name}", random_weight(scheme, 32, 64, act_order=act_order))
    writer.close()
    return directory


@pytest.mark.parametrize("name", A16_FORMATS)
def test_a_sound_checkpoint(quantized: dict[str, Path], name: str) -> None:
    found = inspect(quantized[name])
    assert (found.format, found.architecture) == (name, "LlamaForCausalLM")
    assert found.schemes == {"w4a16_g32": 14}
    assert found.oddities == ()
    (layer,) = [layer for layer in found.layers if layer.name == Q]
    assert (layer.out_features, layer.in_features, layer.scheme, layer.columns) == (64, 64, "w4a16_g32", "natural")
    assert found.quantized_weights == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    file = quantized[name] / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert found.nbytes == file.stat().st_size - header
    assert {tensor.name for tensor in found.unquantized} >= {"lm_head.weight", "model.norm.weight"}


def test_bits_per_weight_of_the_native_format(tmp_path: Path) -> None:
    found = inspect(written(tmp_path / "m", "native", a="w4a16_g32_asym"))
    # 4 bits of code; 16 of scale and 4 of zero for each 32; int64 [2] of shape for the module
    assert found.bits_per_weight == 4 + 20 / 32 + 128 / (32 * 64)


def test_a_plain_checkpoint(quantized: dict[str, Path]) -> None:
    found = inspect(quantized["plain"])
    assert (found.format, found.method, found.layers, found.engines) == (None, "none", (), ())
    assert found.bits_per_weight is None
    assert "0 modules" in found.to_markdown()


@pytest.mark.parametrize("name", ["plain", *A16_FORMATS])
def test_json_and_markdown_hold_everything(quantized: dict[str, Path], name: str) -> None:
    found = inspect(quantized[name])
    values: dict[str, Any] = json.loads(found.to_json())
    assert len(values["layers"]) == len(found.layers)
    assert values["nbytes"] == found.nbytes
    text = found.to_markdown()
    for tensor in (*found.layers, *found.unquantized):
        assert f"| {tensor.name} " in text
    assert all(len(line) == len(text.splitlines()[2]) for line in text.split("\n\n")[1].splitlines())


def test_act_order_static_order_and_who_serves_them(tmp_path: Path) -> None:
    ordered = inspect(written(tmp_path / "a", "gptq", True, q_proj="w4a16_g32"))
    assert ordered.layers[0].columns == "act-order"
    vllm = engine(ordered, "vLLM")
    assert not vllm.serves
    assert vllm.notes == ("act-order was removed in 2026 (RFC 48148): 1 modules, first layers.0.q_proj",)
    assert engine(ordered, "qkernels").serves
    assert engine(ordered, "vLLM with qkernels").notes == ("on one rank where act-order columns would be cut",)
    static = written(tmp_path / "b", "gptq", q_proj="w4a16_g32")
    edit_json(static / "config.json", lambda c: c["quantization_config"].update(desc_act=True))
    assert inspect(static).layers[0].columns == "static"
    assert engine(inspect(static), "vLLM").serves


@pytest.mark.parametrize(
    ("schemes", "note"),
    [
        ({"a": "w3a16_g32"}, "no 3-bit kernels but Humming's"),
        ({"a": "w4a16_g8"}, "group sizes are 16, 32, 64, 128, channel, got 8"),
        (
            {"q_proj": "w4a16_g32", "k_proj": "w8a16_g32", "v_proj": "w4a16_g32"},
            "merged modules need one scheme: 1 differ",
        ),
    ],
)
def test_what_vllm_does_not_serve(tmp_path: Path, schemes: dict[str, str], note: str) -> None:
    found = inspect(written(tmp_path / "m", "gptq", **schemes))
    assert not engine(found, "vLLM").serves
    assert any(line.startswith(note) for line in engine(found, "vLLM").notes)


def test_other_engines(quantized: dict[str, Path]) -> None:
    assert engine(inspect(quantized["gptq"]), "transformers").notes == ("needs optimum and gptqmodel",)
    assert engine(inspect(quantized["awq"]), "transformers").notes == ("needs gptqmodel and accelerate",)
    assert not engine(inspect(quantized["native"]), "vLLM").serves
    assert engine(inspect(quantized["native"]), "vLLM with qkernels") == Engine(
        "vLLM with qkernels", True, (), "0.32.0"
    )


def test_oddities_are_counted_by_kind(tmp_path: Path, quantized: dict[str, Path]) -> None:
    copy = rewritten(quantized["gptq_v2"], tmp_path / "m", lambda t: None)
    edit_json(copy / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq"))
    (line,) = inspect(copy).oddities
    assert line.startswith(
        "zero points are stored as gptq_v2 although the config says gptq: 14 modules, first model.layers"
    )


def test_modules_that_were_left_out(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    writer = CheckpointWriter(directory, {}, "native")
    for i in range(3):
        for name in ("q_proj", "k_proj", "v_proj"):
            if (i, name) == (1, "k_proj"):
                writer.add_tensor(f"layers.{i}.{name}.weight", torch.zeros(32, 64))
            else:
                writer.add_quantized(f"layers.{i}.{name}", random_weight(QuantScheme(4, 32), 32, 64))
    writer.add_tensor("layers.0.mlp.experts.up_proj", torch.zeros(2, 4, 4))
    writer.add_tensor("embed.weight", torch.zeros(4, 4))
    writer.close()
    assert inspect(directory).oddities == (
        "stacked experts are not quantized: 1 module, first layers.0.mlp.experts.up_proj (float32 [2, 4, 4])",
        "not quantized, although the same module of other layers is: 1 module, first layers.1.k_proj (float32 [32, 64])",
        "modules that engines merge have different schemes: 1 module, first layers.1 "
        "(q_proj w4a16_g32, k_proj float, v_proj w4a16_g32)",
    )
    assert "## Oddities" in inspect(directory).to_markdown()


def test_every_broken_module_is_named(tmp_path: Path, quantized: dict[str, Path]) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.scales"][0, 0] = float("inf")
        tensors["model.layers.1.mlp.up_proj.g_idx"][0] = -5

    spoiled = rewritten(quantized["gptq"], tmp_path / "m", spoil)
    with pytest.raises(CheckpointError, match="2 of 14 quantized modules are broken") as raised:
        inspect(spoiled)
    assert f"\n  {Q}: scales must be finite, got 1 NaN or infinite entries of 128" in str(raised.value)
    assert "\n  model.layers.1.mlp.up_proj: g_idx must lie in 0 … 1 (G=2), got -5" in str(raised.value)


def test_very_broken_checkpoints_have_short_errors(tmp_path: Path, quantized: dict[str, Path]) -> None:
    copy = rewritten(quantized["awq"], tmp_path / "m", lambda t: None)
    edit_json(copy / "config.json", lambda c: c["quantization_config"].update(group_size=64))
    with pytest.raises(CheckpointError, match="14 of 14 quantized modules are broken"):
        inspect(copy)


def test_headers_come_first(tmp_path: Path, quantized: dict[str, Path]) -> None:
    copy = rewritten(quantized["awq"], tmp_path / "m", lambda t: None)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the file is truncated"):
        inspect(copy)


def test_engines_are_told_of_one_version(quantized: dict[str, Path]) -> None:
    for known in ENGINES:
        assert known.version and re.fullmatch(r"20\d\d-\d\d", known.date)
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    assert engines_table() in page
    assert "| SGLang 0.5.23 " in inspect(quantized["gptq"]).to_markdown()


@pytest.mark.parametrize("name", ["cpu_tile_a16", "native"])
def test_our_own_formats_are_nobody_elses(name: str) -> None:
    served = {e.name for e in engines_for(name, {"a": QuantScheme.parse("w4a16_g128")}, (), ()) if e.serves}
    assert served == {"qkernels", "vLLM with qkernels"}


def test_what_a_format_is_read_by() -> None:
    def served(name: str, scheme: str) -> set[str]:
        return {e.name for e in engines_for(name, {"a.q": QuantScheme.parse(scheme)}, (), ()) if e.serves}

    assert served("hqq", "w4a16_g64_fzero") == {"qkernels", "transformers", "vLLM with qkernels"}
    assert "vLLM" in served("compressed-tensors float-quantized", "fp8_tensor") & served("awq gemv", "w4a16_g128_asym")
    experts = engines_for("gptq", {"mlp.experts.0.up_proj": QuantScheme.parse("w4a16_g128")}, (), ())
    assert all(engine.serves for engine in experts)
