"""FP8 checkpoints as DeepSeek-V3 and Qwen publish them and transformers' `fp8` method writes them; read.

| tensor           | dtype                     | shape                              | content                         |
|------------------|---------------------------|------------------------------------|---------------------------------|
| weight           | float8_e4m3fn             | [N, K]                             | codes                           |
| weight_scale_inv | float32, bf16 or e8m0     | [ceil(N / 128), ceil(K / 128)]     | in spite of its name it multiplies |
|                  |                           | [] or [1]                          | without a weight_block_size     |

DeepSeek-V4 calls the scales `scale`, of float8_e8m0fnu, and has experts in 4-bit floats where `expert_dtype` is fp4: weight int8
[N, K / 2], two codes a byte, the even column in the low half, and scale [N, K / 32]. The dtype of a weight tells the two apart; a
4-bit one without that word is an error, since files in FP8 alone exist, too.

The last block of a side is short where 128 does not divide it: ceil(rows / 128) blocks of 128, as DeepSeek and vLLM mean it.
transformers 5.24 takes blocks of rows / (rows of scales) instead and is wrong there without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import QuantScheme
from ..text import dtype_name
from . import Config, Format, Oddity, Parsed
from .floating import FP8_TENSOR, fp8, mxfp4, powers_of_two, square
from .validation import naming

METHOD = "fp8"
SCALE = "__scale__"  # in the quantization_config: whether scales are called so


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise CheckpointError(f"fmt of the quantization_config must be e4m3, got {config['fmt']!r:.40}")
        weight = fp8(tensors["weight"], tensors["weight_scale_inv"], _scheme(config), "weight_scale_inv")
        return Parsed(weight, tuple(_oddities(tensors, config)))


def parse_scaled(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module of DeepSeek-V4.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        stored, scale = tensors["weight"], tensors["scale"]
        if stored.dtype not in (torch.int8, torch.uint8):
            powers = powers_of_two(scale, "scale")
            return Parsed(fp8(stored, powers, _scheme(config), "scale"), tuple(_oddities(tensors, config)))
        experts = config.get("expert_dtype")
        if experts != "fp4":
            raise CheckpointError(
                f"weight is {dtype_name(stored.dtype)}, which is two 4-bit floats a byte where config.json has expert_dtype fp4, "
                f"got {experts!r:.40}"
            )
        weight = mxfp4(stored.view(torch.uint8), scale, "weight", "scale")
        return Parsed(weight, tuple(_oddities(tensors, config)))


def _scheme(config: Config) -> QuantScheme:
    block = config.get("weight_block_size")
    return FP8_TENSOR if block is None else square("weight_block_size", block)


def _oddities(tensors: Mapping[str, Tensor], config: Config) -> Iterator[Oddity]:
    scheme = config.get("activation_scheme")
    if scheme is not None or "activation_scale" in tensors or "input_scale" in tensors:
        asked = "dynamic" if scheme == "dynamic" else "with scales of their own in the file"
        yield Oddity(f"the config asks for 8-bit float activations, {asked}", "16-bit activations are used instead")


FORMAT: Format = Format(
    name="fp8",
    required=("weight_scale_inv", "weight"),
    optional=("activation_scale", "input_scale"),
    matches=lambda config: config.get("quant_method") == METHOD and not config.get(SCALE),
    parse=parse,
    sliced=True,
)
SCALED: Format = Format(
    name="fp8 of DeepSeek-V4",
    required=("scale", "weight"),
    optional=(),
    matches=lambda config: config.get("quant_method") == METHOD and bool(config.get(SCALE)),
    parse=parse_scaled,
)
