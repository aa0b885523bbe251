"""Blocks that a `QuantScheme` holds without loss, as `QuantTensor`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ...factors import Factors
from ...scheme import QuantScheme
from ...tensor import QuantTensor
from .parts import Parts
from .types import block_type, parts_of

EXACT_SCHEMES: Final = {
    name: QuantScheme.parse(scheme)
    for name, scheme in {
        "Q4_0": "w4a16_g32", "Q4_1": "w4a16_g32_offset", "Q5_0": "w5a16_g32", "Q5_1": "w5a16_g32_offset", "Q8_0": "w8a16_g32",
        "Q2_0": "w2a16_g64_asym", "TQ2_0": "w2a16_g256_asym", "Q2_K": "q2_k", "Q3_K": "q3_k", "Q4_K": "q4_k", "Q5_K": "q5_k",
        "Q6_K": "q6_k", "IQ4_NL": "iq4nl_g32", "IQ4_XS": "iq4_xs", "MXFP4": "mxfp4_g32", "NVFP4": "nvfp4m_g16",
    }.items()
}  # fmt: skip


def weight_of(blocks: Tensor, type: str, scale: Tensor | None = None) -> QuantTensor:
    """The weight of GGUF blocks, equal when dequantized (bit for bit, but for the sign of zeros in MXFP4 and NVFP4).

    Args:
        blocks: uint8 `[N, bytes of a row]`.
        type: a key of `EXACT_SCHEMES`.
        scale: float32 `[1]`, a number that multiplies the whole weight: of NVFP4 alone, which has a place for it.

    Raises:
        TensorError: a scale is NaN or infinite.
    """
    scheme, meaning = EXACT_SCHEMES[type], block_type(type).meaning
    parts = parts_of(blocks, type)
    assert meaning is not None
    if scheme.factors is not None:
        return QuantTensor.from_factors(parts.codes, _factors(parts, scheme, scale), scheme)
    if type == "MXFP4":
        assert parts.scales is not None
        return QuantTensor(parts.codes, parts.scales.view(torch.float8_e8m0fnu), None, None, scheme)
    assert parts.d is not None
    zeros = parts.dmin
    if scheme.zeros == "int":
        zeros = torch.full(parts.d.shape, meaning.zero, dtype=torch.uint8, device=blocks.device)
    return QuantTensor(parts.codes, parts.d, zeros, None, scheme)


def _factors(parts: Parts, scheme: QuantScheme, scale: Tensor | None) -> Factors:
    assert parts.scales is not None
    if scheme.factors != "nvfp4m":
        assert parts.d is not None
        return Factors(parts.scales, parts.d, parts.minima, parts.dmin)
    small = torch.where(parts.scales == 0x7F, 0, parts.scales & 0x7F).to(torch.uint8)  # ggml's decoder takes 0x7F for 0
    outer = torch.ones(1) if scale is None else scale.float()
    return Factors(small.view(torch.float8_e4m3fn), outer.expand(len(small), 1).contiguous())
