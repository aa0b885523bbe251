"""The models that can be planned: checkpoints of every kind, a config.json alone, a Hub id; headers are all that is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.arguments import stored_dtype
from ..checkpoint.directory import DirectoryCheckpoint
from ..checkpoint.gguf import GgufCheckpoint
from ..checkpoint.layers import kept_in_fp32
from ..checkpoint.loading import check_fits, model_of
from ..errors import CheckpointError, QKernelsError
from ..formats import Parsed, summary
from ..formats.gguf import weight_of
from ..formats.stacks import experts_in, for_experts, parsed_experts
from ..hub import headers_of, hub_id
from ..models.building import empty_model
from ..nn.selection import Selection
from ..scheme import QuantScheme
from ..storage import CONFIG, read_json
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..text import dtype_name


@dataclass(frozen=True)
class Planned:
    """A model whose parameters are on meta, and what its files say.

    Args:
        name: as it was asked for.
        dtype: of activations and of weights that are not quantized.
        file: bytes of all tensors in the files; None where there are none (a config.json).
        format: of a quantized checkpoint, None of others.
        weights: of the quantized modules, stacks and embeddings of a checkpoint, on meta, without their order of columns.
        ordered: those of them that have one.
        dequantizes: whether a module that no kernel takes is dequantized (GGUF) and no error.
        notes: what a user should know of the files.
        checkpoint: of a float model in files, under the model's names.
    """

    name: str
    model: Any
    dtype: torch.dtype
    file: int | None = None
    format: str | None = None
    weights: Mapping[str, QuantTensor] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    dequantizes: bool = False
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """Of the quantized modules and stacks."""
        return {name: weight.scheme for name, weight in self.weights.items()}

    def selection(self) -> Selection:
        """What the files quantize."""
        layers = {name: scheme for name, scheme in self.schemes.items() if self.weights[name].codes.dim() == 2}
        experts: dict[str, dict[str, QuantScheme]] = {}
        for name, scheme in self.schemes.items():
            if name not in layers:
                module, _, projection = name.rpartition(".")
                experts.setdefault(module, {})[projection] = scheme
        return Selection(layers, {}, experts)

    def keep(self, name: str) -> bool:
        """Whether a parameter stays in float32."""
        return kept_in_fp32(self.model, name, self.dtype)


@contextmanager
def planned_model(model: str, dtype: torch.dtype | None, revision: str | None = None) -> Iterator[Planned]:
    """The model of that name; a Hub id's headers are kept while this holds.

    Raises:
        CheckpointError: there is none, or it is malformed.
    """
    if (found := hub_id(model)) is not None:
        with headers_of(found, revision) as directory:
            yield _planned(model, directory, dtype, at_hand=False)
    else:
        yield _planned(model, Path(model), dtype, at_hand=True)


def _planned(name: str, path: Path, dtype: torch.dtype | None, at_hand: bool) -> Planned:
    if path.name.endswith(".json") and path.is_file():
        return _of_config(name, path, dtype)
    if (path / CONFIG).is_file() and not any(p.suffix in (".safetensors", ".gguf") for p in path.iterdir()):
        return _of_config(name, path / CONFIG, dtype)
    return planned_file(name, path, dtype, at_hand)


def planned_file(name: str, path: Path, dtype: torch.dtype | None, at_hand: bool = True) -> Planned:
    """A checkpoint; `at_hand`: whether its tensors are there, too."""
    checkpoint = open_checkpoint(path)
    chosen = dtype or stored_dtype(checkpoint)
    model, checkpoint = model_of(checkpoint, chosen)
    parts = (*checkpoint.modules, *checkpoint.stacks)
    file = sum(map(checkpoint.nbytes, checkpoint.names())) + sum(map(checkpoint.module_nbytes, parts))
    notes = tuple(summary([*checkpoint.oddities]))
    if checkpoint.format is None:
        check_fits(model, checkpoint)
        return Planned(name, model, chosen, file, notes=notes, checkpoint=checkpoint)
    weights, ordered = _stored(checkpoint, at_hand)
    return Planned(
        name,
        model,
        chosen,
        file,
        checkpoint.format.name,
        weights,
        ordered,
        isinstance(checkpoint, GgufCheckpoint),
        notes,
    )


def _of_config(name: str, path: Path, dtype: torch.dtype | None) -> Planned:
    config = read_json(path)
    named = str(config.get("dtype", config.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    known = {dtype_name(each): each for each in FLOAT_DTYPES}
    if dtype is None and named not in known:
        raise CheckpointError(f"{path} needs dtype to be {', '.join(known)}, got {named!r:.40}; pass --dtype")
    notes = ["a config.json alone: sizes are those of the model that it describes, not of files"]
    if "quantization_config" in config:
        notes.append(
            "what it says of quantization is not looked at: rows are of the model in 16 bits, and quantized from there"
        )
    chosen = dtype or known[named]
    return Planned(name, empty_model(config, chosen, path.parent), chosen, notes=tuple(notes))


# --- quantized modules without their values -----------------------------------------------------------------------------------


def _stored(checkpoint: Checkpoint, at_hand: bool) -> tuple[dict[str, QuantTensor], frozenset[str]]:
    """Every quantized weight on meta, and which of them have an order of columns. Modules of one kind and of the same shapes are
    looked at once."""
    weights: dict[str, QuantTensor] = {}
    ordered: set[str] = set()
    known: dict[Any, tuple[QuantTensor, bool]] = {}
    for module in checkpoint.modules:
        if isinstance(checkpoint, GgufCheckpoint):
            weights[module] = _of_blocks(checkpoint, checkpoint.modules[module])
            continue
        assert isinstance(checkpoint, DirectoryCheckpoint)
        tensors = checkpoint.modules[module]
        weight, has_order = _once(known, checkpoint, checkpoint.spelling(module), tensors, at_hand)
        weights[module] = weight
        ordered.update([module] if has_order else [])
    for name in checkpoint.embeddings:
        module = name.removesuffix(".weight")
        if isinstance(checkpoint, GgufCheckpoint):
            weights[module] = _of_blocks(checkpoint, checkpoint.spelled[name])
            continue
        assert isinstance(checkpoint, DirectoryCheckpoint)
        spelled = checkpoint.spelling(name)
        weights[module], _ = _once(
            known, checkpoint, spelled.removesuffix(".weight"), checkpoint.packed[spelled], at_hand
        )
    for stack in checkpoint.stacks:
        if isinstance(checkpoint, GgufCheckpoint):
            weights[stack] = _of_blocks(checkpoint, checkpoint.members[stack])
            continue
        assert isinstance(checkpoint, DirectoryCheckpoint)
        weight, has_order = _stack(known, checkpoint, stack, at_hand)
        weights[stack] = weight
        ordered.update([stack] if has_order else [])
    return weights, frozenset(ordered)


def _stack(
    known: dict[Any, Any], checkpoint: DirectoryCheckpoint, stack: str, at_hand: bool
) -> tuple[QuantTensor, bool]:
    members = checkpoint.members[stack]
    all_of_them = [_once(known, checkpoint, module, checkpoint.inside[module], at_hand) for module in members.values()]
    found = [(for_experts(Parsed(weight), {}).weight, has_order) for weight, has_order in all_of_them]
    if len(members) == 1:
        return found[0]
    experts = len({expert for expert, _ in members})
    first = [weight for (weight, _), (expert, _) in zip(found, members, strict=True) if expert == 0]
    one = first[0] if len(first) == 1 else QuantTensor.concat(first)
    return QuantTensor.stack([one] * experts), any(has_order for _, has_order in found)


def _once(
    known: dict[Any, tuple[QuantTensor, bool]],
    checkpoint: DirectoryCheckpoint,
    module: str,
    tensors: Mapping[str, str],
    at_hand: bool,
) -> tuple[QuantTensor, bool]:
    source = checkpoint.source
    shapes = tuple((suffix, source.dtype(name), source.shape(name)) for suffix, name in tensors.items())
    key = (re.sub(r"\d+", "*", module), shapes)
    if key not in known:
        known[key] = _without_values(checkpoint, module, tensors, at_hand)
    return known[key]


def _without_values(
    checkpoint: DirectoryCheckpoint, module: str, tensors: Mapping[str, str], at_hand: bool
) -> tuple[QuantTensor, bool]:
    """What a format makes of tensors of these shapes, without looking at codes: they are 0. What tells how they are grouped, and
    whether they are symmetric, is read where the files are at hand, of one module of each kind and shape; else scales are 1 and
    columns in their natural order.

    Raises:
        CheckpointError: it takes values to tell.
    """
    assert checkpoint.format is not None
    source = checkpoint.source
    made: dict[str, Tensor] = {}
    codes = max(tensors, key=lambda suffix: source.nbytes(tensors[suffix]))
    for suffix, name in tensors.items():
        known = at_hand and suffix != codes
        made[suffix] = source.read(name) if known else _ones(source.dtype(name), source.shape(name))
    if not at_hand:
        made = {suffix: t for suffix, t in made.items() if suffix not in ("g_idx", "weight_g_idx")}
    experts = experts_in(made, checkpoint.format)
    try:
        if experts is None:
            weight = checkpoint.format.parse(module, made, checkpoint.quantization).weight
        else:
            weight = next(parsed_experts(checkpoint.format, module, made, checkpoint.quantization)).weight
    except (QKernelsError, KeyError) as error:
        raise CheckpointError(
            f"{module}: a file of {checkpoint.format.name} cannot be planned from its headers ({error}); "
            + ("see qkernels inspect" if at_hand else "download it, and plan the directory")
        ) from error
    has_order = weight.group_index is not None
    if not at_hand and checkpoint.quantization.get("desc_act") is True:
        has_order = True  # what its indices would tell is allowed for
    one = replace(weight, group_index=None).to("meta")
    return one if experts is None else QuantTensor.stack([one] * experts), has_order


def _ones(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Where a byte is a float it is a scale or a code: 1 is a valid one of both."""
    if dtype.is_floating_point:
        return (
            torch.ones(shape, dtype=torch.float16).to(dtype) if dtype.itemsize == 1 else torch.ones(shape, dtype=dtype)
        )
    return torch.zeros(shape, dtype=dtype)


def _of_blocks(checkpoint: GgufCheckpoint, names: Sequence[str]) -> QuantTensor:
    """The weight of a layer, or of stacked experts, whose gate and up may be two entries."""
    entries = [checkpoint.source.entry(name) for name in names]
    one = []
    for entry in entries:
        *lead, rows, _ = entry.shape
        nbytes = entry.nbytes // (rows * prod(lead))
        one.append(weight_of(torch.empty(rows, nbytes, dtype=torch.uint8, device="meta"), entry.type.name))
    weight = one[0] if len(one) == 1 else QuantTensor.concat(one)
    experts = entries[0].shape[:-2]
    return QuantTensor.stack([weight] * experts[0]) if experts else weight
