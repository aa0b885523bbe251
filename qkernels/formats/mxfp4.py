"""MXFP4 as gpt-oss ships it: `quant_method: mxfp4`. The experts alone are quantized, stacked; read only.

| tensor                | dtype | shape                 | content                                                          |
|-----------------------|-------|-----------------------|------------------------------------------------------------------|
| gate_up_proj_blocks   | uint8 | [E, 2 I, H / 32, 16]  | two 4-bit floats (e2m1) a byte, the even column in the low half  |
| gate_up_proj_scales   | uint8 | [E, 2 I, H / 32]      | e8m0: 2^(byte - 127), one for each 32 columns; 255 is NaN        |
| down_proj_blocks, …   | uint8 | [E, H, I / 32, 16], … | the same                                                         |

Rows of gate and up take turns, as in transformers' parameter (`rows_as_stored`), although the matrices are `[N, K]` here and
`[K, N]` there. Biases are ordinary tensors. OCP Microscaling Formats 1.0, section 5.3.3 and table 7; openai/gpt-oss
(`gpt_oss/torch/weights.py`) for the order of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tensor import QuantTensor
from ..text import describe
from . import Config, Format, Parsed
from .floating import MXFP4, halves, powers_of_two
from .validation import expect, naming


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """See `Format`."""
    with naming(module):
        blocks, scales = tensors["blocks"], tensors["scales"]
        if blocks.dtype != torch.uint8 or blocks.dim() < 3 or blocks.shape[-1] != 16:
            raise CheckpointError(f"blocks must be uint8 [E, N, K / 32, 16], got {describe(blocks)}")
        expect("scales", scales, (torch.uint8,), blocks.shape[:-1], "like blocks")
        return Parsed(QuantTensor(halves(blocks).flatten(-2), powers_of_two(scales, "scales"), None, None, MXFP4))


FORMAT: Format = Format(
    name="mxfp4",
    required=("blocks", "scales"),
    optional=(),
    matches=lambda config: config.get("quant_method") == "mxfp4",
    parse=parse,
    joint="_",
    rows_as_stored=True,
)
