"""`to_gguf`: any checkpoint of a known architecture as a GGUF file, in a mix of types or without loss, one tensor at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ArgumentError, CheckpointError, ConversionError
from ..formats import Oddity, summary
from ..formats.gguf import WRITABLE_TYPES, ImportanceFile, SearchName, exact_blocks, gguf_blocks
from ..models.experts import ExpertsForm
from ..models.gguf_mixes import Chosen
from ..models.gguf_names import Place
from ..models.gguf_parts import part_of
from ..nn.experts import rows_in_halves
from ..storage import read_from
from ..storage.gguf import SUFFIX
from ..storage.gguf_header import MetaValue
from ..storage.gguf_types import GGML_TYPES, OF_DTYPE
from ..storage.gguf_writer import GgufWriter, gguf_writer
from ..tensor import QuantTensor
from ..text import describe
from .gguf import GgufCheckpoint
from .gguf_plan import Entry, GgufPlan, Slots, chosen_types, in_mix, plan_of, slots_of
from .source import Checkpoint

log = logging.getLogger(__name__)

_FLOATS: Final = ("F32", "F16", "BF16")


def plan_gguf(
    source: str | os.PathLike[str],
    type: str | None = None,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    importance: ImportanceFile | None = None,
    calibrated: bool = False,
) -> GgufPlan:
    """What `to_gguf` with the same arguments writes: types, sizes, metadata. Weights are read only where what they hold decides.

    Args:
        calibrated: with the types that a mix has where an importance is at hand, though none is given.

    Raises:
        ArgumentError, CheckpointError, ConversionError: as `to_gguf`.
    """
    if type is None:
        if pure or tensor_types or importance is not None:
            raise ArgumentError(
                "pure, tensor_types and importance choose how a type is made: name a type such as Q4_K_M"
            )
        slots = slots_of(Path(source))
        return plan_of(slots, None, _lossless_types(slots))
    slots = slots_of(Path(source))
    chosen = _writable(chosen_types(slots, type, pure, tensor_types, calibrated or importance is not None))
    if importance is not None:
        _check_importance(slots, importance, chosen)
    plan = plan_of(slots, type, chosen)
    return plan if importance is None else replace(plan, metadata={**plan.metadata, **_measured(importance)})


def plan_mixes(source: str | os.PathLike[str], mixes: Sequence[str]) -> dict[str, GgufPlan]:
    """What `to_gguf` writes in each of these mixes, to the byte.

    Raises:
        ArgumentError, CheckpointError, ConversionError: as `plan_gguf`.
    """
    slots = slots_of(Path(source))
    plans: dict[str, GgufPlan] = {}
    for mix in mixes:
        chosen = _writable(chosen_types(slots, mix, False, (), False))
        first = next(iter(plans.values()), None)
        plans[mix] = plan_of(slots, mix, chosen) if first is None else in_mix(first, slots, mix, chosen)
    return plans


def _writable(chosen: dict[str, Chosen]) -> dict[str, Chosen]:
    for name, found in chosen.items():
        if found.type not in (*_FLOATS, *WRITABLE_TYPES):
            raise ArgumentError(
                f"{name} was to be {found.type}, which is only read; written are {', '.join((*_FLOATS, *WRITABLE_TYPES))}"
            )
    return chosen


def to_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str | None = None,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    importance: ImportanceFile | None = None,
    overwrite: bool = False,
    search: SearchName = "plain",
) -> GgufPlan:
    """Write a checkpoint as a GGUF file that llama.cpp loads, all or nothing, with one tensor in memory at a time.

    With a type, every weight is made by llama.cpp's own search for the type that its rules give it (`models/gguf_mixes.py`); of a
    quantized checkpoint the dequantized weight, unless the type holds the quantized one without loss. Without a type nothing is
    lost: quantized weights become the smallest type that means the same, all others stay in their dtype (vectors are float32).

    Args:
        source: any checkpoint that `load` reads, of an architecture in `models/gguf_names.py`.
        target: the file, whose name ends in .gguf.
        type: a mix ("Q4_K_M"), or None.
        pure: every matrix in the one type.
        tensor_types: (regular expression on the name in the file, type); the first that is found decides.
        importance: how much the error of each input column counts, by name in the file.
        overwrite: replace a GGUF file.
        search: "plain": llama.cpp's blocks; "best": blocks of the same types with less error, in more time (`gguf_blocks`).

    Returns:
        The plan by which it was written.

    Raises:
        ArgumentError: no such type, or one that is only read; arguments that do not go together.
        ConversionError: no GGUF file can hold this model, its tokenizer, or (without a type) one of its weights; says why.
        CheckpointError: the source is not sound; the target exists; the disk refuses.
    """
    check_suffix(target)
    plan = plan_gguf(source, type, pure, tensor_types, importance)
    checkpoint = plan.checkpoint
    sources = read_from(checkpoint.path)
    with gguf_writer(target, plan.metadata, plan.planned(), overwrite, sources=sources) as writer:
        fill_gguf(writer, plan, importance, search)
    if type is not None and checkpoint.format is not None:
        log.warning(
            "%s is quantized already: weights that %s does not hold without loss were dequantized and quantized again",
            checkpoint.path, type,
        )  # fmt: skip
    return plan


def check_suffix(target: str | os.PathLike[str]) -> None:
    """Raises ArgumentError where the name of a file is none of a GGUF file."""
    path = Path(target)
    if path.suffix != SUFFIX:
        raise ArgumentError(f"a GGUF file is called something{SUFFIX}, got {path.name!r:.60}")


def fill_gguf(
    writer: GgufWriter, plan: GgufPlan, importance: ImportanceFile | None = None, search: SearchName = "plain"
) -> None:
    """Add every tensor of a plan to its file. Arguments and errors as of `to_gguf`."""
    checkpoint = plan.checkpoint
    oddities: list[tuple[str, Oddity]] = [*checkpoint.oddities]
    for name, tensor in plan.constants.items():
        writer.add(name, tensor)
    for name, entry in tqdm(plan.entries.items(), desc="writing", unit="tensor", leave=False, delay=2):
        found = None if importance is None else importance.entries.get(name)
        columns = None if found is None else found.importance(*entry.shape)
        writer.add(name, _data(name, entry, checkpoint, columns, search, oddities))
    for line in summary(oddities):
        log.warning("%s: %s", checkpoint.path, line)


def _measured(importance: ImportanceFile) -> dict[str, MetaValue]:
    """What llama.cpp's quantizer notes of an importance matrix."""
    found = {"quantize.imatrix.entries_count": MetaValue("u32", len(importance.entries))}
    if importance.datasets:
        found["quantize.imatrix.dataset"] = MetaValue("string", importance.datasets[0])
    if importance.chunk_count:
        found["quantize.imatrix.chunks_count"] = MetaValue("u32", importance.chunk_count)
    return found


