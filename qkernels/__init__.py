"""qkernels: language models with small weights, on kernels that read them as fast as memory allows.

from qkernels import replace_linear
report = replace_linear(model, "w4a16_g128")

Public names are imported when they are first asked for (PEP 562), so that `qkernels --help` need not wait for torch. Where
torch is there already, the ops are defined at once: whoever loads an exported program finds `torch.ops.qkernels`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .calibrate import QuantReport, quantize
    from .checkpoint import load, save
    from .errors import QKernelsError, UnsupportedProblem
    from .inspection import inspect
    from .kernels.catalogue import Problem, list_kernels
    from .nn import QuantLinear, ReplaceReport, replace_linear
    from .quantizers import AWQ, GPTQ, HQQ, NF4, RTN, SmoothQuant
    from .scheme import QuantScheme
    from .tensor import QuantTensor
    from .texts import load_tokenizer

__all__ = [
    "QuantScheme",
    "QuantTensor",
    "QuantLinear",
    "replace_linear",
    "quantize",
    "load",
    "load_tokenizer",
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

if not TYPE_CHECKING:  # a type checker would take __getattr__ for any name, misspelled ones too
    _HOMES = {
        "calibrate": ("QuantReport", "quantize"),
        "checkpoint": ("load", "save"),
        "errors": ("QKernelsError", "UnsupportedProblem"),
        "inspection": ("inspect",),
        "kernels.catalogue": ("Problem", "list_kernels"),
        "nn": ("QuantLinear", "ReplaceReport", "replace_linear"),
        "quantizers": ("AWQ", "GPTQ", "HQQ", "NF4", "RTN", "SmoothQuant"),
        "scheme": ("QuantScheme",),
        "tensor": ("QuantTensor",),
        "texts": ("load_tokenizer",),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        """A public name, or a module of this package, imported now."""
        from importlib import import_module
        from importlib.util import find_spec

        if name in _HOME_OF:
            value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        from pkgutil import iter_modules

        modules = {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}
        return sorted({*globals(), *__all__, *modules})

    if "torch" in sys.modules:
        from .kernels import catalogue as _catalogue  # noqa: F401  (defines every op)
