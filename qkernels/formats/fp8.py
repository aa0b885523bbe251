"""FP8 checkpoints as DeepSeek-V3 and Qwen publish them and transformers' `fp8` method writes them; read.

| tensor           | dtype                     | shape                              | content                         |
|------------------|---------------------------|------------------------------------|---------------------------------|
| weight           | float8_e4m3fn             | [N, K]                             | codes                           |
| weight_scale_inv | float32, bf16 or e8m0     | [ceil(N / 128), ceil(K / 128)]     | in spite of its name it multiplies |
|                  |                           | [] or [1]                          | without a weight_block_size     |

The last block of a side is short where 128 does not divide it: ceil(rows / 128) blocks of 128, as DeepSeek and vLLM mean it.
transformers 5.24 takes blocks of rows / (rows of scales) instead and is wrong there without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..errors import CheckpointError
from ..scheme import QuantScheme
from . import Config, Format, Oddity, Parsed
from .floating import FP8_TENSOR, fp8, square
from .validation import naming

METHOD = "fp8"


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
    matches=lambda config: config.get("quant_method") == METHOD,
    parse=parse,
    sliced=True,
)
