"""Modules: `QuantLinear`, and `replace_linear`, which swaps them into a model; `fuse_linear`."""

from __future__ import annotations

from .fused import FuseReport, fuse_linear, unfuse_linear
from .linear import QuantLinear
from .replace import ReplaceReport, replace_linear, set_module

__all__ = [
    "FuseReport",
    "QuantLinear",
    "ReplaceReport",
    "fuse_linear",
    "replace_linear",
    "set_module",
    "unfuse_linear",
]
