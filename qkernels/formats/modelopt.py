"""Checkpoints of NVIDIA's ModelOpt: NVFP4, FP8, and both in one file; read.

| tensor (NVFP4) | dtype         | shape     | tensor (FP8)  | dtype         | shape              |
|----------------|---------------|-----------|---------------|---------------|--------------------|
| weight         | uint8         | [N, K/2]  | weight        | float8_e4m3fn | [N, K]             |
| weight_scale   | float8_e4m3fn | [N, K/16] | weight_scale  | float32       | [] or [1]; [N] per channel |
| weight_scale_2 | float32       | []        |               |               |                    |

A weight is code * weight_scale * weight_scale_2: the second scale multiplies, where that of compressed-tensors divides. Two codes
lie in a byte, the even column in the low half. input_scale belongs to activations, which stay in 16 bits.

The config is `quantization_config` of config.json or hf_quant_config.json: `quant_algo` is NVFP4, FP8, …, or MIXED_PRECISION
with an algorithm a module in `quantized_layers`. What a module's tensors are must be what the config says of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import Config, Format, Oddity, Parsed
from .floating import FP8_CHANNEL, FP8_TENSOR, NVFP4_MULTIPLIED, fp8, nvfp4
from .validation import naming

METHOD = "modelopt"
MIXED = "MIXED_PRECISION"
_NVFP4: Final = ("NVFP4", "W4A16_NVFP4")
_FP8: Final = {"FP8": FP8_TENSOR, "FP8_PER_CHANNEL_PER_TOKEN": FP8_CHANNEL}


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        algorithm = _algorithm(module, config)
        stored, scale, outer = tensors["weight"], tensors["weight_scale"], tensors.get("weight_scale_2")
        floats = stored.dtype == torch.float8_e4m3fn
        if (outer is None) != floats or floats != (algorithm in _FP8):
            needs = (
                "a float8_e4m3fn weight and no weight_scale_2"
                if algorithm in _FP8
                else "a uint8 weight and weight_scale_2"
            )
            raise CheckpointError(
                f"quant_algo is {algorithm}, which needs {needs}, "
                f"got {'no weight_scale_2' if outer is None else 'weight_scale_2'} and weight {stored.dtype}"
            )
        if outer is None:
            weight = fp8(stored, scale, _FP8[algorithm])
        else:
            weight = nvfp4(stored, scale, outer, NVFP4_MULTIPLIED, "weight", "weight_scale_2")
        return Parsed(weight, tuple(_oddities(tensors, algorithm)))


def _algorithm(module: str, config: Config) -> str:
    """What the config says of a module.

    Raises:
        CheckpointError: nothing, or an algorithm that is not read.
    """
    algorithm = config.get("quant_algo")
    if algorithm == MIXED:
        layers = config.get("quantized_layers")
        entry = layers.get(module) if isinstance(layers, dict) else None
        if not isinstance(entry, dict):
            raise CheckpointError(
                f"quant_algo is {MIXED}, but quantized_layers has no object for it, got {entry!r:.40}"
            )
        algorithm = entry.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in (*_NVFP4, *_FP8):
        raise CheckpointError(
            f"quant_algo must be {', '.join((*_NVFP4, *_FP8))} (or {MIXED} of these), got {algorithm!r:.40}; quantize the "
            "original again, or run it with the software that made it"
        )
    return algorithm


def _oddities(tensors: Mapping[str, Tensor], algorithm: str) -> Iterator[Oddity]:
    if "input_scale" in tensors or algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        width = "8-bit" if algorithm in _FP8 else "4-bit"
        yield Oddity(f"the config asks for {width} float activations", "16-bit activations are used instead")


FORMAT: Format = Format(
    name="modelopt",
    required=("weight_scale", "weight"),
    optional=("weight_scale_2", "input_scale"),
    matches=lambda config: str(config.get("quant_method")).startswith(METHOD),
    parse=parse,
)
