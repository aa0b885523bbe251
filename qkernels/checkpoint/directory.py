"""`DirectoryCheckpoint`: a Hugging Face directory (config.json, safetensors) as a `Checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError
from ..formats import ACTIVATIONS, METADATA, READ_ONLY, SHAPES, Format, Oddity, Parsed, fp8, modelopt, native, quanto
from ..formats.beyond import beyond_weights, check_below
from ..formats.stacks import experts_in, for_experts, parsed_experts, stack_and_suffix
from ..models.building import shapes_of_linears
from ..models.experts import ExpertsForm, experts_of
from ..models.naming import WHOLE, Conversion, Members, into_model
from ..nn.huge_pages import empty_on_huge_pages
from ..storage import QUANTIZATION_FILES, TensorSource, copy_side_files, read_json
from ..tensor import QuantTensor
from ..text import dtype_name
from .packed import PACKED, Ready, embedded, ready
from .registry import WRITTEN, detect

# Suffixes that only quantized weights have. optimum-quanto leaves config.json as it was: a file beside it names it.
_QUANTO = ("weight._data", "weight._data._data")
_TELLING = {f.required[0] for f in (*WRITTEN.values(), *READ_ONLY.values()) if f.joint == "."} - {"weight", "scale"}


@dataclass(frozen=True)
class DirectoryCheckpoint:
    """Which tensors of a directory make up which quantized module. Make it with `DirectoryCheckpoint.open`.

    Args:
        source: all tensors of the directory.
        format: None where nothing is quantized.
        quantization: its quantization_config, empty where nothing is quantized.
        modules: module -> suffix -> name of the tensor in the files.
        others: names of all other tensors, biases of quantized modules among them, sorted.
        oddities: what is strange about it apart from single weights, by module or field.
        spelled: names in the files of tensors and modules that have another one here, by the one they have here.
        made: conversions of tensors in the files, by the names of what they make, with its shape as a tensor on meta.
        members: the modules in the files that each stack of quantized experts is made of.
        inside: their tensors: module in the files -> suffix -> name.
        packed: embeddings that lie packed, among `others`: name in the files -> suffix -> name of the tensor.
    """

    source: TensorSource
    format: Format | None
    quantization: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, str]]
    others: tuple[str, ...]
    oddities: tuple[tuple[str, Oddity], ...] = ()
    spelled: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, tuple[Conversion, Tensor]] = field(default_factory=dict)
    members: Mapping[str, Members] = field(default_factory=dict)
    inside: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    packed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> DirectoryCheckpoint:
        """Read the headers and group the tensors; no weight is read.

        Raises:
            CheckpointError: see `TensorSource.open` and `detect`; or a module lacks a tensor of its format, has a float
                weight as well, or is called quantized by the config but is not; or the config says nothing, but tensors
                look quantized; or the file asks for what is not done here (`formats/beyond.py`), or has a tensor under a
                quantized module that nobody knows.
        """
        source = TensorSource.open(directory)
        config = quantization_config(source)
        if config is None:
            _check_unquantized(source)
            return cls(source, None, {}, {}, tuple(source.names()))
        config = {key: value for key, value in config.items() if key not in (ACTIVATIONS, SHAPES)}
        found = detect(config)
        if found.needs_metadata:
            config = config | {METADATA: source.metadata}
        if found.needs_shapes:
            config = config | {SHAPES: cache(partial(shapes_of_linears, source.config, source.directory))}
        beyond = beyond_weights(config, source.names())
        modules = _group([name for name in source.names() if name not in beyond.aside], found)
        if not modules:
            raise CheckpointError(
                f"{source.directory} declares the format {found.name} but has no tensor *.{found.required[0]}"
            )
        owned = {name for tensors in modules.values() for name in tensors.values()} | beyond.aside
        others = tuple(name for name in source.names() if name not in owned)
        check_below(modules, others)
        _check_scaled(source, others, found)
        packed = {f"{module}.weight": modules.pop(module) for module in embedded(config, found, modules)}
        others = tuple(sorted([*others, *packed]))
        return cls(source, found, config, modules, others, beyond.oddities, packed=packed)

    @property
    def path(self) -> Path:
        return self.source.directory

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module by suffix."""
        return {suffix: self.source.read(name) for suffix, name in self.modules[module].items()}

    def weight(self, module: str) -> Parsed:
        """The validated weight of a module, and what is strange about it.

        Raises:
            CheckpointError: naming the module and the field.
        """
        assert self.format is not None
        spelled, tensors = self.spelled.get(module, module), self.tensors(module)
        if experts_in(tensors, self.format) is None:
            return self.format.parse(spelled, tensors, self.quantization)
        return _stacked(spelled, parsed_experts(self.format, spelled, tensors, self.quantization))

    @property
    def stacks(self) -> list[str]:
        return list(self.members)

    def expert_weights(self, stack: str) -> Iterator[Parsed]:
        """One expert in memory at a time, but for stacks that lie in the files as one.

        Raises:
            CheckpointError: as `weight`; or the parts of an expert differ in what a weight has once (their schemes).
        """
        assert self.format is not None
        members = self.members[stack]

        def tensors(module: str) -> dict[str, Tensor]:
            return {suffix: self.source.read(name) for suffix, name in self.inside[module].items()}

        def parsed(module: str) -> Parsed:
            assert self.format is not None
            return for_experts(self.format.parse(module, tensors(module), self.quantization), self.quantization)

        if WHOLE in members and self.format.sliced:
            module = members[WHOLE]
            stored = tensors(module)
            if experts_in(stored, self.format) is None:
                raise CheckpointError(f"{module} must hold stacked experts [E, N, K], got one matrix")
            yield from parsed_experts(self.format, module, stored, self.quantization)
            return
        if WHOLE in members:
            whole = parsed(members[WHOLE])
            for expert in range(whole.weight.codes.shape[0] if whole.weight.codes.dim() == 3 else 0):
                yield Parsed(whole.weight[expert], whole.oddities)
            return
        for expert in sorted({expert for expert, _ in members}):
            parts = [parsed(module) for (e, _), module in sorted(members.items()) if e == expert]
            try:
                weight = parts[0].weight if len(parts) == 1 else QuantTensor.concat([part.weight for part in parts])
            except ArgumentError as error:
                raise CheckpointError(
                    f"expert {expert} of {stack}: gate and up are one matrix here; {error}"
                ) from error
            yield Parsed(weight, tuple(oddity for part in parts for oddity in part.oddities))

    def ready(self, module: str) -> Ready | None:
        """Of files that `qkernels pack` wrote for a kernel.

        Raises:
            CheckpointError: as `weight`.
        """
        return self._ready(self.spelled.get(module, module), self.modules[module])

    def _ready(self, spelled: str, tensors: Mapping[str, str]) -> Ready | None:
        if self.format is None or self.format.name not in PACKED:
            return None
        read = {suffix: self.source.read(name, empty_on_huge_pages) for suffix, name in tensors.items()}
        return ready(self.format, spelled, read, self.quantization)

    def weight_in_parts(self, module: str) -> None:
        """Of none: these formats keep a layer's tensors apart, and some turn their rows around."""
        return None

    def weight_shape(self, module: str) -> tuple[int, int]:
        """Of none."""
        raise CheckpointError(f"{module} of {self.path} is not read in parts")

    @property
    def embeddings(self) -> list[str]:
        """Those of files that `qkernels pack` wrote for a kernel; the other formats keep them in floats."""
        return [name for name in self.others if self._packed(name) is not None]

    def _packed(self, name: str) -> Mapping[str, str] | None:
        return self.packed.get(self.spelled.get(name, name))

    def embedding(self, name: str) -> Iterator[QuantTensor]:
        """In one part.

        Raises:
            CheckpointError: as `weight`.
        """
        assert self.format is not None
        spelled = self.spelled.get(name, name)
        read = {suffix: self.source.read(tensor) for suffix, tensor in self.packed[spelled].items()}
        yield self.format.parse(spelled.removesuffix(".weight"), read, self.quantization).weight

    def embedding_ready(self, name: str) -> Ready | None:
        """As `ready`, of an embedding.

        Raises:
            CheckpointError: as `weight`.
        """
        spelled = self.spelled.get(name, name)
        return self._ready(spelled.removesuffix(".weight"), self.packed[spelled])

    def embedding_parts(self, name: str) -> list[str]:
        return list(self.packed[self.spelled.get(name, name)].values())

    def with_activations_of_the_file(self) -> DirectoryCheckpoint:
        """The same checkpoint, whose weights run with the activations that it asks for."""
        return replace(self, quantization={**self.quantization, ACTIVATIONS: "file"})

    def parts(self, module: str) -> list[str]:
        """The names in the files of the tensors that make it up."""
        if module in self.members:
            return [name for member in self.members[module].values() for name in self.inside[member].values()]
        return list(self.modules[module].values())

    def module_nbytes(self, module: str) -> int:
        return sum(map(self.source.nbytes, self.parts(module)))

    def names(self) -> list[str]:
        return list(self.others)

    def __contains__(self, name: object) -> bool:
        return name in self._others

    @cached_property
    def _others(self) -> frozenset[str]:
        return frozenset(self.others)

    def shape(self, name: str) -> tuple[int, ...]:
        if (packed := self._packed(name)) is not None:
            return tuple(native.weight_shape(self.source.read(packed["weight_shape"])))
        return tuple(self.made[name][1].shape) if name in self.made else self.source.shape(self.spelled.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        if self._packed(name) is not None:
            return torch.float32
        return self.made[name][1].dtype if name in self.made else self.source.dtype(self.spelled.get(name, name))

    def nbytes(self, name: str) -> int:
        if (packed := self._packed(name)) is not None:
            return sum(map(self.source.nbytes, packed.values()))
        return self.made[name][1].nbytes if name in self.made else self.source.nbytes(self.spelled.get(name, name))

    def stored_as(self, name: str) -> str:
        if self._packed(name) is not None:
            return str(native.scheme_of(self.spelled.get(name, name).removesuffix(".weight"), self.quantization))
        return dtype_name(self.dtype(name))

    def read(self, name: str) -> Tensor:
        """A tensor that is not quantized, in memory of its own, on the CPU. One that is made of others (stacked experts)
        takes twice its memory for a moment.

        Raises:
            CheckpointError: as `TensorSource.read`.
        """
        if self._packed(name) is not None:
            return next(self.embedding(name)).dequantize(torch.float32)
        if name not in self.made:
            return self.source.read(self.spelled.get(name, name))
        conversion, _ = self.made[name]
        return conversion({source: self.source.read(source) for source in conversion.sources})[name].contiguous()

    def in_file_order(self) -> Iterator[tuple[str, str | None]]:
        """(name, module) once for each module, where its first tensor lies, and (name, None) for each other tensor; what is
        made of several stands where the first of them lies."""
        owner = {name: module for module, tensors in self.modules.items() for name in tensors.values()}
        here = {spelled: name for name, spelled in self.spelled.items()}
        kept = {self.spelled.get(name, name) for name in self.others if name not in self.made} - self.packed.keys()
        position = {name: i for i, name in enumerate(self.source.entries)}
        made: dict[str, list[str]] = {}
        for name, (conversion, _) in self.made.items():
            made.setdefault(min(conversion.sources, key=position.__getitem__), []).append(name)
        for name in self.embeddings:
            made.setdefault(min(self.embedding_parts(name), key=position.__getitem__), []).append(name)
        seen: set[str] = set()
        for name in self.source.entries:
            module = owner.get(name)
            if name in made:
                yield from ((target, None) for target in made[name])
            elif module is None and name in kept:
                yield here.get(name, name), None
            elif module is not None and module not in seen:
                seen.add(module)
                yield name, module

    def named_as_in(self, model: nn.Module, transforms: Iterable[Any] | None = None) -> DirectoryCheckpoint:
        """The same checkpoint under the names of this model, which is told what its names in the files are, as
        `from_pretrained` tells it: whatever saves it will use them.

        Args:
            transforms: transformers' conversion mapping of this model, if it is at hand.

        Raises:
            CheckpointError: two tensors have one place in the model, or a quantized one is only a part of what has a place.
        """
        assert not self.spelled and not self.made, "it is named as in a model already"
        tensors = {name: self._on_meta(name) for name in self.others}
        way = into_model(model, tensors, self.modules, transforms)
        self._check_in_order(way.stacks, experts_of(model))
        model._weight_conversions = list(way.used)  # type: ignore[assignment]  # as transformers keeps them
        inside = {module for members in way.stacks.values() for module in members.values()}
        made = {target: (conversion, t) for conversion, targets in way.made for target, t in targets.items()}
        kept = [way.names[name] for name in self.others if name in way.names]
        return replace(
            self,
            modules={way.names[module]: tensors for module, tensors in self.modules.items() if module not in inside},
            members=way.stacks,
            inside={module: self.modules[module] for module in inside},
            others=tuple(sorted([*kept, *made])),
            spelled={here: name for name, here in way.names.items() if here != name},
            made=made,
        )

    def _check_in_order(self, stacks: Mapping[str, Members], forms: Mapping[str, ExpertsForm]) -> None:
        """Refuse stacks whose rows nobody tells the order of: as the parameter, or as the matrices that were made of it."""
        for stack, members in stacks.items():
            form = forms[stack.rpartition(".")[0]]
            if (
                WHOLE in members
                and self.format is not None
                and self.format.sliced
                and (form.transposed or form.interleaved)
            ):
                raise CheckpointError(
                    f"{members[WHOLE]} is stacked experts in {self.format.name}; of a model that keeps them transposed or with "
                    "rows of gate and up in turns such stacks are not read, since files do not say which order theirs have; use "
                    "a file with its experts one by one"
                )

    def spelling(self, name: str) -> str:
        """The name in the files, for messages."""
        return next(iter(self.made[name][0].sources)) if name in self.made else self.spelled.get(name, name)

    def _on_meta(self, name: str) -> Tensor:
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")

    def files(self) -> list[Path]:
        return sorted({entry.path for entry in self.source.entries.values()})

    def copy_side_files(self, target: Path) -> None:
        copy_side_files(self.path, target)


def _stacked(stack: str, experts: Iterable[Parsed]) -> Parsed:
    found = list(experts)
    try:
        weight = QuantTensor.stack([one.weight for one in found])
    except ArgumentError as error:
        raise CheckpointError(f"{stack}: {error}") from error
    return Parsed(weight, tuple(dict.fromkeys(oddity for one in found for oddity in one.oddities)))


def quantization_config(source: TensorSource) -> dict[str, Any] | None:
    """What a directory says about its quantization: in config.json, else in the file of its own that older GPTQ and AWQ
    folders and ModelOpt's have. None where nothing says anything.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    config = source.config.get("quantization_config", source.config.get("compression_config"))
    if config is not None:
        if not isinstance(config, dict):
            raise CheckpointError(f"quantization_config of {source.directory} must be an object, got {config!r:.80}")
        return config | _of_deepseek(source, config)
    for name in QUANTIZATION_FILES:
        if (source.directory / name).is_file():
            return _flat(read_json(source.directory / name))
    if (source.directory / quanto.MAP).is_file():
        return {"quant_method": quanto.METHOD, quanto.MODULES: read_json(source.directory / quanto.MAP)}
    return None


def _of_deepseek(source: TensorSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """What else tells how DeepSeek-V4's FP8 files are read: how scales are called, and a word beside the quantization_config."""
    if config.get("quant_method") != fp8.METHOD:
        return {}
    names = source.names()
    scaled = any(name.endswith(".scale") for name in names) and not any(n.endswith(".weight_scale_inv") for n in names)
    experts = source.config.get("expert_dtype", config.get("expert_dtype"))
    return {fp8.SCALE: scaled} | ({} if experts is None else {"expert_dtype": experts})


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's own file has its fields one level down, under the name of their writer."""
    inner, producer = config.get("quantization"), config.get("producer")
    named = isinstance(producer, dict) and producer.get("name") == modelopt.METHOD
    return {**inner, "quant_method": modelopt.METHOD} if named and isinstance(inner, dict) else config


def _check_scaled(source: TensorSource, others: Iterable[str], found: Format) -> None:
    """FP8 codes without the scales of their format would be read as the weights."""
    for name in others:
        if source.dtype(name).itemsize == 1 and source.dtype(name).is_floating_point:
            raise CheckpointError(
                f"{name} is {dtype_name(source.dtype(name))}, but {name.removesuffix('.weight')} has no "
                f"{found.required[0]}, expected for {found.name}"
            )


def _check_unquantized(source: TensorSource) -> None:
    """A checkpoint whose config says nothing of quantization must not hold quantized weights."""
    for name in source.names():
        if name.endswith(tuple(f".{suffix}" for suffix in _QUANTO)):
            raise CheckpointError(
                f"{name} looks like a weight of optimum-quanto, and {quanto.MAP}, which says how it is packed, is not beside it: "
                "save the model with QuantizedModelForCausalLM.save_pretrained"
            )
        if name.endswith(tuple(f".{suffix}" for suffix in _TELLING)):
            raise CheckpointError(
                f"{source.directory} has no quantization_config, but {name} looks like part of a quantized weight; bring back "
                "the config.json that belongs to it"
            )


def _group(names: Iterable[str], found: Format) -> dict[str, dict[str, str]]:
    grouped: dict[str, dict[str, str]] = {}
    for name in names:
        module, suffix = stack_and_suffix(name, found) or _split(name, found)
        if module:
            grouped.setdefault(module, {})[suffix] = name
    known = set(names)
    for module, tensors in list(grouped.items()):
        if len(tensors) == 1 and found.required[0] not in tensors:
            del grouped[module]  # a parameter of the model that happens to be called "scales", or a float weight
            continue
        missing = [suffix for suffix in found.required if suffix not in tensors]
        if missing:
            raise CheckpointError(
                f"{module} lacks {', '.join(missing)} (it has {', '.join(tensors)}), expected for {found.name}"
            )
        stands_for = f"{module}.weight" if f"{module}.weight" in known else module
        if stands_for in known and found.stacks and native.GUARD in found.optional:
            tensors.setdefault(
                native.GUARD, stands_for
            )  # of a stack, whose parameter has no `.weight`; `parse` checks it
        if stands_for in known and stands_for not in tensors.values():
            raise CheckpointError(
                f"{module} has both a float weight and {', '.join(tensors)}; one of them is left over"
            )
    return grouped


def _split(name: str, found: Format) -> tuple[str, str]:
    """A tensor's module and suffix, both empty where the suffix is none of the format's; the longest suffix counts."""
    fitting = [suffix for suffix in found.suffixes if name.endswith(f"{found.joint}{suffix}")]
    suffix = max(fitting, key=len, default="")
    return (name[: -len(suffix) - len(found.joint)], suffix) if suffix else ("", "")
