"""Triton kernels on layout kpack: W4A16, W8A16 and the widths between, and codebooks, without a compiler of CUDA C++.

Importing this registers the ops for CUDA; Triton itself is imported at their first call, or never.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from ...errors import UnsupportedProblem
from ...ops.schema import LIBRARY

OLDEST = (3, 6)  # compiles these kernels (tests/triton/README.md says which versions were tried)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the kernels cannot be compiled here, or None. Imports nothing."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed (pip install triton)"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"needs Triton {OLDEST[0]}.{OLDEST[1]} or later (got {found})"
    return None


def _gemm(*args: Any) -> Tensor:
    out: Tensor = _launcher().gemm(*args)
    return out


def _dequantize(*args: Any) -> Tensor:
    out: Tensor = _launcher().dequantize(*args)
    return out


def _launcher() -> Any:
    if why := missing():
        raise UnsupportedProblem(f"the Triton kernels on layout kpack cannot run: {why}")
    from . import launch

    return launch


LIBRARY.impl("gemm_kpack", _gemm, "CUDA")
LIBRARY.impl("gemv_kpack", _gemm, "CUDA")
LIBRARY.impl("dequantize_kpack", _dequantize, "CUDA")
