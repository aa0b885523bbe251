"""What lies beside the weights of a checkpoint: it travels with them, or it is named as left behind.

Nobody can list what the libraries around a model keep beside it (tokenizers of every kind, chat templates, processors, the
folders of sentence-transformers, code of its own), so everything travels except what is made anew, what is other weights, and
the original's model card.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, NamedTuple

from .files import CONFIG, MAX_JSON_BYTES, PICKLE_SUFFIXES, QUANTIZATION_FILES, write_error

log = logging.getLogger(__name__)

# Made anew with the weights: not copied, and not worth a word.
_REMADE: Final = (CONFIG, *QUANTIZATION_FILES, "qkernels_report.*", "*.safetensors", "*.safetensors.index.json", ".*")
_CARD: Final = "README.md"
# Files of other programs that say what weights are there which stay behind: Mistral's own loaders take params.json, and
# transformers adapter_config.json, for a promise.
_OTHER_CONFIGS: Final = ("params.json", "adapter_config.json", "*.index.json", "hf_quant_config.json")
OTHER_WEIGHTS: Final = ("consolidated*.safetensors", "adapter_model*.safetensors")
_WEIGHT_SUFFIXES: Final = (
    ".safetensors", *PICKLE_SUFFIXES, ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite",
    ".mlmodel", ".mlpackage", ".pb", ".engine", ".pte",
)  # fmt: skip
_LARGE: Final = 256 * 2**20  # the largest tokenizers take 40 MB; what is larger is weights under another name
_SENTENCE_TRANSFORMERS: Final = "modules.json"


class Beside(NamedTuple):
    """Names of what was copied, and of what was left behind with the reason; both sorted."""

    copied: list[str]
    left: dict[str, str]


def copy_side_files(source_dir: str | os.PathLike[str], target_dir: str | os.PathLike[str]) -> Beside:
    """Copy what lies beside the weights of a checkpoint; see the head of this file. Nothing in the target is overwritten, links
    are followed (the Hub's cache is made of them), and a warning names what is left behind, but for the model card.

    Raises:
        CheckpointError: a file could not be copied.
    """
    source, target = Path(source_dir), Path(target_dir)
    found = Beside([], {})
    parts = _parts(source)
    try:
        for path in sorted(source.iterdir()):
            reason = _stays(path, parts)
            if reason is not None:
                found.left.update({path.name: reason} if reason else {})
            elif path.is_dir() and any(_files(path)):
                if not (target / path.name).exists():
                    shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(".*"))
                    found.copied.append(path.name)
            elif path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
                found.copied.append(path.name)
    except OSError as error:
        raise write_error(error, target) from error
    told = [f"{name} ({reason})" for name, reason in found.left.items() if name != _CARD]
    if told:
        log.warning("%s: left behind: %s", source, ", ".join(told))
    return found


def _stays(path: Path, parts: set[str]) -> str | None:
    """Why a file or folder does not travel, "" where that needs no word; None: it travels."""
    name = path.name
    if any(fnmatchcase(name, pattern) for pattern in OTHER_WEIGHTS):
        return "other weights"
    if any(fnmatchcase(name, pattern) for pattern in _REMADE):
        return ""
    if not path.exists():
        return "a link to nothing"
    if path.is_dir():
        if name in parts:
            return None
        if path.is_symlink():
            return "a link to a folder"
        if any(file.suffix in _WEIGHT_SUFFIXES for file in _files(path)):
            return "a folder with weights"
        return "a large folder" if sum(file.stat().st_size for file in _files(path)) > _LARGE else None
    if name == _CARD:
        return "the card of the original"
    if path.suffix in _WEIGHT_SUFFIXES:
        return "other weights"
    if any(fnmatchcase(name, pattern) for pattern in _OTHER_CONFIGS):
        return "it describes other weights"
    return "a large file" if path.stat().st_size > _LARGE else None


def _parts(source: Path) -> set[str]:
    """Folders that sentence-transformers runs after the model: part of it, also those with weights of their own (`2_Dense`)."""
    path = source / _SENTENCE_TRANSFORMERS
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        return set()
    try:
        listed = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # somebody else's file of that name
        return set()
    return {str(part["path"]) for part in listed if isinstance(part, dict) and part.get("path")}


def _files(directory: Path) -> Iterator[Path]:
    """The files in a folder and below it, hidden ones left out; links to folders are not followed."""
    for root, folders, names in os.walk(directory):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        yield from (Path(root) / name for name in names if not name.startswith(".") and (Path(root) / name).exists())
