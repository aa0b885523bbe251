"""Triton kernels on layout kpack: W4A16, W8A16 and the widths between, and codebooks, without a compiler of CUDA C++.

Importing this registers the ops for CUDA; Triton itself is imported at their first call, or never.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from ...errors import UnsupportedProblem
from ...ops.backends import missing_triton
from ...ops.schema import LIBRARY


def _gemm(*args: Any) -> Tensor:
    out: Tensor = _launcher().gemm(*args)
    return out


def _dequantize(*args: Any) -> Tensor:
    out: Tensor = _launcher().dequantize(*args)
    return out


def _grouped_gemm(*args: Any) -> Tensor:
    out: Tensor = _launcher("grouped_launch").grouped_gemm(*args)
    return out


def _experts(*args: Any) -> Tensor:
    out: Tensor = _launcher("grouped_launch").experts(*args)
    return out


def _launcher(name: str = "launch") -> Any:
    if why := missing_triton():
        raise UnsupportedProblem(f"the Triton kernels on layout kpack cannot run: {why}")
    return import_module(f".{name}", __name__)


LIBRARY.impl("gemm_kpack", _gemm, "CUDA")
LIBRARY.impl("gemv_kpack", _gemm, "CUDA")
LIBRARY.impl("dequantize_kpack", _dequantize, "CUDA")
LIBRARY.impl("grouped_gemm_kpack", _grouped_gemm, "CUDA")
LIBRARY.impl("experts_kpack", _experts, "CUDA")
