"""from_pretrained and save_pretrained with QuantLinear: on the fly, from every format, and with an adapter on top."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaForCausalLM,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qkernels import QuantLinear, load, replace_linear, save
from qkernels.errors import ArgumentError, CheckpointError, QKernelsError, SchemeError
from qkernels.integrations import transformers as plugin
from qkernels.integrations.transformers import QKernelsConfig, enable
from qkernels.nn.selection import A_HEAD
from tests.checkpoints import logits, plain_checkpoint, rewritten, train_adapters
from tests.strategies import same_weight


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The registries of transformers are global."""
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    yield
    for mapping, old in zip((AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING), before, strict=True):
        mapping.clear()
        mapping.update(old)


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def same_model(a: nn.Module, b: nn.Module) -> bool:
    left, right = layers(a), layers(b)
    same = all(same_weight(left[n].quant_tensor(), right[n].quant_tensor()) for n in left.keys() & right.keys())
    return same and left.keys() == right.keys() and torch.equal(logits(a), logits(b))


def from_pretrained(directory: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **fields)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_quantizes_while_loading(tmp_path: Path, biased: bool, tied: bool) -> None:
    fields = {"attention_bias": biased, "mlp_bias": biased, "tie_word_embeddings": tied}
    directory = plain_checkpoint(tmp_path / "plain", **fields)

    def fill(tensors: dict[str, Tensor]) -> None:
        g = torch.Generator().manual_seed(1)
        tensors.update({n: torch.randn(t.shape, generator=g) for n, t in tensors.items() if n.endswith(".bias")})

    directory = rewritten(directory, tmp_path / "filled", fill)
    expected = LlamaForCausalLM.from_pretrained(directory)
    replace_linear(expected, "w4a16_g32")
    model = from_pretrained(directory, quantization_config=QKernelsConfig("w4a16_g32"))
    assert len(layers(model)) == 14
    assert same_model(model, expected)
    report = model.hf_quantizer.report
    assert len(report.replaced) == 14
    assert report.bytes_after < report.bytes_before
    assert report.skipped == {"lm_head": A_HEAD}
    assert not any(p.is_meta for p in model.parameters())


