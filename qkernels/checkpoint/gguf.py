"""`GgufCheckpoint`: a GGUF file, or all parts of a split one, as a `Checkpoint`.

Linear layers whose blocks a `QuantScheme` holds without loss are quantized modules; every other tensor is read as numbers, and
what is in blocks of another type is dequantized, which the oddities say. Stacked experts are modules where all three of their
tensors are such blocks (gate and up of one type); else all three are dequantized, for a model has both of its projections
quantized or neither.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..formats import Config, Format, Oddity, Parsed
from ..formats.gguf import EXACT_SCHEMES, dequantize, weight_of
from ..formats.validation import naming
from ..models.experts import PARTS
from ..models.gguf_config import config_of
from ..models.gguf_names import INPUT_SCALE, Place, architecture_of, places_of
from ..models.gguf_parts import joined, joined_shape
from ..models.naming import WHOLE, into_model
from ..reports import readable_size
from ..storage.gguf import GgufEntry, GgufSource
from ..storage.gguf_types import FILE_TYPES
from ..tensor import QuantTensor
from ..text import dtype_name
from ..texts import load_tokenizer

log = logging.getLogger(__name__)

_WEIGHTS_AT_ONCE: Final = 2**20  # of an embedding or a large layer
_TILE: Final = 64  # rows, of the largest tile of any layout


def _not_parsed(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    raise CheckpointError(f"{module}: GGUF blocks are read by GgufCheckpoint")


# What a GGUF file with blocks of any type answers for its format; it has no tensors beside each other to be parsed.
GGUF: Final = Format("gguf", ("weight",), (), lambda config: False, _not_parsed)

_CHECKED_AT_ONCE: Final = 2**22  # torch.isfinite takes memory for another copy


@dataclass(frozen=True)
class GgufCheckpoint:
    """Which tensors of a GGUF file are which of a model's. Make it with `GgufCheckpoint.open`.

    Args:
        source: all tensors of the file.
        config: what config.json would say.
        places: where each tensor of the file belongs, by its name there.
        modules: quantized module -> names in the file of its parts, by rows: one, but for gate and up of experts.
        spelled: every other tensor -> the names in the file of its parts.
        decoded: dtype in which blocks are read as numbers: float32, in which they are computed, or that of the model under whose
            names this is, so that memory holds no more than the model will.
        members: as `modules`, of stacked experts of the model under whose names this is.
    """

    source: GgufSource
    config: Mapping[str, Any]
    places: Mapping[str, Place]
    modules: Mapping[str, tuple[str, ...]]
    spelled: Mapping[str, tuple[str, ...]]
    oddities: tuple[tuple[str, Oddity], ...] = ()
    decoded: torch.dtype = torch.float32
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufCheckpoint:
        """Read the headers, and find a place for every tensor; no weight is read.

        Raises:
            CheckpointError: see `GgufSource.open`, `architecture_of`, `config_of` and `places_of`.
        """
        source = GgufSource.open(path)
        architecture = architecture_of(source)
        config, unread = config_of(source, architecture)
        places = places_of(source, architecture, config)
        modules: dict[str, tuple[str, ...]] = {}
        spelled: dict[str, tuple[str, ...]] = {}
        stacks: dict[str, dict[int, str]] = {}
        floats: dict[str, dict[int, str]] = {}
        for name, place in places.items():
            if place.kind == "experts":
                stacks.setdefault(place.name, {})[place.part] = name
            elif place.kind == "linear" and _is_exact(source.entry(name), place):
                modules[place.name.removesuffix(".weight")] = (name,)
            else:
                floats.setdefault(place.name, {})[place.part] = name
        for name, parts in floats.items():
            spelled[name] = tuple(parts[i] for i in sorted(parts))
            if places[spelled[name][0]].parts > 1:  # raises where they do not fit each other
                shapes = [source.entry(part).shape for part in spelled[name]]
                joined_shape(places[spelled[name][0]], shapes, spelled[name][0])
        for experts, projections in _by_experts(source, stacks).items():
            packed = all(_are_exact(source, names) for names in projections.values())
            (modules if packed else spelled).update({f"{experts}.{p}": names for p, names in projections.items()})
        oddities = [(key, Oddity("metadata that is not understood", repr(source.get(key))[:40])) for key in unread]
        oddities += _dequantized(source, places, spelled)
        oddities += [
            (name, Oddity("scales of activations are left aside: those stay in 16 bits", source.entry(name).type.name))
            for name in source.entries
            if name.endswith(INPUT_SCALE)
        ]
        return cls(source, config, places, modules, spelled, tuple(oddities))

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def format(self) -> Format | None:
        return GGUF if any(entry.type.dtype is None for entry in self.source.entries.values()) else None

    @property
    def quantization(self) -> Mapping[str, Any]:
        if self.format is None:
            return {}
        mix = self.source.get("general.file_type")
        return {"quant_method": "gguf", "version": FILE_TYPES.get(mix, "") if isinstance(mix, int) else ""}

    def weight(self, module: str) -> Parsed:
        """The weight of a module, equal bit for bit.

        Raises:
            CheckpointError: a scale is NaN or infinite; names the tensor.
        """
        names = self.modules[module]
        if self.places[names[0]].kind == "experts":
            return Parsed(QuantTensor.stack([parsed.weight for parsed in self._experts(names)]))
        return Parsed(self._weight(names[0]))

    def ready(self, module: str) -> None:
        """Of none: no kernel reads blocks as they are."""
        return None

    def weight_in_parts(self, module: str) -> Iterator[QuantTensor] | None:
        """Of a layer that is large; of stacked experts there is one in memory at a time anyway."""
        name = self.modules[module][0]
        large = prod(self.source.entry(name).shape) > 2 * _WEIGHTS_AT_ONCE
        return self._parts(name) if large and self.places[name].kind == "linear" else None

    def weight_shape(self, module: str) -> tuple[int, int]:
        N, K = self.source.entry(self.modules[module][0]).shape
        return N, K

    def _weight(self, name: str, expert: int | None = None) -> QuantTensor:
        """A whole weight, or an expert of a stack."""
        blocks = self.source.blocks(name)
        return self._weight_of(name, self.places[name].rows(blocks if expert is None else blocks[expert]))

    def _parts(self, name: str) -> Iterator[QuantTensor]:
        """A weight `[N, K]`, some rows after others: unpacked, 4-bit codes alone are twice the file's bytes."""
        blocks = self.places[name].rows(self.source.blocks(name))
        N, K = self.source.entry(name).shape
        rows = max(1, _WEIGHTS_AT_ONCE // max(K, 1) // _TILE) * _TILE
        for first in range(0, N, rows):
            yield self._weight_of(name, blocks[first : first + rows])

    def _weight_of(self, name: str, blocks: Tensor) -> QuantTensor:
        place = self.places[name]
        with naming(name):
            scale = None if place.scale is None else self.source.read(place.scale)
            return weight_of(blocks, self.source.entry(name).type.name, scale)

    @property
    def stacks(self) -> Collection[str]:
        return self.members.keys()

    def expert_weights(self, stack: str) -> Iterator[Parsed]:
        """One expert in memory at a time.

        Raises:
            CheckpointError: as `weight`.
        """
        yield from self._experts(self.members[stack])

    def _experts(self, names: tuple[str, ...]) -> Iterator[Parsed]:
        for expert in range(self.source.entry(names[0]).shape[0]):
            parts = [self._weight(name, expert) for name in names]
            yield Parsed(parts[0] if len(parts) == 1 else QuantTensor.concat(parts))

    @property
    def embeddings(self) -> list[str]:
        return [name for name, (first, *_) in self.spelled.items() if self._is_packed_embedding(first)]

    def _is_packed_embedding(self, spelled: str) -> bool:
        return self.places[spelled].kind == "embedding" and _is_exact(self.source.entry(spelled), self.places[spelled])

    def embedding(self, name: str) -> Iterator[QuantTensor]:
        """Equal bit for bit to what `read` makes of it.

        Raises:
            CheckpointError: as `weight`.
        """
        yield from self._parts(self.spelled[name][0])

    def embedding_ready(self, name: str) -> None:
        """Of none: blocks are laid out anew."""
        return None

    def embedding_parts(self, name: str) -> list[str]:
        return list(self.spelled[name])

    def with_activations_of_the_file(self) -> GgufCheckpoint:
        """Itself: these files say nothing of activations."""
        return self

    def parts(self, module: str) -> list[str]:
        return list(self.members[module] if module in self.members else self.modules[module])

    def module_nbytes(self, module: str) -> int:
        return sum(self.source.entry(name).nbytes for name in self.parts(module))

    def names(self) -> list[str]:
        return sorted(self.spelled)

    def __contains__(self, name: object) -> bool:
        return name in self.spelled

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [entry.shape for entry in self._entries(name)]
        if name not in self.spelled:
            return shapes[0]
        spelled = self.spelled[name][0]
        place = self.places[spelled]
        if place.kind == "row" and len(shapes[0]) == 1:
            return (1, *shapes[0])
        return joined_shape(place, shapes, spelled) if place.parts > 1 or place.turned else shapes[0]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype(self.spelled[name][0])

    def _dtype(self, spelled: str) -> torch.dtype:
        entry, place = self.source.entry(spelled), self.places[spelled]
        if place.offset or place.scale is not None:
            return torch.float32
        return self.decoded if entry.type.dtype is None else entry.type.dtype

    def stored_as(self, name: str) -> str:
        kinds = dict.fromkeys(entry.type for entry in self._entries(name))
        return ", ".join(ggml.name if ggml.dtype is None else dtype_name(ggml.dtype) for ggml in kinds)

    def nbytes(self, name: str) -> int:
        return sum(entry.nbytes for entry in self._entries(name))

    def read(self, name: str) -> Tensor:
        """A tensor that is no quantized module's, in memory of its own, on the CPU.

        Raises:
            CheckpointError: as `GgufSource.blocks`; or blocks hold NaN or infinities.
        """
        parts = [self._read(spelled) for spelled in self.spelled[name]]
        place = self.places[self.spelled[name][0]]
        if place.parts > 1 or place.turned:
            return joined(place, [part.to(self.dtype(name)) for part in parts])
        return parts[0].view(self.shape(name))

    def _read(self, spelled: str) -> Tensor:
        entry, place = self.source.entry(spelled), self.places[spelled]
        if entry.type.dtype is not None:
            tensor = place.rows(self.source.read(spelled))
        else:
            tensor = dequantize(place.rows(self.source.blocks(spelled)), entry.type.name, self._dtype(spelled))
            if not all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(_CHECKED_AT_ONCE)):
                raise CheckpointError(
                    f"{self.path}: {spelled} ({entry.type.name}) has blocks whose weights are not finite"
                )
        if place.offset:
            tensor = tensor.float() - place.offset
        if place.scale is not None:
            tensor = tensor.float() * self.source.read(place.scale)
        return tensor

    def in_file_order(self) -> Iterator[tuple[str, str | None]]:
        here = {spelled[0]: name for name, spelled in self.spelled.items()}
        owner = {spelled[0]: module for module, spelled in self.modules.items()}
        for name in self.source.entries:
            if name in owner:
                yield name, owner[name]
            elif name in here:
                yield here[name], None

    def named_as_in(self, model: nn.Module, transforms: Iterable[Any] | None = None) -> GgufCheckpoint:
        """The same checkpoint under the names of this model.

        Raises:
            CheckpointError: the model keeps a tensor as a part of another one.
        """
        tensors = {name: torch.empty(self.shape(name), dtype=self.dtype(name), device="meta") for name in self.spelled}
        way = into_model(model, tensors, self.modules, transforms)
        if way.made:
            conversion, _ = way.made[0]
            raise CheckpointError(
                f"{type(model).__name__} keeps {next(iter(conversion.sources))} as a part of {conversion.target}, which is not "
                "read from GGUF files yet"
            )
        dtype: Any = getattr(model, "dtype", None)
        return replace(
            self,
            modules={way.names[module]: names for module, names in self.modules.items() if module in way.names},
            members={stack: self.modules[whole[WHOLE]] for stack, whole in way.stacks.items()},
            spelled={way.names[name]: spelled for name, spelled in self.spelled.items()},
            decoded=dtype if isinstance(dtype, torch.dtype) else torch.float32,
        )

    def spelling(self, name: str) -> str:
        """The name in the file, for messages."""
        return (self.members.get(name) or self.modules.get(name) or self.spelled.get(name, (name,)))[0]

    def files(self) -> list[Path]:
        return list(self.source.files)

    def copy_side_files(self, target: Path) -> None:
        """Write the tokenizer that the metadata holds; where it cannot be rebuilt, a warning says why."""
        try:
            load_tokenizer(self.path).save_pretrained(target)
        except CheckpointError as error:
            log.warning("%s: the tokenizer stays behind: %s", self.path, error)

    def _entries(self, name: str) -> list[GgufEntry]:
        return [self.source.entry(spelled) for spelled in self.spelled.get(name, (name,))]