def _check_importance(slots: Slots, importance: ImportanceFile, chosen: Mapping[str, Chosen]) -> None:
    """Raise where a matrix is of another model; say which weights it does not know."""
    for name, entry in importance.entries.items():
        if name in slots.shapes:
            try:
                entry.importance(*slots.shapes[name])
            except ArgumentError as error:
                raise ArgumentError(f"{name}: {error}") from error
    inner = [name for name, shape in slots.shapes.items() if len(shape) > 1 and name.startswith("blk.")]
    if not any(name in importance.entries for name in inner):
        raise ArgumentError(
            f"the importance is of none of this model's tensors ({', '.join(inner[:2])}, …), but of "
            f"{', '.join(list(importance.entries)[:2])}: it was measured on another model"
        )
    lacking = [name for name in inner if name not in importance.entries and chosen[name].type in WRITABLE_TYPES]
    if lacking:
        log.warning(
            "%d weights have no importance and are made without, for example %s", len(lacking), ", ".join(lacking[:3])
        )


def _data(
    name: str,
    entry: Entry,
    checkpoint: Checkpoint,
    importance: Tensor | None,
    search: SearchName,
    oddities: list[tuple[str, Oddity]],
) -> Tensor:
    """What the writer takes: blocks, or numbers of the planned dtype, in the file's order of rows."""
    module = entry.source.rpartition(".")[0]
    wanted = entry.chosen.type
    if entry.source in checkpoint.embeddings and not isinstance(checkpoint, GgufCheckpoint):
        return _again(name, entry.place, _embedding(checkpoint, entry.source), wanted, importance, search)
    if entry.source in checkpoint:
        tensor = part_of(entry.place, checkpoint.read(entry.source))
        return _made(name, entry.place, tensor.view(entry.shape), wanted, importance, search)
    if entry.source in checkpoint.stacks:
        return _experts(name, entry, checkpoint, importance, search, oddities)
    weight, found = checkpoint.weight(module)
    oddities += [(module, oddity) for oddity in found]
    if entry.place.kind == "latent":  # keys are transposed in the file, so that blocks have other weights in them
        part = part_of(entry.place, weight.dequantize(torch.float32))
        return _made(name, entry.place, part, wanted, importance, search)
    if tuple(weight.codes.shape) != entry.shape:
        raise CheckpointError(f"{module}: the model needs a weight {list(entry.shape)}, got {list(weight.codes.shape)}")
    return _again(name, entry.place, weight, wanted, importance, search)


def _experts(
    name: str,
    entry: Entry,
    checkpoint: Checkpoint,
    importance: Tensor | None,
    search: SearchName,
    oddities: list[tuple[str, Oddity]],
) -> Tensor:
    """Quantized experts, one after the other, in one type."""
    made = []
    for expert, one in enumerate(_parts_of_experts(checkpoint, entry.source, entry.place, oddities)):
        if tuple(one.codes.shape) != entry.shape[1:]:
            raise CheckpointError(
                f"expert {expert} of {entry.source}: the model needs {list(entry.shape[1:])}, got {list(one.codes.shape)}"
            )
        row = importance[expert] if importance is not None and importance.dim() == 2 else importance
        made.append(_again(name, entry.place, one, entry.chosen.type, row, search))
    return torch.stack(made)


