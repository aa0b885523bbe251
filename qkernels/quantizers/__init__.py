"""Quantizers: float weight (and statistics of its inputs) -> `QuantTensor`. One file a method, one registration line here."""

from __future__ import annotations

from .awq import AWQ
from .gptq import GPTQ
from .options import Options
from .rtn import RTN
from .statistics import InputStatistics

QUANTIZERS: dict[str, type[Options]] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ}

__all__ = ["QUANTIZERS", "RTN", "GPTQ", "AWQ", "InputStatistics", "Options"]