def dequantized_experts(weights: Iterable[Parsed], dtype: torch.dtype) -> tuple[Tensor, QuantTensor]:
    """Stacked experts `[E, N, K]` as numbers, and the last of them, quantized."""
    floats: list[Tensor] = []
    for weight, _ in weights:
        floats.append(weight.dequantize(dtype))
    return torch.stack(floats), weight


def _is_exact(entry: GgufEntry, place: Place) -> bool:
    """Whether a tensor is the weight of a linear layer or an embedding in blocks that a scheme holds."""
    plain = (
        place.kind in ("linear", "embedding")
        and (place.scale is None or entry.type.name == "NVFP4")
        and not place.offset
    )
    return plain and place.name.endswith(".weight") and entry.type.name in EXACT_SCHEMES and len(entry.shape) == 2


def _are_exact(source: GgufSource, names: tuple[str, ...]) -> bool:
    """Whether the parts of stacked experts are in blocks of one type, which a scheme holds."""
    kinds = {source.entry(name).type.name for name in names}
    return len(kinds) == 1 and kinds <= EXACT_SCHEMES.keys()


def _by_experts(source: GgufSource, stacks: Mapping[str, Mapping[int, str]]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The parts of each projection of each experts module, by rows.

    Raises:
        CheckpointError: one is missing, or they do not fit each other.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for stack, parts in stacks.items():
        experts, _, projection = stack.rpartition(".")
        names = tuple(parts[i] for i in sorted(parts))
        shapes = {source.entry(name).shape for name in names}
        if len(names) != len(PARTS[projection]) or len(shapes) > 1:
            raise CheckpointError(
                f"{source.path} needs {len(PARTS[projection])} tensors of one shape for {stack}, got "
                + ", ".join(f"{name} {list(source.entry(name).shape)}" for name in names)
            )
        found.setdefault(experts, {})[projection] = names
    for experts, projections in found.items():
        if len(projections) != 2:
            raise CheckpointError(
                f"{source.path} has {', '.join(projections)} of {experts} and not its other projection"
            )
    return found


def _dequantized(
    source: GgufSource, places: Mapping[str, Place], spelled: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, Oddity]]:
    """One line for each type of blocks that nothing runs packed: which, how many tensors, how many bytes. Whether an embedding is
    one of them is known when it is loaded."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in (part for names in spelled.values() for part in names):
        entry = source.entry(name)
        if entry.type.dtype is None and not (places[name].kind == "embedding" and _is_exact(entry, places[name])):
            what = f"{entry.type.name} has no kernel yet and is"
            if places[name].kind == "embedding":
                what = "embeddings are"
            elif places[name].kind == "experts":
                what = "experts of which not all are in one type of blocks that has a kernel are"
            elif places[name].kind == "latent":
                what = "keys and values of latent attention, apart in the file and one matrix in the model, are"
            found.setdefault((what, entry.type.name), []).append(name)
    lines = []
    for (what, kind), names in found.items():
        entries = [source.entry(name) for name in names]
        before = readable_size(sum(entry.nbytes for entry in entries))
        after = readable_size(2 * sum(entry.nbytes // entry.type.nbytes * entry.type.elements for entry in entries))
        oddity = Oddity(f"{what} dequantized while loading: {before} of {kind} become {after} in 16 bits", kind)
        lines += [(name, oddity) for name in names]
    return lines
