"""Checkpoint directories on disk: lazy validated reading, streamed sharded writing, all or nothing."""

from .atomic import MANIFEST, atomic_directory, locked, read_from
from .beside import Beside, copy_side_files
from .files import CONFIG, INDEX, QUANTIZATION_FILES, SINGLE, read_json, require_directory, write_json
from .source import TensorEntry, TensorSource
from .writer import ShardWriter

__all__ = [
    "TensorSource",
    "TensorEntry",
    "ShardWriter",
    "atomic_directory",
    "Beside",
    "copy_side_files",
    "locked",
    "read_from",
    "read_json",
    "require_directory",
    "write_json",
    "CONFIG",
    "MANIFEST",
    "INDEX",
    "QUANTIZATION_FILES",
    "SINGLE",
]
