"""Checkpoints: load any known one into a model of `QuantLinear`, save one, convert between formats."""

from . import packed
from .loading import load
from .saving import convert, save
from .writer import CheckpointWriter

packed.register()

__all__ = ["CheckpointWriter", "convert", "load", "save"]
