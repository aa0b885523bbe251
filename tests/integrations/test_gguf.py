"""`from_pretrained(directory, gguf_file=…)` after `enable()`: what `load` makes of the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qkernels import QuantLinear, load
from qkernels.checkpoint import to_gguf
from qkernels.errors import ArgumentError
from qkernels.integrations.transformers import enable
from qkernels.nn import QuantEmbedding, QuantExperts
from tests.checkpoints import logits
from tests.gguf_golden import FILES

if "gguf" not in AUTO_QUANTIZER_MAPPING:
    pytest.skip("this transformers asks nobody about GGUF files", allow_module_level=True)
theirs = pytest.importorskip("transformers.integrations.gguf")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What transformers asks is global."""
    mappings = (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, theirs.GGUF_CONFIG_ARCHS)
    before, reader = [dict(mapping) for mapping in mappings], theirs.read_gguf_metadata
    yield
    for mapping, old in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(old)
    theirs.read_gguf_metadata = reader


@pytest.mark.parametrize("name", ["llama-mixed", "llama", "qwen3", "mistral", "gemma3"])
def test_models_are_those_of_load(name: str, tmp_path: Path) -> None:
    enable()
    enable("gguf")
    model, loaded = AutoModelForCausalLM.from_pretrained(FILES, gguf_file=f"{name}.gguf"), load(FILES / f"{name}.gguf")
    assert (type(model), model.dtype) == (type(loaded), loaded.dtype)
    assert torch.equal(logits(model), logits(loaded))
    kinds = (QuantLinear, QuantEmbedding)
    packed = [
        sum(isinstance(module, kinds[0]) - isinstance(module, kinds[1]) for module in m.modules())
        for m in (model, loaded)
    ]
    assert packed[0] == packed[1] == {"llama-mixed": 13, "qwen3": 4}.get(name, 0)
    assert len(model.hf_quantizer.report.replaced) == packed[0] if packed[0] else not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(loaded))


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("mixtral", 2),
        ("qwen2moe", 1),
        ("qwen3moe", 0),
        ("olmoe", 0),
        ("deepseek2", 0),
        ("deepseek3", 1),
        ("gpt-oss", 2),
    ],
)
def test_mixtures_are_those_of_load(name: str, packed: int) -> None:
    enable()
    model, loaded = AutoModelForCausalLM.from_pretrained(FILES, gguf_file=f"{name}.gguf"), load(FILES / f"{name}.gguf")
    assert type(model) is type(loaded)
    torch.testing.assert_close(logits(model), logits(loaded), rtol=1e-5, atol=1e-5)
    assert [sum(isinstance(module, QuantExperts) for module in m.modules()) for m in (model, loaded)] == [
        packed,
        packed,
    ]


@pytest.mark.parametrize("type", ["Q8_0", "F16"])
def test_embeddings_that_become_floats_are_named(type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log and in the report, where all else of the file is packed; of an embedding in floats there is nothing to say."""
    to_gguf(FILES / "qwen3.gguf", tmp_path / "m.gguf", "Q8_0", tensor_types=[("token_embd", type)])
    enable()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    said = [line for line in caplog.messages if "embeddings are dequantized while loading" in line]
    skipped = model.hf_quantizer.report.skipped
    if type == "F16":
        assert not said and "model.embed_tokens" not in skipped
        return
    assert len(said) == 1 and "of Q8_0 become" in said[0] and "qkernels.load keeps them packed" in said[0]
    assert "embeddings are dequantized" in skipped["model.embed_tokens"]


def test_biases_go_with_their_weights(tmp_path: Path) -> None:
    to_gguf(FILES / "qwen2.gguf", tmp_path / "m.gguf", "Q8_0")
    enable()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantLinear)
    assert layer.bias is not None
    packed = load(tmp_path / "m.gguf", dtype=torch.float32)  # so is its tied head, which from_pretrained has in floats
    torch.testing.assert_close(logits(model), logits(packed), rtol=1e-5, atol=1e-5)


def test_configs_have_what_only_tensors_say() -> None:
    enable()
    config = AutoConfig.from_pretrained(FILES, gguf_file="llama.gguf")
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["original_max_position_embeddings"] == 64


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    enable()
    with pytest.raises(ArgumentError, match="dequantize=True. asks for floats, and enable.. for packed weights"):
        AutoModelForCausalLM.from_pretrained(
            FILES, gguf_file="llama-mixed.gguf", quantization_config=GgufConfig(dequantize=True)
        )
    metadata = {"general.architecture": "llama"}
    with pytest.raises(ArgumentError, match="before enable.. was called"):
        theirs.get_gguf_config(metadata, ())
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "gguf")
    enable()
    with pytest.raises(ArgumentError, match="asks nobody about GGUF files"):
        enable("gguf")
