"""Floating-point weights and the files that hold them, by the formulas of each format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import QuantTensor
from tests.strategies import random_weight

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
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
V4 = DEEPSEEK | {"scale_fmt": "ue8m0", "__scale__": True}


def e4m3(weight: QuantTensor) -> Tensor:
    return weight.codes.view(torch.float8_e4m3fn)


def pairs(weight: QuantTensor) -> Tensor:
    return weight.codes[:, ::2] | weight.codes[:, 1::2] << 4


def nvfp4(weight: QuantTensor, name: str, outer: str, dim: int = 1) -> dict[str, Tensor]:
    assert weight.factors is not None
    number = weight.factors.outer[0, 0]
    return {name: pairs(weight), "weight_scale": weight.factors.small, outer: number.reshape([1] * dim)}


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
    "ct mxfp4": (MX4, {"weight_packed": pairs(MX4), "weight_scale": MX4.scales.view(torch.uint8)}, CT_MXFP4),
    "ct nvfp4": (NV4, nvfp4(NV4, "weight_packed", "weight_global_scale"), CT_NVFP4),
    "deepseek": (EDGE, {"weight": e4m3(EDGE), "weight_scale_inv": EDGE.scales[::128].contiguous()}, DEEPSEEK),
    "deepseek v4": (EDGE8, {"weight": e4m3(EDGE8), "scale": EDGE8.scales[::128].contiguous()}, V4),
    "deepseek v4 experts": (
        MX4, {"weight": pairs(MX4).view(torch.int8), "scale": MX4.scales}, V4 | {"expert_dtype": "fp4"}
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
