"""Checkpoints: load any known one into a model of `QuantLinear`, save one, convert between formats."""

from .loading import load
from .saving import convert, save
from .source import Checkpoint, open_checkpoint
from .writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "convert", "load", "open_checkpoint", "save"]
