"""Floating-point weights in files: written here by the formulas of each format, read, and what is refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qkernels import inspect
from qkernels.checkpoint import open_checkpoint
from qkernels.checkpoint.registry import detect
from qkernels.errors import CheckpointError
from qkernels.formats import READ_ONLY
from qkernels.storage import write_json
from tests.formats.floating_files import (
    CT,
    CT_MXFP4,
    CT_NVFP4,
    DEEPSEEK,
    EDGE,
    FILES,
    MODELOPT,
    MX4,
    NV4M,
    compressed,
    e4m3,
    pairs,
)
from tests.strategies import same_weight


def read(tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    return detect(config).parse("m", tensors, config)


@pytest.mark.parametrize("name", FILES)
def test_read_as_written(name: str) -> None:
    weight, tensors, config = FILES[name]
    assert same_weight(read(tensors, config).weight, weight)


def test_a_short_last_block_is_one_of_128() -> None:
    """200 rows are 128 and 72; two even blocks of 100 would give row 100 the second scale."""
    stored = torch.ones(200, 128).to(torch.float8_e4m3fn)
    found = read({"weight": stored, "weight_scale_inv": torch.tensor([[2.0], [3.0]])}, DEEPSEEK).weight.dequantize()
    assert found[127, 0] == 2
    assert found[128, 0] == 3


def test_what_the_second_scale_of_nvfp4_does() -> None:
    two = {"weight_scale": torch.full((1, 1), 2.0).to(torch.float8_e4m3fn)}
    codes = torch.full((1, 8), 0x21, dtype=torch.uint8)  # 0.5 at even columns, 1 at odd ones
    divided = read(two | {"weight_packed": codes, "weight_global_scale": torch.tensor([4.0])}, CT_NVFP4).weight
    assert divided.dequantize()[0, :2].tolist() == [0.25, 0.5]
    multiplied = read(two | {"weight": codes, "weight_scale_2": torch.tensor(4.0)}, MODELOPT).weight
    assert multiplied.dequantize()[0, :2].tolist() == [4.0, 8.0]


def test_activations_that_stay_in_16_bits_are_said() -> None:
    _, tensors, config = FILES["ct channel"]
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
    kinds = [
        read(tensors, config).oddities[0].kind,
        read(*FILES["deepseek"][1:]).oddities[0].kind,
        read(FILES["modelopt nvfp4"][1] | {"input_scale": torch.ones(())}, MODELOPT).oddities[0].kind,
    ]
    del config["config_groups"]["group_0"]["input_activations"]
    assert kinds == [
        "the config asks for 8-bit float activations, quantized per token",
        "the config asks for 8-bit float activations, dynamic",
        "the config asks for 4-bit float activations",
    ]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ct mxfp4", {"weight_scale": torch.ones(24, 3)}, "weight_scale must be bytes that are powers of two"),
        ("ct mxfp4", {"weight_scale": torch.full((24, 3), 255, dtype=torch.uint8)}, "scales must be finite, got 72 NaN"),
        ("ct channel", {"weight_scale": torch.ones(200, 1).byte()}, "weight_scale must be .*float8_e8m0fnu.* got uint8"),
        ("ct channel", {"weight_scale": torch.full((200, 1), torch.nan)}, "scales must be finite"),
        ("ct channel", {"weight": torch.full((200, 160), torch.nan).to(torch.float8_e4m3fn)}, "codes must be numbers of e4m3"),
        ("ct channel", {"weight_zero_point": torch.ones(200, 1)}, "have no zero points"),
        ("ct block", {"weight_scale": torch.ones(1, 1)}, r"weight_scale must be .* \[2, 2\]"),
        ("deepseek v4", {"scale": torch.ones(2, 2)}, "scale must be bytes that are powers of two"),
        ("deepseek v4", {"scale": torch.full((2, 2), 255, dtype=torch.uint8)}, "scales must be finite"),
        ("deepseek v4", {"weight": pairs(MX4).view(torch.int8)}, "weight is int8, which is two 4-bit floats .* fp4, got None"),
        ("deepseek v4 experts", {"scale": torch.ones(24, 3).to(torch.float8_e4m3fn)}, "scale must be bytes that are powers"),
        ("deepseek", {"weight_scale_inv": torch.ones(2, 1)}, r"weight_scale_inv must be .* \[2, 2\]"),
        ("deepseek", {"weight_scale_inv": torch.ones(2, 2).byte()}, "weight_scale_inv must be .* got uint8"),
        ("ct nvfp4", {"weight_global_scale": torch.zeros(1)}, "weight_global_scale must be a positive number, got 0.0"),
        ("ct nvfp4", {"weight_global_scale": torch.full((1,), torch.inf)}, "weight_global_scale must be a positive number"),
        ("ct nvfp4", {"weight_scale": torch.ones(24, 6)}, "weight_scale must be float8_e4m3fn"),
        ("modelopt nvfp4", {"weight_scale_2": torch.tensor(torch.nan)}, "weight_scale_2 must be a positive number, got nan"),
        ("modelopt fp8", {"weight_scale_2": torch.ones(())}, "quant_algo is FP8, which needs a float8_e4m3fn weight and no"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(name: str, changes: dict[str, Tensor], message: str) -> None:
    _, tensors, config = FILES[name]
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        read(tensors | changes, config)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ct nvfp4", CT_MXFP4, "weight_global_scale must be absent for mxfp4-pack-quantized"),
        ("ct mxfp4", CT_NVFP4, "weight_global_scale must be there for nvfp4-pack-quantized"),
        ("ct mxfp4", compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=16), "group_size must be 32"),
        ("ct channel", compressed("float-quantized", num_bits=8, strategy="block"), "block_structure must be two equal sides"),
        ("ct channel", compressed("float-quantized", num_bits=8, type="int", strategy="channel"), "must be of type float"),
        ("deepseek", DEEPSEEK | {"weight_block_size": [1, 128]}, "weight_block_size must be two equal sides"),
        ("deepseek", DEEPSEEK | {"fmt": "e5m2"}, "fmt of the quantization_config must be e4m3"),
        ("modelopt nvfp4", MODELOPT | {"quant_algo": "W4A16_AWQ"}, "quant_algo must be NVFP4, .*got 'W4A16_AWQ'"),
        ("modelopt fp8", MODELOPT | {"quant_algo": "MIXED_PRECISION"}, "quantized_layers has no object for it"),
    ],
)  # fmt: skip
def test_configs_that_contradict(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: .*{message}"):
        read(FILES[name][1], config)


def directory(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    save_file({name: t.clone() for name, t in tensors.items()}, path / "model.safetensors")
    write_json(path / "config.json", {"model_type": "llama"} | ({"quantization_config": config} if config else {}))
    return path


def test_several_kinds_in_one_file(tmp_path: Path) -> None:
    parts = {"a": "ct nvfp4", "b": "ct channel", "c": "ct block", "d": "ct mxfp4", "e": "ct mxfp8"}
    tensors = {f"{module}.{suffix}": t for module, name in parts.items() for suffix, t in FILES[name][1].items()}
    groups = {
        name: FILES[name][2]["config_groups"]["group_0"] | {"targets": [module]} for module, name in parts.items()
    }
    directory(
        tmp_path, tensors | {"f.weight": torch.ones(4, 4)}, CT | {"format": "mixed-precision", "config_groups": groups}
    )
    opened = open_checkpoint(tmp_path)
    assert opened.names() == ["f.weight"]
    for module, name in parts.items():
        assert same_weight(opened.weight(module).weight, FILES[name][0])
    assert inspect(tmp_path).schemes == dict.fromkeys(
        ["nvfp4_g16", "fp8_channel", "fp8_block128", "mxfp4_g32", "fp8_g32"], 1
    )


def test_codes_without_their_scale_are_no_weight(tmp_path: Path) -> None:
    codes = {"a.weight": e4m3(EDGE), "b.weight": e4m3(EDGE), "a.weight_scale_inv": EDGE.scales[::128].contiguous()}
    with pytest.raises(CheckpointError, match=r"b.weight is float8_e4m3fn, but b has no weight_scale_inv"):
        open_checkpoint(directory(tmp_path, codes, DEEPSEEK))


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    directory(tmp_path, {f"m.{suffix}": t for suffix, t in FILES["modelopt nvfp4"][1].items()}, None)
    own = {
        "producer": {"name": "modelopt", "version": "0.41"},
        "quantization": {"quant_algo": "NVFP4", "group_size": 16},
    }
    write_json(tmp_path / "hf_quant_config.json", own)
    assert same_weight(open_checkpoint(tmp_path).weight("m").weight, NV4M)


def test_they_are_registered() -> None:
    assert {detect(config).name for _, _, config in FILES.values()} <= READ_ONLY.keys()
