"""Formats that are only read: whatever their tensors and configs hold, the answer is a weight or a `CheckpointError`."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qkernels import inspect
from qkernels.checkpoint import convert, open_checkpoint
from qkernels.checkpoint.registry import WRITTEN
from qkernels.errors import CheckpointError, ConversionError
from qkernels.formats import METADATA, READ_ONLY
from qkernels.storage import write_json
from tests.formats import floating_files
from tests.formats.packers import (
    auto_round,
    auto_round_config,
    bitsandbytes,
    compressed_config,
    gemv,
    gemv_config,
    gemv_fast,
    hqq,
    planar_config,
    planar_tensors,
    torchao,
    torchao_config,
)
from tests.strategies import random_weight


class Case(NamedTuple):
    tensors: dict[str, Tensor]
    config: dict[str, Any]


STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False}


def cases() -> dict[str, Case]:
    asym, channel = random_weight("w4a16_g64_asym", 64, 128), random_weight("w8a16_channel", 16, 96)
    int8 = {"weight": (channel.codes.short() - 128).to(torch.int8)}
    integers = compressed_config("w8a16_channel") | {"format": "int-quantized"}
    integers["config_groups"]["group_0"] |= {"format": "int-quantized", "input_activations": STATIC}
    of_x = {"input_scale": torch.tensor([0.5]), "input_zero_point": torch.tensor([3], dtype=torch.int8)}
    nf4, fzero = random_weight("nf4_g64", 16, 128, dtype=torch.float32), random_weight("w4a16_g64_fzero", 12, 128)
    five = random_weight("w5a16_g64_asym", 64, 128)
    bnb = {"quant_method": "bitsandbytes"}
    return {
        "compressed-tensors int-quantized": Case(int8 | {"weight_scale": channel.scales} | of_x, integers),
        "compressed-tensors float-quantized": Case(*floating_files.FILES["ct block"][1:]),
        "compressed-tensors fp4-pack-quantized": Case(*floating_files.FILES["ct nvfp4"][1:]),
        "compressed-tensors mixed-precision": Case(*floating_files.MIXED),
        "fp8": Case(*floating_files.FILES["deepseek"][1:]),
        "modelopt": Case(*floating_files.FILES["modelopt nvfp4"][1:]),
        "awq gemv": Case(gemv(asym), gemv_config(64)),
        "awq gemv_fast": Case(gemv_fast(asym), gemv_config(64, "gemv_fast")),
        "bitsandbytes 4-bit": Case(bitsandbytes(nf4), bnb | {"load_in_4bit": True}),
        "bitsandbytes int8": Case(int8 | {"SCB": channel.scales[:, 0].float()}, bnb | {"load_in_8bit": True}),
        "hqq": Case(hqq(fzero), {"quant_method": "hqq"}),
        "auto-round": Case(auto_round(asym, "auto_round"), auto_round_config("auto_round", group_size=64)),
        "mxfp4": Case(
            {"blocks": torch.randint(256, (2, 8, 3, 16)).byte(), "scales": torch.randint(100, 140, (2, 8, 3)).byte()},
            {"quant_method": "mxfp4"},
        ),
        "planar gptq_p": Case(planar_tensors(five), planar_config(five)),
        "quanto": Case(
            {"weight._data": int8["weight"], "weight._scale": channel.scales},
            {"quant_method": "quanto", "modules": {key: {"weights": "qint8"} for key in ("m", "layers.0.a")}},
        ),
        "fp8 of DeepSeek-V4": Case(*floating_files.FILES["deepseek v4"][1:]),
        "torchao": Case(torchao(channel), torchao_config("Int8Tensor", [1, 96])),
    }


CASES = cases()
JUNK: list[Any] = [None, True, 0, -1, 5, 2**70, 1.5, "", "4", [], [1], {}, {"a": 1}, {"(": {}}, {"m": {"bits": "x"}}]
OTHERS = [
    torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(0, 0), torch.zeros(5, 5).int(), torch.zeros(1, 1, 1),
    *(torch.zeros(16, 128, dtype=d) for d in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64)),
    torch.zeros(16, 128, dtype=torch.float8_e4m3fn),
]  # fmt: skip
EACH = pytest.mark.parametrize("name", CASES)


def test_every_one_has_a_case() -> None:
    assert CASES.keys() == READ_ONLY.keys()


def sound_or_refused(name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> bool:
    try:
        READ_ONLY[name].parse("m", tensors, config)
    except CheckpointError:
        return False
    return True


@EACH
def test_tensors_of_every_other_dtype_and_shape(name: str) -> None:
    tensors, config = CASES[name]
    assert sound_or_refused(name, tensors, config)
    outcomes = [sound_or_refused(name, tensors | {key: other}, config) for key in tensors for other in OTHERS]
    assert False in outcomes


@EACH
def test_every_field_of_the_config_replaced_by_junk(name: str) -> None:
    tensors, config = CASES[name]
    for field in {*config, "bits", "group_size", "extra_config", "ignore", "quantized_layers"} - {METADATA}:
        for junk in JUNK:
            changed = config | {field: junk}
            if READ_ONLY[name].matches(changed):
                sound_or_refused(name, tensors, changed)


@EACH
def test_a_whole_checkpoint(name: str, tmp_path: Any) -> None:
    """Found in a directory beside norms and biases, inspected, and converted without loss."""
    tensors, config = CASES[name].tensors, dict(CASES[name].config)
    source = tmp_path / "source"
    source.mkdir()
    stored = {f"layers.0.a{READ_ONLY[name].joint}{suffix}": t.clone() for suffix, t in tensors.items()}
    # torchao keeps what its tensors are in the header; it does no harm to the others
    header = {f"layers.0.a{key.removeprefix('m')}": text for key, text in config.pop(METADATA, {}).items()}
    others = {"norm.weight": torch.ones(8), "layers.0.a.bias": torch.ones(4)}
    save_file(stored | others, source / "model.safetensors", header)
    write_json(source / "config.json", {"model_type": "llama", "quantization_config": config})
    found = inspect(source)
    assert [layer.name for layer in found.layers] == ["layers.0.a"]
    assert found.format == name
    assert {tensor.name for tensor in found.unquantized} == {"norm.weight", "layers.0.a.bias"}
    weight = open_checkpoint(source).weight("layers.0.a").weight
    if READ_ONLY[name].rows_as_stored:  # which need a model to be understood
        with pytest.raises(ConversionError, match="load .* and save it"):
            convert(source, tmp_path / "native", "native")
        return
    convert(source, tmp_path / "native", "native")
    for target in WRITTEN:
        try:
            convert(source, tmp_path / target, target, overwrite=True)
        except ConversionError:
            continue
        again = open_checkpoint(tmp_path / target).weight("layers.0.a").weight
        assert torch.equal(again.dequantize(), weight.dequantize()), target
