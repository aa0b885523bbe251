"""`GgufCheckpoint`: a GGUF file, or all parts of a split one, as a `Checkpoint`.

Linear layers whose blocks a `QuantScheme` holds without loss are quantized modules; every other tensor is read as numbers, and
what is in blocks of another type is dequantized, which the oddities say.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..formats import Config, Format, Oddity, Parsed
from ..formats.gguf import EXACT_SCHEMES, dequantize, weight_of
from ..formats.validation import naming
from ..models.gguf_config import config_of
from ..models.gguf_names import INPUT_SCALE, Place, architecture_of, places_of
from ..models.naming import into_model
from ..reports import readable_size
from ..storage.gguf import GgufEntry, GgufSource
from ..storage.gguf_types import FILE_TYPES
from ..text import dtype_name
from ..texts import load_tokenizer

log = logging.getLogger(__name__)


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
        modules: quantized module -> name of its weight in the file.
        spelled: every other tensor -> its name in the file.
        decoded: dtype in which blocks are read as numbers: float32, in which they are computed, or that of the model under whose
            names this is, so that memory holds no more than the model will.
    """

    source: GgufSource
    config: Mapping[str, Any]
    places: Mapping[str, Place]
    modules: Mapping[str, str]
    spelled: Mapping[str, str]
    oddities: tuple[tuple[str, Oddity], ...] = ()
    decoded: torch.dtype = torch.float32

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
        modules, spelled = {}, {}
        for name, place in places.items():
            if _is_exact(source.entry(name), place):
                modules[place.name.removesuffix(".weight")] = name
            else:
                spelled[place.name] = name
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
        name = self.modules[module]
        place, kind = self.places[name], self.source.entry(name).type.name
        scale = None if place.scale is None else self.source.read(place.scale)
        with naming(name):
            return Parsed(weight_of(place.rows(self.source.blocks(name)), kind, scale))

    @property
    def stacks(self) -> Collection[str]:
        return ()

    def expert_weights(self, stack: str) -> Iterator[Parsed]:
        raise KeyError(stack)

    def with_activations_of_the_file(self) -> GgufCheckpoint:
        """Itself: these files say nothing of activations."""
        return self

    def parts(self, module: str) -> list[str]:
        return [self.modules[module]]

    def module_nbytes(self, module: str) -> int:
        return self.source.entry(self.modules[module]).nbytes

    def names(self) -> list[str]:
        return sorted(self.spelled)

    def __contains__(self, name: object) -> bool:
        return name in self.spelled

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        entry, place = self._entry(name), self.places[self.spelled[name]]
        if place.offset or place.scale is not None:
            return torch.float32
        return self.decoded if entry.type.dtype is None else entry.type.dtype

    def stored_as(self, name: str) -> str:
        ggml = self._entry(name).type
        return ggml.name if ggml.dtype is None else dtype_name(ggml.dtype)

    def nbytes(self, name: str) -> int:
        return self._entry(name).nbytes

    def read(self, name: str) -> Tensor:
        """A tensor that is no quantized module's, in memory of its own, on the CPU.

        Raises:
            CheckpointError: as `GgufSource.blocks`; or blocks hold NaN or infinities.
        """
        spelled = self.spelled[name]
        entry, place = self.source.entry(spelled), self.places[spelled]
        if entry.type.dtype is not None:
            tensor = place.rows(self.source.read(spelled))
        else:
            tensor = dequantize(place.rows(self.source.blocks(spelled)), entry.type.name, self.dtype(name))
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
        here = {spelled: name for name, spelled in self.spelled.items()}
        owner = {spelled: module for module, spelled in self.modules.items()}
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
            modules={way.names[module]: name for module, name in self.modules.items()},
            spelled={way.names[name]: spelled for name, spelled in self.spelled.items()},
            decoded=dtype if isinstance(dtype, torch.dtype) else torch.float32,
        )

    def spelling(self, name: str) -> str:
        """The name in the file, for messages."""
        return self.modules.get(name) or self.spelled.get(name, name)

    def files(self) -> list[Path]:
        return list(self.source.files)

    def copy_side_files(self, target: Path) -> None:
        """Write the tokenizer that the metadata holds; where it cannot be rebuilt, a warning says why."""
        try:
            load_tokenizer(self.path).save_pretrained(target)
        except CheckpointError as error:
            log.warning("%s: the tokenizer stays behind: %s", self.path, error)

    def _entry(self, name: str) -> GgufEntry:
        return self.source.entry(self.spelled.get(name, name))


def _is_exact(entry: GgufEntry, place: Place) -> bool:
    """Whether a tensor is a linear layer's weight in blocks that a scheme holds."""
    plain = place.kind == "linear" and (place.scale is None or entry.type.name == "NVFP4") and not place.offset
    return plain and place.name.endswith(".weight") and entry.type.name in EXACT_SCHEMES and len(entry.shape) == 2


def _dequantized(
    source: GgufSource, places: Mapping[str, Place], spelled: Mapping[str, str]
) -> list[tuple[str, Oddity]]:
    """One line for each type of blocks that nothing runs packed: which, how many tensors, how many bytes."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in spelled.values():
        entry = source.entry(name)
        if entry.type.dtype is None:
            what = (
                "embeddings are" if places[name].kind == "embedding" else f"{entry.type.name} has no kernel yet and is"
            )
            found.setdefault((what, entry.type.name), []).append(name)
    lines = []
    for (what, kind), names in found.items():
        entries = [source.entry(name) for name in names]
        before = readable_size(sum(entry.nbytes for entry in entries))
        after = readable_size(2 * sum(entry.nbytes // entry.type.nbytes * entry.type.elements for entry in entries))
        oddity = Oddity(f"{what} dequantized while loading: {before} of {kind} become {after} in 16 bits", kind)
        lines += [(name, oddity) for name in names]
    return lines
