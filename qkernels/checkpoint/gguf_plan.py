"""What a GGUF file of a checkpoint will hold, told from headers alone: places, types, metadata, tokenizer.

The plan is rehearsed: its header, with holes for weights, goes to a temporary file that this package's own reader opens. What the
reader makes of it has to be the model: its config, its places, its token ids. So a file that would be read as another model is
refused before the work.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, ConversionError
from ..models.gguf_config import config_of
from ..models.gguf_metadata import QUANTIZATION_VERSION, check_config, experts_in, metadata_of
from ..models.gguf_mixes import FILE_TYPE_OF, Chosen, Facts, file_order, types_of
from ..models.gguf_names import GgufArchitecture, Place, architecture_for, places_for, places_of
from ..models.gguf_parts import part_shape
from ..models.gguf_tokenizer import tokenizer_of
from ..models.gguf_vocabulary import check_tokenizer, vocabulary_of
from ..reports import readable_size
from ..storage.gguf import GgufSource
from ..storage.gguf_header import MetaValue
from ..storage.gguf_types import GGML_TYPES
from ..storage.gguf_writer import GgufWriter, Planned
from ..text import table
from ..texts import load_tokenizer
from .loading import check_names, model_of, tied_slots
from .source import Checkpoint, open_checkpoint


class Entry(NamedTuple):
    """A tensor to be written.

    Args:
        place: where it belongs in the model.
        source: its name in the checkpoint, which is another one where two are tied.
    """

    place: Place
    source: str
    shape: tuple[int, ...]
    chosen: Chosen

    @property
    def nbytes(self) -> int:
        ggml = GGML_TYPES[self.chosen.type]
        return math.prod(self.shape) // ggml.elements * ggml.nbytes


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file before it is written.

    Args:
        checkpoint: under the names of its model.
        architecture: of the file.
        mix: such as "Q4_K_M"; None where types are those that lose nothing.
        entries: by name in the file, in its order.
        metadata: in its order.
        constants: small tensors that are no part of the model's (factors of rope).
        file_nbytes: of the whole file, once it was rehearsed.
    """

    checkpoint: Checkpoint
    architecture: GgufArchitecture
    mix: str | None
    entries: Mapping[str, Entry]
    metadata: Mapping[str, MetaValue]
    constants: Mapping[str, Tensor]
    file_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values()) + sum(t.nbytes for t in self.constants.values())

    def planned(self) -> list[Planned]:
        """What the writer is told."""
        constants = [Planned(name, "F32", tuple(tensor.shape)) for name, tensor in self.constants.items()]
        return constants + [Planned(name, entry.chosen.type, entry.shape) for name, entry in self.entries.items()]

    def to_markdown(self) -> str:
        """Types by kind of tensor, with sizes; then what had to be of another type than the mix wanted."""
        kinds: dict[str, list[Entry]] = {}
        for name, entry in self.entries.items():
            kinds.setdefault(name.removeprefix(f"blk.{file_order(name)[0]}."), []).append(entry)
        rows = [
            [
                kind,
                str(len(entries)),
                _counted([entry.chosen.type for entry in entries]),
                readable_size(sum(e.nbytes for e in entries)),
            ]
            for kind, entries in kinds.items()
        ]
        weights = sum(math.prod(entry.shape) for entry in self.entries.values())
        parts = [
            table(["tensor", "count", "types", "size"], rows),
            f"{self.mix or 'without loss'}: {readable_size(self.nbytes)}, {8 * self.nbytes / max(weights, 1):.2f} bits a weight",
        ]
        swapped = {
            (entry.chosen.instead_of, entry.chosen.type, entry.shape[-1]): kind
            for kind, entries in kinds.items()
            for entry in entries
            if entry.chosen.instead_of is not None
        }
        parts += [
            f"{kind}: {type} instead of {wanted}, whose blocks do not divide rows of {columns}"
            for (wanted, type, columns), kind in swapped.items()
        ]
        return "\n\n".join(parts)


def _counted(types: Sequence[str]) -> str:
    """ "Q4_K 24, Q6_K 4", the most frequent first."""
    counts = {type: types.count(type) for type in dict.fromkeys(types)}
    return ", ".join(f"{type} {count}" for type, count in sorted(counts.items(), key=lambda item: -item[1]))