def _again(
    name: str, place: Place, weight: QuantTensor, type: str, importance: Tensor | None, search: SearchName
) -> Tensor:
    """A quantized weight in a type: as it is where that loses nothing, else made anew."""
    if type not in _FLOATS:
        try:
            return place.rows_in_file(exact_blocks(weight, type)[1])
        except ConversionError:
            pass
    return _made(name, place, weight.dequantize(torch.float32), type, importance, search)


def _made(name: str, place: Place, tensor: Tensor, type: str, importance: Tensor | None, search: SearchName) -> Tensor:
    if not tensor.is_floating_point():
        raise ConversionError(
            f"{place.name} is {describe(tensor)}, which is no weight; expected floating-point numbers"
        )
    if place.offset:
        tensor = tensor.float() + place.offset
    tensor = place.rows_in_file(tensor)
    dtype = GGML_TYPES[type].dtype
    if dtype is None:
        try:
            return gguf_blocks(tensor, type, importance, search)
        except ArgumentError as error:
            raise ConversionError(f"{name}: {error}") from error
    made = tensor.to(dtype)
    if dtype == torch.float16 and not bool(made.isfinite().all()) and bool(tensor.isfinite().all()):
        raise ConversionError(
            f"{name}: weights up to {float(tensor.abs().max()):.3g} do not fit float16, which ends at 65504; take BF16"
        )
    return made


def _embedding(checkpoint: Checkpoint, name: str) -> QuantTensor:
    return QuantTensor.concat([*checkpoint.embedding(name)])


def _exact_type(checkpoint: Checkpoint, source: str, place: Place) -> str:
    """The smallest type that holds a quantized weight; of experts all of them, since they are one tensor.

    Raises:
        ConversionError: there is none.
    """
    if source in checkpoint.embeddings:
        return exact_blocks(_embedding(checkpoint, source))[0]
    if source not in checkpoint.stacks:
        return exact_blocks(checkpoint.weight(source.rpartition(".")[0]).weight)[0]
    found = {exact_blocks(one)[0] for one in _parts_of_experts(checkpoint, source, place)}
    widest = max(found, key=lambda type: GGML_TYPES[type].nbytes / GGML_TYPES[type].elements)
    if len(found) > 1:
        for one in _parts_of_experts(checkpoint, source, place):
            exact_blocks(one, widest)
    return widest


def _parts_of_experts(
    checkpoint: Checkpoint, source: str, place: Place, oddities: list[tuple[str, Oddity]] | None = None
) -> Iterator[QuantTensor]:
    """Of each expert the rows that a tensor of the file has; what is strange about it goes to `oddities`."""
    turned = place.turned and checkpoint.format is not None and checkpoint.format.rows_as_stored
    for weight, found in checkpoint.expert_weights(source):
        if oddities is not None:
            oddities += [(source, oddity) for oddity in found]
        if place.parts > 1 and turned:
            weight = rows_in_halves(ExpertsForm("gate_up_proj", 1, weight.K, weight.N // 2, True, True), weight)
        yield weight.shard("N", place.part, place.parts) if place.parts > 1 else weight


def _lossless_types(slots: Slots) -> dict[str, Chosen]:
    """The types that lose nothing, of a checkpoint that is quantized."""
    checkpoint = slots.checkpoint
    if isinstance(checkpoint, GgufCheckpoint):
        raise ConversionError(f"{checkpoint.path} is a GGUF file already; to make another of it, name a type (Q4_K_M)")
    if checkpoint.format is None:
        raise ConversionError(
            f"{checkpoint.path} holds no quantized weights; name the type that they are to have (qkernels quantize --type "
            "Q4_K_M, F16 or BF16)"
        )
    chosen = {}
    for name, source in slots.sources.items():
        if slots.places[name].kind == "latent" and source not in checkpoint:
            chosen[name] = Chosen("F32")  # half of a quantized matrix, transposed: no blocks are the same
        elif source not in checkpoint or source in checkpoint.embeddings:
            module = source if source in checkpoint.stacks else source.rpartition(".")[0]
            try:
                chosen[name] = Chosen(_exact_type(checkpoint, source, slots.places[name]))
            except ConversionError as error:
                raise ConversionError(
                    f"{module}: {error}; with loss: qkernels quantize {checkpoint.path} OUT.gguf --type Q4_K_M"
                ) from error
        elif len(slots.shapes[name]) < 2 or slots.places[name].offset or not name.endswith("weight"):
            chosen[name] = Chosen("F32")
        else:
            dtype = checkpoint.dtype(source)
            if dtype not in OF_DTYPE or OF_DTYPE[dtype].name not in _FLOATS:
                raise ConversionError(f"{source} is {dtype}, which has no lossless type in GGUF files that are read")
            chosen[name] = Chosen(OF_DTYPE[dtype].name)
    return chosen
