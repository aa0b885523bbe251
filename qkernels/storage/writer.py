"""`ShardWriter`: tensors to safetensors shards as they come, with one tensor in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..errors import CheckpointError
from .files import DTYPE_NAMES, INDEX, SHARD_BYTES, SINGLE, memory_of, write_error, write_json


class ShardWriter:
    """Writes tensors to `directory` as they come: `model.safetensors`, or numbered shards and their index.

    The header of a safetensors file precedes the data and needs all names, so a shard's data goes to a spool file first
    and is copied behind the header when the shard is full. That costs disk space for one more shard and keeps memory at
    one tensor.

    Args:
        directory: an existing directory, usually from `atomic_directory`.
        max_shard_bytes: a new shard begins before this would be exceeded; a larger tensor gets a shard of its own.
    """

    def __init__(self, directory: str | os.PathLike[str], max_shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = Path(directory)
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[list[str]] = []
        self._entries: dict[str, dict[str, Any]] = {}  # of the shard being spooled
        self._names: set[str] = set()
        self._spool: BinaryIO | None = None
        self._offset = 0
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of any device, contiguous or not.

        Raises:
            CheckpointError: the name was used before, the dtype has no name in safetensors, or the disk refuses.
        """
        if name in self._names or name == "__metadata__":
            raise CheckpointError(
                f"tensor {name} was added twice" if name in self._names else f"{name} is a reserved name"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, which a safetensors file cannot hold")
        tensor = tensor.detach().cpu().contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        try:
            if self._entries and self._offset + nbytes > self.max_shard_bytes:
                self._finish_shard({})
            if self._spool is None:
                self._spool = (self.directory / "spool.tmp").open("wb")
            self._spool.write(memory_of(tensor))
        except OSError as error:
            raise write_error(error, self.directory) from error
        self._entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + nbytes],
        }
        self._names.add(name)
        self._offset += nbytes
        self.total_bytes += nbytes

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Finish the last shard, give the shards their names and write the index.

        Args:
            metadata: strings for the header of a single file, or for the index of several.

        Raises:
            CheckpointError: the disk refuses.
        """
        extra = dict(metadata or {})
        try:
            if self._entries or not self._shards:
                self._finish_shard(extra if not self._shards else {})
            count = len(self._shards)
            if count == 1:
                (self.directory / "shard-1.tmp").rename(self.directory / SINGLE)
                return
            weight_map: dict[str, str] = {}
            for i, names in enumerate(self._shards, start=1):
                file = f"model-{i:05d}-of-{count:05d}.safetensors"
                (self.directory / f"shard-{i}.tmp").rename(self.directory / file)
                weight_map.update(dict.fromkeys(names, file))
            index = {
                "metadata": {**extra, "total_size": self.total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self.directory / INDEX, index)
        except OSError as error:
            raise write_error(error, self.directory) from error

    def _finish_shard(self, metadata: Mapping[str, str]) -> None:
        header = json.dumps(
            {"__metadata__": {"format": "pt", **metadata}, **self._entries}, separators=(",", ":")
        ).encode()
        header += b" " * (-len(header) % 8)  # so that the data is aligned for readers that map the file
        spool = self.directory / "spool.tmp"
        if self._spool is None:  # a shard without a tensor
            self._spool = spool.open("wb")
        self._spool.close()
        self._spool = None
        self._shards.append(list(self._entries))
        with (self.directory / f"shard-{len(self._shards)}.tmp").open("wb") as out, spool.open("rb") as data:
            out.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(data, out, 16 * 2**20)
        spool.unlink()
        self._entries, self._offset = {}, 0
