"""`TensorSource`: the tensors of a checkpoint directory, validated first and read one at a time.

Reads safetensors only, by itself: the headers are checked completely before one byte is allocated for a tensor, and
nothing is ever unpickled. Layout of a safetensors file: uint64 little-endian length n of the header, n bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {…}}`, then the tensors without gaps.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .beside import OTHER_WEIGHTS
from .files import (
    CONFIG,
    DTYPES,
    INDEX,
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    PICKLE_SUFFIXES,
    SINGLE,
    memory_of,
    no_such_tensor,
    parse_json,
    read_json,
    require_directory,
)

# Bytes that are worth another thread: what a file in the page cache costs is the fresh memory that its bytes go to, which the
# system clears (0.5 GB/s a core on a virtual machine), and two threads halve that.
_WORTH_A_THREAD = 1 << 20
HQQ_PICKLE = "qmodel.pt"  # how HQQ itself saves a model


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes `offset … offset + nbytes` of the file `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a checkpoint directory, read one at a time. Make it with `TensorSource.open`."""

    directory: Path
    config: dict[str, Any]
    metadata: dict[str, str]
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> TensorSource:
        """Read `config.json` and the headers of all shards, and check that they fit each other and the files.

        Raises:
            CheckpointError: the directory is missing or holds only pickled weights; a JSON file is too large, not
                UTF-8, malformed or has duplicate keys; a shard is missing, shorter than its header says, or holds
                tensors that overlap, lie outside the file, leave gaps or contradict their dtype and shape; index and
                shards disagree.
        """
        root = Path(directory)
        require_directory(root)
        if not (root / CONFIG).is_file():
            raise CheckpointError(f"{root} has no {CONFIG}, which says what model the tensors belong to")
        config = read_json(root / CONFIG)
        files, weight_map = _weight_files(root)
        entries: dict[str, TensorEntry] = {}
        metadata: dict[str, str] = {}
        for path in files:
            found, extra = _read_header(path)
            metadata.update(extra)
            for name, entry in found.items():
                if name in entries:
                    raise CheckpointError(f"tensor {name} is in two shards, {entries[name].path.name} and {path.name}")
                if weight_map is not None and name not in weight_map:
                    raise CheckpointError(f"tensor {name} is in {path.name}, but {INDEX} does not list it")
                entries[name] = entry
        for name, file in (weight_map or {}).items():
            if name not in entries or entries[name].path.name != file:
                where = f"it is in {entries[name].path.name}" if name in entries else "no shard holds it"
                raise CheckpointError(f"{INDEX} says that tensor {name} is in {file}, but {where}")
        return cls(root, config, metadata, entries)

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor is.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self.entries:
            raise no_such_tensor(self.directory, name, self.entries)
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def nbytes(self, name: str) -> int:
        return self.entry(name).nbytes

    def read(self, name: str, empty: Callable[[Sequence[int], torch.dtype], Tensor] | None = None) -> Tensor:
        """The tensor in memory of its own, on the CPU; `empty(shape, dtype)` makes that, if it is not to be torch's own.

        Raises:
            CheckpointError: no such tensor, or the file changed or failed since it was opened.
        """
        entry = self.entry(name)
        try:
            tensor = torch.empty(entry.shape, dtype=entry.dtype) if empty is None else empty(entry.shape, entry.dtype)
            got = _read_into(memory_of(tensor), entry.path, entry.offset)
        except (OSError, RuntimeError) as error:  # RuntimeError: no memory, or a shape like [0, 2^62, 2^62]
            raise CheckpointError(f"cannot read tensor {name} from {entry.path}: {error}") from error
        if got != entry.nbytes:
            raise CheckpointError(f"{entry.path} ended inside tensor {name}: expected {entry.nbytes} bytes, got {got}")
        return tensor


