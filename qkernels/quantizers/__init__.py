"""Quantizers: float weight (and second moments of its inputs) -> `QuantTensor`. One file a method, one line below.

`quantize`, its preview and the command line know methods by this registry and by what they answer (`Options`).
"""

from __future__ import annotations

from .awq import AWQ
from .gptq import GPTQ
from .hqq import HQQ
from .nf4 import NF4
from .options import Options
from .rtn import RTN, rounding_of
from .smoothquant import SmoothQuant
from .statistics import InputStatistics, output_energy

# By its name on the command line and in reports, which is `Options.name`.
QUANTIZERS: dict[str, type[Options]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "hqq": HQQ,
    "nf4": NF4,
    "smoothquant": SmoothQuant,
}

__all__ = [
    "QUANTIZERS", "RTN", "GPTQ", "AWQ", "HQQ", "NF4", "SmoothQuant", "InputStatistics", "Options", "output_energy", "rounding_of",
]  # fmt: skip