def test_overrides_and_exclusions(tmp_path: Path) -> None:
    directory = plain_checkpoint(tmp_path / "plain")
    config = QKernelsConfig("w4a16_g32", exclude=("lm_head", "*.q_proj"), overrides={"*.down_proj": "w8a16_channel"})
    model = from_pretrained(directory, quantization_config=config, dtype=torch.bfloat16)
    schemes = {name: str(layer.scheme) for name, layer in layers(model).items()}
    assert schemes["model.layers.1.mlp.down_proj"] == "w8a16_channel"
    assert schemes["model.layers.1.mlp.up_proj"] == "w4a16_g32"
    assert "model.layers.0.self_attn.q_proj" not in schemes
    assert model.hf_quantizer.report.skipped["model.layers.0.self_attn.q_proj"] == "excluded"
    assert {layer.dtype for layer in layers(model).values()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "out")
    assert same_model(from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_round_trips(tmp_path: Path, tied: bool) -> None:
    directory = plain_checkpoint(tmp_path / "plain", tie_word_embeddings=tied)
    model = from_pretrained(directory, quantization_config=QKernelsConfig("w3a16_g32_asym"))
    model.save_pretrained(tmp_path / "out")
    assert same_model(from_pretrained(tmp_path / "out"), model)
    assert same_model(load(tmp_path / "out"), model)
    again = from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["native", "cpu_tile_a16", "gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_reads_what_load_reads(tmp_path: Path, name: str) -> None:
    model = load(plain_checkpoint(tmp_path / "plain", attention_bias=True))
    replace_linear(model, "w4a16_g32")
    save(model, tmp_path / "stored", format=name)
    enable()
    read = from_pretrained(tmp_path / "stored")
    assert len(layers(read)) == 14
    assert same_model(read, load(tmp_path / "stored"))
    read.save_pretrained(tmp_path / "native")
    assert same_model(from_pretrained(tmp_path / "native"), read)


def test_a_second_import_and_a_second_enable_are_harmless(tmp_path: Path) -> None:
    enable()
    enable("gptq")
    fresh = importlib.reload(plugin)
    fresh.enable()
    assert AUTO_QUANTIZER_MAPPING["qkernels"] is fresh.QKernelsQuantizer
    directory = plain_checkpoint(tmp_path / "plain")
    assert layers(from_pretrained(directory, quantization_config=fresh.QKernelsConfig("w4a16_g32")))


def test_a_name_that_somebody_else_took() -> None:
    AUTO_QUANTIZER_MAPPING["qkernels"] = dict
    with pytest.raises(ArgumentError, match='quant_method "qkernels" is taken by builtins.dict'):
        plugin.register()


def test_mistakes_are_told(tmp_path: Path) -> None:
    directory = plain_checkpoint(tmp_path / "plain")
    with pytest.raises(SchemeError, match="a scheme looks like"):
        QKernelsConfig("int4")
    with pytest.raises(TypeError, match="bits"):
        QKernelsConfig(bits=4)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match=r"pattern '\*\.qkv' matches no linear layer"):
        from_pretrained(directory, quantization_config=QKernelsConfig(overrides={"*.qkv": "w8a16_g32"}))
    with pytest.raises(QKernelsError, match="no kernel for nf4_g4"):
        from_pretrained(directory, quantization_config=QKernelsConfig("nf4_g4"))
    with pytest.raises(ArgumentError, match="methods must be of gptq, awq, .*, gguf, got 'exl3'"):
        enable("exl3")


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    model = load(plain_checkpoint(tmp_path / "plain"))
    replace_linear(model, "w4a16_g32")
    save(model, tmp_path / "stored", format="gptq")
    enable()

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")

    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: scales must be finite"):
        from_pretrained(rewritten(tmp_path / "stored", tmp_path / "nan", spoil))


def test_experts_that_are_not_covered_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = JetMoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16,
        num_local_experts=2, num_experts_per_tok=2,
    )  # fmt: skip
    JetMoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    with caplog.at_level(logging.WARNING, logger=plugin.__name__):
        model = from_pretrained(tmp_path / "moe", quantization_config=QKernelsConfig("w4a16_g32"))
    named = {name: why for name, why in model.hf_quantizer.report.skipped.items() if "experts" in why}
    assert len(named) == 4
    assert all("stacked experts ([2, " in why and "bytes) are not supported yet" in why for why in named.values())
    assert all(name in caplog.text for name in named)
    model.save_pretrained(tmp_path / "out")
    assert same_model(from_pretrained(tmp_path / "out"), model)


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2's matrices lie transposed: quantized while loading as `replace_linear` does it, saved, loaded, dequantized."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    plain = GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path / "gpt2")
    replace_linear(plain, "w8a16_g32")
    model = from_pretrained(tmp_path / "gpt2", quantization_config=QKernelsConfig("w8a16_g32"))
    assert model.hf_quantizer.report.skipped == {"lm_head": A_HEAD}
    assert len(layers(model)) == 4
    assert same_model(model, plain)
    model.save_pretrained(tmp_path / "out")
    again = from_pretrained(tmp_path / "out")
    assert same_model(again, model)
    rounded = again.dequantize()
    rounded.save_pretrained(tmp_path / "rounded")
    assert torch.equal(logits(from_pretrained(tmp_path / "rounded")), logits(rounded))
    assert torch.allclose(logits(rounded), logits(model), atol=1e-4)


def test_dequantize(tmp_path: Path) -> None:
    model = from_pretrained(plain_checkpoint(tmp_path / "plain"), quantization_config=QKernelsConfig("w4a16_g32"))
    expected = {name: layer.dequantize() for name, layer in layers(model).items()}
    plain = model.dequantize()
    assert not layers(plain)
    assert all(torch.equal(plain.get_submodule(name).weight, weight) for name, weight in expected.items())


class Adapter(nn.Module):
    """y = layer(x) + B A x, the form of LoRA (Hu et al. 2021): B starts at zero."""

    def __init__(self, layer: QuantLinear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.A.T @ self.B.T


def test_an_adapter_trains_on_top(tmp_path: Path) -> None:
    """Ten steps: gradients reach every adapter, those below other quantized layers included; nothing else moves."""
    model = from_pretrained(plain_checkpoint(tmp_path / "plain"), quantization_config=QKernelsConfig("w4a16_g32"))
    model.requires_grad_(False)
    torch.manual_seed(0)
    adapters = {name: Adapter(layer) for name, layer in layers(model).items()}
    for name, adapter in adapters.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter)
    frozen = {name: adapter.layer.quant_tensor() for name, adapter in adapters.items()}
    train_adapters(model, [adapter.B for adapter in adapters.values()])
    assert all(same_weight(adapter.layer.quant_tensor(), frozen[name]) for name, adapter in adapters.items())
