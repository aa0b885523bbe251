"""Quantizers: float weight (and statistics of its inputs) -> `QuantTensor`. One file a method, one registration line here."""

from __future__ import annotations

from .awq import AWQ
from .gptq import GPTQ
from .hqq import HQQ
from .nf4 import NF4
from .options import Options
from .rtn import RTN
from .smoothquant import SmoothQuant
from .statistics import InputStatistics

QUANTIZERS: dict[str, type[Options]] = {
    "rtn": RTN, "gptq": GPTQ, "awq": AWQ, "hqq": HQQ, "nf4": NF4, "smoothquant": SmoothQuant,
}  # fmt: skip

# Methods that look at weights alone: `quantize(weight, name)`.
CalibrationFree = RTN | HQQ | NF4

__all__ = [
    "QUANTIZERS", "RTN", "GPTQ", "AWQ", "HQQ", "NF4", "SmoothQuant", "CalibrationFree", "InputStatistics", "Options",
]  # fmt: skip
