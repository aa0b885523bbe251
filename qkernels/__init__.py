"""qkernels: language models with small weights, on kernels that read them as fast as memory allows.

from qkernels import replace_linear
report = replace_linear(model, "w4a16_g128")
"""

from __future__ import annotations

from ._version import __version__ as __version__
from .calibrate import QuantReport, quantize
from .checkpoint import load, save
from .errors import QKernelsError, UnsupportedProblem
from .inspection import inspect
from .kernels.catalogue import Problem, list_kernels
from .nn import QuantLinear, ReplaceReport, replace_linear
from .quantizers import AWQ, GPTQ, HQQ, NF4, RTN, SmoothQuant
from .scheme import QuantScheme
from .tensor import QuantTensor

__all__ = [
    "QuantScheme",
    "QuantTensor",
    "QuantLinear",
    "replace_linear",
    "quantize",
    "load",
    "save",
    "inspect",
    "RTN",
    "GPTQ",
    "AWQ",
    "HQQ",
    "NF4",
    "SmoothQuant",
    "list_kernels",
    "Problem",
    "QuantReport",
    "ReplaceReport",
    "QKernelsError",
    "UnsupportedProblem",
]
