"""Modules: `QuantLinear`, and `replace_linear`, which swaps them into the places that `select_linears` chooses."""

from __future__ import annotations

from .embedding import QuantEmbedding
from .experts import QuantExperts, QuantStack
from .linear import QuantLinear
from .modules import model_bytes, other_names, packed_bytes, set_module
from .replace import ReplaceReport, replace_linear
from .selection import Selection, select_linears

__all__ = [
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantStack",
    "ReplaceReport",
    "Selection",
    "model_bytes",
    "other_names",
    "packed_bytes",
    "replace_linear",
    "select_linears",
    "set_module",
]
