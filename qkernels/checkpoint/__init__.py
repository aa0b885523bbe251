"""Checkpoints: load any known one into a model of `QuantLinear`, save one, convert between formats."""

from .loading import load
from .saving import convert, save
from .writer import CheckpointWriter

__all__ = ["CheckpointWriter", "convert", "load", "save"]