class Slots(NamedTuple):
    """Which tensors a file will hold, and of what model.

    Args:
        checkpoint: under the names of the model.
        config: of the model, every field.
        places: by name in the file.
        sources: name in the checkpoint of each.
        shapes: of each, as the model has it.
    """

    checkpoint: Checkpoint
    architecture: GgufArchitecture
    config: Mapping[str, Any]
    places: Mapping[str, Place]
    sources: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def slots_of(path: str | Path) -> Slots:
    """The tensors of a checkpoint's model with their places in a GGUF file; reads headers, and twins that may be tied.

    Raises:
        CheckpointError: the checkpoint is not sound, or does not fit its model.
        ConversionError: no such file holds this model.
    """
    checkpoint = open_checkpoint(path)
    architecture = architecture_for(str(checkpoint.config.get("model_type")))
    model, named = model_of(checkpoint, torch.float32)
    names: dict[str, str] = {}
    missing: list[str] = []
    state = model.state_dict()
    for slot in tied_slots(model):
        present = [name for name in slot if _holds(named, name)]
        if not present:
            missing.append(slot[0])
        elif len(present) > 1 and not _equal(named, present):
            names |= {name: name for name in present}
        else:
            names[slot[0]] = present[0]
    taken = {*names.values(), *(name for slot in tied_slots(model) for name in slot)}
    check_names(
        model, missing, [name for name in _names(named) if name not in taken and not _is_zero(named, name)], named
    )
    config = model.config.to_dict()
    places = places_for(names, architecture, config)
    shapes = {spelled: _shape_in_file(tuple(state[place.name].shape), place) for spelled, place in places.items()}
    sources = {spelled: names[place.name] for spelled, place in places.items()}
    for spelled, source in sources.items():
        needed = tuple(state[places[spelled].name].shape)
        if source in named and named.shape(source) != needed:
            raise CheckpointError(f"{source}: the model needs {list(needed)}, got {list(named.shape(source))}")
    return Slots(named, architecture, config, places, sources, shapes)


