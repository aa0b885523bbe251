"""What the rooms of storage share: file names, bounded JSON, bytes of a tensor, the text of a failed write."""

from __future__ import annotations

import ctypes
import difflib
import errno
import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

# A header of 100 MB is the limit of the safetensors library itself; a JSON file beside the weights is far smaller
# (the index of a 1 T parameter mixture of experts takes about 10 MB, a config.json about 10 kB).
MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_JSON_BYTES = 16_000_000
SHARD_BYTES = 4 * 2**30

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Beside config.json: older GPTQ and AWQ folders, ModelOpt's.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def require_directory(path: Path) -> None:
    """Say what a checkpoint is where there is none.

    Raises:
        CheckpointError: there is nothing at the path, or something else than a directory.
    """
    if path.is_dir():
        return
    what = "is a file, but no GGUF file" if path.exists() else "does not exist"
    if path.is_symlink() and not path.exists():
        what = f"is a link to {path.readlink()}, which does not exist"
    raise CheckpointError(
        f"{path} {what}; a checkpoint is a local folder with {CONFIG} and *.safetensors, or a GGUF file "
        "(a model on the Hub is named owner/name)"
    )


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        CheckpointError: the file cannot be read, is too large, is not UTF-8 or not JSON, has a duplicate key, or holds
            something else than an object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes, which no such file is")
    return parse_json(data, str(path))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented UTF-8 JSON, keys in their order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_error(error: OSError, path: Path) -> CheckpointError:
    if error.errno in DISK_FULL:
        free = -1
        with suppress(OSError):
            free = shutil.disk_usage(path if path.exists() else path.parent).free
        room = f", {free / 2**20:.0f} MiB are free" if free >= 0 else ""
        return CheckpointError(
            f"no space left to write {path} ({error.strerror}{room}); free some or choose another target"
        )
    return CheckpointError(f"cannot write {path}: {error}")


def no_such_tensor(where: Path, name: str, known: Collection[str]) -> CheckpointError:
    close = difflib.get_close_matches(name, known, n=1)
    return CheckpointError(f"{where} has no tensor {name}{f'; the nearest name is {close[0]}' if close else ''}")


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared, without numpy."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must hold a JSON object, got {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise CheckpointError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
    return result


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing about quantization."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
