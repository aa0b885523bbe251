"""Checkpoints: load any known one into a model of `QuantLinear`, save one, convert between formats."""

from .gguf_writing import plan_gguf, to_gguf
from .loading import load
from .saving import convert, save
from .source import Checkpoint, open_checkpoint
from .writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "convert", "load", "open_checkpoint", "plan_gguf", "save", "to_gguf"]
