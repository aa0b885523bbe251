"""Modules: `QuantLinear`, and `replace_linear`, which swaps them into a model."""

from __future__ import annotations

from .linear import QuantLinear
from .replace import ReplaceReport, replace_linear, set_module

__all__ = [
    "QuantLinear",
    "ReplaceReport",
    "replace_linear",
    "set_module",
]
