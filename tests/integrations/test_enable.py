"""After `enable()`, `from_pretrained` reads checkpoints of every origin as `load` does; quantizing floats stays transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GPTQConfig,
    Mxfp4Config,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qkernels import RTN, QuantTensor, load
from qkernels.errors import ArgumentError
from qkernels.formats import METADATA
from qkernels.integrations.configs import METHODS
from qkernels.integrations.transformers import QKernelsConfig, enable
from qkernels.storage import read_json, write_json
from tests.checkpoints import logits, plain_checkpoint, small_llama
from tests.formats.floating_files import DEEPSEEK, MODELOPT, e4m3, nvfp4
from tests.formats.packers import auto_round, auto_round_config, bitsandbytes, hqq, torchao, torchao_config
from tests.moe_models import shipped

Parts = Callable[[QuantTensor], dict[str, Tensor]]


def int8(weight: QuantTensor) -> dict[str, Tensor]:
    return {"weight": (weight.codes.short() - 128).to(torch.int8), "SCB": weight.scales[:, 0].float() * 127}


def blocks(weight: QuantTensor) -> dict[str, Tensor]:
    return {"weight": e4m3(weight), "weight_scale_inv": weight.scales[::128].float().contiguous()}


BNB = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}
# By what the file says: the scheme, how a module's tensors are made of a weight, and its quantization_config.
FILES: dict[str, tuple[str, Parts, dict[str, Any]]] = {
    "auto-round": (
        "w4a16_g32_asym",
        lambda w: auto_round(w, "auto_round:auto_gptq"),
        auto_round_config("auto_round:auto_gptq", group_size=32),
    ),
    "auto-round of old": (
        "w4a16_g32_asym",
        lambda w: auto_round(w, "auto_round:auto_gptq"),
        auto_round_config("auto_round:auto_gptq", group_size=32) | {"quant_method": "intel/auto-round"},
    ),
    "bitsandbytes 4 bits": ("nf4_g64", bitsandbytes, BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes 8 bits": ("w8a16_channel", int8, BNB | {"load_in_8bit": True, "bnb_4bit_compute_dtype": "float32"}),
    "hqq": ("w4a16_g32_fzero", hqq, {"quant_method": "hqq"}),
    "fp8": ("fp8_block128", blocks, DEEPSEEK),
    "modelopt": (
        "nvfp4m_g16", lambda w: nvfp4(w, "weight", "weight_scale_2", 0),
        MODELOPT | {"exclude_modules": ["lm_head"]},
    ),
    "torchao": ("w8a16_channel", torchao, {"quant_method": "torchao"}),
}  # fmt: skip


def written(name: str, directory: Path) -> Path:
    """A small Llama in such a file."""
    scheme, parts, declared = FILES[name]
    plain_checkpoint(directory, hidden_size=128, intermediate_size=128)
    linears = [n for n, m in small_llama().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    file, metadata = directory / "model.safetensors", {"format": "pt"}
    tensors = load_file(file)
    for module in linears:
        scales = torch.float32 if name.startswith(("bitsandbytes", "fp8")) else None
        weight = RTN(scale_dtype=scales).with_scheme(scheme).quantize(tensors.pop(f"{module}.weight"))
        tensors |= {f"{module}.{leaf}": t.contiguous() for leaf, t in parts(weight).items()}
        if name == "torchao":
            metadata |= torchao_config("Int8Tensor", [1, 128], f"{module}")[METADATA]
    save_file(tensors, file, metadata)
    write_json(directory / "config.json", read_json(directory / "config.json") | {"quantization_config": declared})
    return directory


def test_each_method_has_a_file() -> None:
    tried = {name.partition(" ")[0] for name in FILES}
    assert tried | {"gptq", "awq", "compressed-tensors", "mxfp4"} == set(
        METHODS
    )  # test_transformers.py has the first three


@pytest.mark.parametrize("name", FILES)
def test_reads_what_load_reads(name: str, tmp_path: Path) -> None:
    directory = written(name, tmp_path / "stored")
    enable()
    read = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert len(read.hf_quantizer.report.replaced) == 14
    assert torch.equal(logits(read), logits(load(directory, dtype="float32")))
    read.save_pretrained(tmp_path / "native")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "native")), logits(read))


def test_mxfp4_experts(tmp_path: Path) -> None:
    shipped(tmp_path / "stored")
    enable()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype=torch.float32)
    assert len(read.hf_quantizer.report.replaced) == 4  # two stacks of two layers
    assert torch.equal(logits(read), logits(load(tmp_path / "stored", dtype="float32")))


class Theirs:
    """In place of a quantizer of transformers, whose packages are not here."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(config).__name__}, {kwargs['pre_quantized']}")


def test_quantizing_floats_stays_transformers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = plain_checkpoint(tmp_path / "plain")
    for key in ("gptq", "bitsandbytes_4bit", "fp8"):
        monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, key, Theirs)
    enable()
    enable("gptq")  # a second time it is still theirs behind ours
    for config in (GPTQConfig(bits=4), BitsAndBytesConfig(load_in_4bit=True), FineGrainedFP8Config()):
        with pytest.raises(NotImplementedError, match=f"{type(config).__name__}, False"):
            AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    ours = AutoModelForCausalLM.from_pretrained(directory, quantization_config=QKernelsConfig("w4a16_g32"))
    assert len(ours.hf_quantizer.report.replaced) == 14


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("fp8", FineGrainedFP8Config(dequantize=True)), ("mxfp4", Mxfp4Config(dequantize=True)),
    ],
    ids=["fp8", "mxfp4"],
)  # fmt: skip
def test_floats_asked_of_a_packed_file_are_refused(name: str, config: Any, tmp_path: Path) -> None:
    if name == "fp8":
        written(name, tmp_path / "stored")
    else:
        shipped(tmp_path / "stored")
    enable()
    with pytest.raises(ArgumentError, match=f"{type(config).__name__}.dequantize=True. asks for floats"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "stored", quantization_config=config)