def _shape_in_file(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """Of what lies in parts the part's; a matrix of one row is a vector."""
    return shape[1:] if place.kind == "row" else part_shape(place, shape)


def _holds(checkpoint: Checkpoint, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return name in checkpoint or name in checkpoint.stacks or (leaf == "weight" and module in checkpoint.modules)


def _names(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.names(), *(f"{module}.weight" for module in checkpoint.modules), *checkpoint.stacks]


def _equal(checkpoint: Checkpoint, names: Sequence[str]) -> bool:
    """Whether tensors that the config ties are the same in the files; a quantized one is another than its float twin."""
    if any(name not in checkpoint for name in names):
        return False
    first, *others = (checkpoint.read(name) for name in names)
    return all(torch.equal(first, other) for other in others)


def _is_zero(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it is a bias of zeros, which AutoGPTQ gives to every module."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and module in checkpoint.modules and not bool(checkpoint.read(name).any())


def chosen_types(
    slots: Slots, mix: str, pure: bool, overrides: Sequence[tuple[str, str]], importance: bool
) -> dict[str, Chosen]:
    """The types that a mix gives to them."""
    config = slots.config
    heads = config["num_attention_heads"]
    kv_heads = 1 if slots.architecture.latent else config["num_key_value_heads"]
    facts = Facts(slots.architecture.name, config["num_hidden_layers"], heads, kv_heads, experts_in(config))
    return types_of(slots.shapes, mix, facts, pure, overrides, importance)


def plan_of(slots: Slots, mix: str | None, chosen: Mapping[str, Chosen]) -> GgufPlan:
    """The plan of a file, rehearsed.

    Args:
        chosen: the type of each tensor, by name in the file.

    Raises:
        CheckpointError: the checkpoint has no tokenizer that can be read.
        ConversionError: the metadata cannot say what the model or its tokenizer is; names it.
    """
    entries = _entries(slots, chosen)
    called = mix or nearest_mix({name: (entry.chosen.type, entry.nbytes) for name, entry in entries.items()})
    keys, constants = metadata_of(slots.config, slots.architecture)
    general = {
        "general.architecture": MetaValue("string", slots.architecture.name),
        "general.type": MetaValue("string", "model"),
        "general.quantization_version": MetaValue("u32", QUANTIZATION_VERSION),
        "general.file_type": MetaValue("u32", FILE_TYPE_OF[called]),
    }
    tokenizer = load_tokenizer(slots.checkpoint.path)
    named = vocabulary_of(tokenizer, slots.config["vocab_size"], _stops(slots))
    error: ConversionError | None = None
    for words in named:
        name = {"general.name": MetaValue("string", _name(slots, words))}
        plan = GgufPlan(slots.checkpoint, slots.architecture, mix, entries, general | name | keys | words, constants)
        try:
            return replace(plan, file_nbytes=_rehearse(plan, slots, tokenizer))
        except ConversionError as found:
            error = error or found
    assert error is not None
    raise error


def in_mix(plan: GgufPlan, slots: Slots, mix: str, chosen: Mapping[str, Chosen]) -> GgufPlan:
    """The plan of the same model in another mix, whose metadata need no rehearsal."""
    metadata = {**plan.metadata, "general.file_type": MetaValue("u32", FILE_TYPE_OF[mix])}
    made = replace(plan, mix=mix, entries=_entries(slots, chosen), metadata=metadata)
    with tempfile.TemporaryDirectory() as directory:
        return replace(made, file_nbytes=write_header(made, Path(directory)).stat().st_size)


def write_header(plan: GgufPlan, directory: Path) -> Path:
    """A file as the plan says, with holes for all tensors that are weights of the model: what can be told from headers."""
    writer = GgufWriter(directory, ["header.gguf"], plan.metadata, [plan.planned()])
    try:
        for name, tensor in plan.constants.items():
            writer.add(name, tensor)
    finally:
        writer.abandon()
    return writer.paths[0]


def _entries(slots: Slots, chosen: Mapping[str, Chosen]) -> dict[str, Entry]:
    names = sorted(slots.places, key=file_order)
    return {name: Entry(slots.places[name], slots.sources[name], slots.shapes[name], chosen[name]) for name in names}


def _name(slots: Slots, words: Mapping[str, MetaValue]) -> str:
    """That of the directory; llama.cpp takes any name with "phi3" in it for a vocabulary that has Phi-3's tokens, and fails
    without them."""
    name = slots.checkpoint.path.resolve().stem
    fragile = any(part in name.lower() for part in ("phi3", "phi-3"))
    has_them = {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= {*words["tokenizer.ggml.tokens"].value}
    return slots.architecture.model_type.rstrip("0123456789") if fragile and not has_them else name


def nearest_mix(tensors: Mapping[str, tuple[str, int]]) -> str:
    """The mix by which a file is called whose types nobody named: that of the type that holds most of it.

    Args:
        tensors: types and bytes.
    """
    nbytes: dict[str, int] = {}
    for type, count in tensors.values():
        nbytes[type] = nbytes.get(type, 0) + count
    most = max(nbytes, key=nbytes.__getitem__)
    known = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}.get(most, most)
    return known if known in FILE_TYPE_OF else "F16"


def _stops(slots: Slots) -> list[int]:
    """Ids that end a text, by generation_config.json or config.json."""
    path = slots.checkpoint.path / "generation_config.json"
    found = slots.config.get("eos_token_id")
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", found)
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is no JSON object: {error}") from error
    return [number for number in (found if isinstance(found, list) else [found]) if isinstance(number, int)]


def _rehearse(plan: GgufPlan, slots: Slots, tokenizer: Any) -> int:
    """Raise unless the file of a plan is read as the model that it is of; its bytes."""
    with tempfile.TemporaryDirectory() as directory:
        path = write_header(plan, Path(directory))
        source = GgufSource.open(path)
        config, unread = config_of(source, plan.architecture)
        if unread:
            raise ConversionError(f"the metadata have keys that no reader understands: {', '.join(unread)}")
        from transformers import CONFIG_MAPPING

        read = CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
        check_config(slots.config, read, plan.architecture.name)
        places = places_of(source, plan.architecture, config)
        if places != dict(slots.places):
            differing = next(name for name in {*places, *slots.places} if places.get(name) != slots.places.get(name))
            raise ConversionError(
                f"{differing} is read back as {places.get(differing)}, expected {slots.places.get(differing)}"
            )
        check_tokenizer(tokenizer_of(source), tokenizer, plan.metadata)
        return path.stat().st_size
