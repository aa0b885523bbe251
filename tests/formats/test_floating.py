"""Floating-point weights in files: written here by the formulas of each format, read, and what is refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qkernels import QuantTensor, inspect
from qkernels.checkpoint import open_checkpoint
from qkernels.checkpoint.registry import detect
from qkernels.errors import CheckpointError
from qkernels.formats import READ_ONLY
from qkernels.storage import write_json
from tests.strategies import random_weight, same_weight

CT = {"quant_method": "compressed-tensors", "version": "0.20.0"}


def group(body: str | None, targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "format": body, "weights": {"symmetric": True, "type": "float"} | weights}


def compressed(body: str, **weights: Any) -> dict[str, Any]:
    return CT | {"format": body, "config_groups": {"group_0": group(body, ["Linear"], **weights)}}


FP8 = {"num_bits": 8, "strategy": "channel"}
BLOCKS = FP8 | {"strategy": "block", "block_structure": [128, 128]}
CT_NVFP4 = compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)
CT_MXFP4 = compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)
CT_MXFP8 = compressed("mxfp8-quantized", num_bits=8, strategy="group", group_size=32)
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
V4 = DEEPSEEK | {"scale_fmt": "ue8m0", "__scale__": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def e4m3(weight: QuantTensor) -> Tensor:
    return weight.codes.view(torch.float8_e4m3fn)


def packed(weight: QuantTensor) -> Tensor:
    return weight.codes[:, ::2] | weight.codes[:, 1::2] << 4


def nvfp4(weight: QuantTensor, name: str, outer: str, dim: int = 1) -> dict[str, Tensor]:
    assert weight.factors is not None
    number = weight.factors.outer[0, 0]
    return {name: packed(weight), "weight_scale": weight.factors.small, outer: number.reshape([1] * dim)}


def one_outer(scheme: str) -> QuantTensor:
    weight = random_weight(scheme, 24, 96)
    assert weight.factors is not None
    outer = torch.full_like(weight.factors.outer, 0.37, dtype=torch.float32)
    factors = type(weight.factors)(weight.factors.small, outer)
    return QuantTensor.from_factors(weight.codes, factors, weight.scheme)


def powers(scheme: str) -> QuantTensor:
    weight = random_weight(scheme, 24, 96)
    scales = (120 + torch.arange(72, dtype=torch.uint8).reshape(24, 3) % 9).view(torch.float8_e8m0fnu)
    return QuantTensor(weight.codes, scales, None, None, weight.scheme)


MX4, MX8, NV4, NV4M = powers("mxfp4_g32"), powers("fp8_g32"), one_outer("nvfp4_g16"), one_outer("nvfp4m_g16")
CHANNEL, TENSOR, EDGE = (
    random_weight(f"fp8_{kind}", 200, 160, dtype=torch.float32) for kind in ("channel", "tensor", "block128")
)
EDGE8 = QuantTensor(
    EDGE.codes, (118 + torch.arange(2 * 2, dtype=torch.uint8).reshape(2, 2)).repeat_interleave(128, 0)[:200].contiguous()
    .view(torch.float8_e8m0fnu), None, None, EDGE.scheme,
)  # fmt: skip

FILES: dict[str, tuple[QuantTensor, dict[str, Tensor], dict[str, Any]]] = {
    "ct channel": (CHANNEL, {"weight": e4m3(CHANNEL), "weight_scale": CHANNEL.scales}, compressed("float-quantized", **FP8)),
    "ct naive": (CHANNEL, {"weight": e4m3(CHANNEL), "weight_scale": CHANNEL.scales}, compressed("naive-quantized", **FP8)),
    "ct tensor": (
        TENSOR,
        {"weight": e4m3(TENSOR), "weight_scale": TENSOR.scales[0]},
        compressed("float-quantized", **FP8 | {"strategy": "tensor"}),
    ),
    "ct block": (
        EDGE, {"weight": e4m3(EDGE), "weight_scale": EDGE.scales[::128].contiguous()}, compressed("float-quantized", **BLOCKS)
    ),
    "ct mxfp8": (MX8, {"weight": e4m3(MX8), "weight_scale": MX8.scales.view(torch.uint8)}, CT_MXFP8),
    "ct mxfp4": (MX4, {"weight_packed": packed(MX4), "weight_scale": MX4.scales.view(torch.uint8)}, CT_MXFP4),
    "ct nvfp4": (NV4, nvfp4(NV4, "weight_packed", "weight_global_scale"), CT_NVFP4),
    "deepseek": (EDGE, {"weight": e4m3(EDGE), "weight_scale_inv": EDGE.scales[::128].contiguous()}, DEEPSEEK),
    "deepseek v4": (EDGE8, {"weight": e4m3(EDGE8), "scale": EDGE8.scales[::128].contiguous()}, V4),
    "deepseek v4 experts": (
        MX4, {"weight": packed(MX4).view(torch.int8), "scale": MX4.scales}, V4 | {"expert_dtype": "fp4"}
    ),
    "fp8 tensor": (
        TENSOR,
        {"weight": e4m3(TENSOR), "weight_scale_inv": TENSOR.scales[0, 0]},
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "modelopt nvfp4": (NV4M, nvfp4(NV4M, "weight", "weight_scale_2", 0), MODELOPT),
    "modelopt fp8": (TENSOR, {"weight": e4m3(TENSOR), "weight_scale": TENSOR.scales[0, 0]}, MODELOPT | {"quant_algo": "FP8"}),
    "modelopt mixed": (
        TENSOR,
        {"weight": e4m3(TENSOR), "weight_scale": TENSOR.scales[0, 0]},
        MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"m": {"quant_algo": "FP8"}}},
    ),
}  # fmt: skip
MIXED = (
    FILES["ct mxfp4"][1],
    CT | {"format": "mixed-precision", "config_groups": {"group_0": CT_MXFP4["config_groups"]["group_0"]}},
)


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
        ("deepseek v4", {"weight": packed(MX4).view(torch.int8)}, "weight is int8, which is two 4-bit floats .* fp4, got None"),
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