def _read_into(memory: Any, path: Path, offset: int) -> int:
    """Fill memory with what a file holds from `offset` on; returns how many bytes there were."""
    parts = max(1, min(torch.get_num_threads(), len(memory) // _WORTH_A_THREAD))
    if parts == 1:
        return _read_part(memory, path, offset)
    size = -(-len(memory) // parts)
    starts = range(0, len(memory), size)
    with ThreadPoolExecutor(parts) as pool:
        return sum(pool.map(lambda at: _read_part(memory[at : at + size], path, offset + at), starts))


def _read_part(memory: Any, path: Path, offset: int) -> int:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while got := file.readinto(memory[done:]):
            done += got
    return done


def _weight_files(root: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory, and the index that maps tensor names to file names, if there is one."""
    found = sorted(p.name for p in root.iterdir() if p.suffix == ".safetensors")
    names = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in OTHER_WEIGHTS)]
    if (root / INDEX).is_file():
        weight_map = read_json(root / INDEX, MAX_INDEX_BYTES).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise CheckpointError(
                f"{root / INDEX} needs a weight_map from tensor names to file names, got {weight_map!r:.80}"
            )
        files = sorted(set(weight_map.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{INDEX} names {file!r}, which is not a *.safetensors file of its own directory")
        missing = [file for file in files if not (root / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{root} lacks {len(missing)} of the {len(files)} shards that {INDEX} names: {missing[0]}"
            )
        families = {_family(file) for file in files}
        stray = [name for name in names if name not in files and "-of-" in name and _family(name) in families]
        if stray:
            raise CheckpointError(f"{root} has the shard {stray[0]}, which {INDEX} does not name; remove what is stale")
        if SINGLE in names and SINGLE not in files:
            raise CheckpointError(f"{root} has both {SINGLE} and {INDEX}, which does not name it; remove the stale one")
        return [root / file for file in files], weight_map
    if SINGLE in names:
        return [root / SINGLE], None
    if len(names) == 1:  # older GPTQ folders: gptq_model-4bit-128g.safetensors
        if "-of-" in names[0]:
            raise CheckpointError(f"{root} has the shard {names[0]} but no {INDEX}")
        return [root / names[0]], None
    if names:
        raise CheckpointError(
            f"{root} has {len(names)} safetensors files but no {INDEX} that says what belongs together"
        )
    if found:
        raise CheckpointError(
            f"{root} has no weights under the model's own names, only {found[0]}: an adapter needs the model that it belongs to, "
            "and Mistral's consolidated files are not read (convert them with transformers, or fetch the repository's model-*)"
        )
    pickled = sorted(p.name for p in root.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if HQQ_PICKLE in pickled:
        raise CheckpointError(
            f"{root} holds HQQ's {HQQ_PICKLE}, a pickle, which may run code when it is opened; quantize the original with "
            "`qkernels quantize MODEL OUT --method hqq`"
        )
    if pickled:
        raise CheckpointError(
            f"{root} holds only pickled weights ({', '.join(pickled[:3])}), which may run code when they are opened; "
            "qkernels reads safetensors only: load them with transformers on a machine you trust and save_pretrained"
        )
    raise CheckpointError(f"{root} has no *.safetensors file")


def _family(shard: str) -> str:
    """`model` of `model-00001-of-00003.safetensors`: shards of one model are called alike."""
    return re.sub(r"-\d+-of-\d+\.safetensors$", "", shard)


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path} has {size} bytes, too few for the header"
                    + (f" of {length} bytes that it announces" if len(prefix) == 8 else "")
                    + "; it is truncated or not a safetensors file"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} announces a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    parsed = parse_json(header, f"the header of {path}")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"the header of {path} has a __metadata__ that does not map strings to strings")
    begin = 8 + length
    entries = {name: _entry(path, name, fields, begin, size) for name, fields in parsed.items()}
    end, previous = begin, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            fault = "overlap" if entry.offset < end else "leave a gap"
            raise CheckpointError(
                f"{path}: {previous} and tensor {name} {fault} at byte {entry.offset}, expected {end}"
            )
        end, previous = entry.offset + entry.nbytes, f"tensor {name}"
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, but its tensors end at byte {end}")
    return entries, metadata


def _entry(path: Path, name: str, fields: Any, begin: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise CheckpointError(f"{where} needs dtype, shape and data_offsets, got {fields!r:.80}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or len(shape) > 16:
        raise CheckpointError(f"{where} has shape {shape!r:.80}, expected a list of at most 16 sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r:.80}, expected [begin, end]")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} is {dtype} {shape} = {nbytes} bytes, but its offsets span {offsets[1] - offsets[0]}"
        )
    if begin + offsets[1] > size:
        raise CheckpointError(
            f"{where} ends at byte {begin + offsets[1]} of a file of {size} bytes: the file is truncated"
        )
    return TensorEntry(path, DTYPES[dtype], tuple(shape), begin + offsets[0], nbytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
