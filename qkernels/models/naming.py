"""Names in files and names in modules: translated both ways by transformers' own conversion mapping.

transformers renames tensors while it loads a model and names them back while it saves one (`conversion_mapping.py`): prefixes
that moved (LLaVA, Qwen2-VL), heads with other names (GPT-NeoX), tensors that are stacked or cut on the way (the experts of
Mixtral lie one by one in files). `into_model` and `FileNames` do the same, for files that hold quantized modules, too.

The mapping is made of patterns on names of float tensors; a `weight` in one of them also matches parts of packed weights. So
a quantized module is translated by the name that its float weight would have, and its tensors follow it.

`FileNames` takes a name only if the way back leads to the place in the model that it came from. Where it does not, the
model's own name is written, which transformers reads as well.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConversionError
from .experts import ExpertsForm, experts_of, members_of, name_in_files, part_of

log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
Members = Mapping[tuple[int, int], str]  # (expert, part) -> module in the files
WHOLE = (-1, 0)  # of a stack that lies in the files as one


@dataclass(frozen=True)
class Conversion:
    """Tensors that are made of others at once: experts that are stacked, projections that are cut.

    Args:
        target: the name that transformers gives to all of `sources`; others are derived from it.
        sources: what it takes, by name, with the pattern that each matched, in the order in which it takes them.
    """

    model: Any
    converter: Any
    target: str
    sources: dict[str, str] = field(default_factory=dict)

    def __call__(self, tensors: Tensors) -> dict[str, Tensor]:
        """The made tensors by name; raises whatever the operations of transformers raise."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources.items():
            converter.add_tensor(self.target, name, pattern, tensors[name])
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class IntoModel:
    """How the tensors of files become those of a model.

    Args:
        names: name in the files -> name in the model, of tensors that keep their values and of quantized modules; what the
            model has no place for has a name that is none of the model's.
        made: conversions of all other tensors, with what they make, by name in the model, as tensors on meta.
        used: the transforms that matched something. transformers names a model back by these
            (`model._weight_conversions`).
        stacks: of each stack of quantized experts ("….experts.gate_up_proj"), the modules in the files that it is made of.
    """

    names: Mapping[str, str]
    made: tuple[tuple[Conversion, dict[str, Tensor]], ...]
    used: tuple[Any, ...]
    stacks: Mapping[str, Members] = field(default_factory=dict)


def into_model(
    model: Any, tensors: Tensors, modules: Collection[str] = (), transforms: Iterable[Any] | None = None
) -> IntoModel:
    """How tensors of files become those of a model, where no file is read.

    Args:
        model: a `PreTrainedModel`; its parameters may be on meta.
        tensors: shapes and dtypes, as tensors on meta, by name in the files.
        modules: quantized modules, by name in the files.
        transforms: transformers' conversion mapping of this model, if it is at hand.

    Raises:
        CheckpointError: two tensors have the same place in the model; a conversion fails; or a quantized module would have to
            be stacked or cut. Names both sides.
    """
    way = _Way(model, transforms)
    weights = {f"{module}.weight": module for module in modules}
    names: dict[str, str] = {}
    groups: dict[str, Conversion] = {}
    forms = experts_of(model)
    stacks: dict[str, dict[tuple[int, int], str]] = {}
    for name in sorted({*tensors, *weights}, key=_natural):
        if name in weights and (found := way.member(name, forms)) is not None:
            stack, *member = found
            _take_member(stacks.setdefault(stack, {}), (member[0], member[1]), weights[name], stack, model)
            continue
        target, pattern, converter = way.place(name)
        if name in weights:
            if converter is not None:
                raise CheckpointError(
                    f"{weights[name]} is quantized, but {type(model).__name__} keeps its weight as a part of {target}; quantized "
                    f"experts and projections that are stacked or cut while they load are not supported yet"
                )
            names[weights[name]] = _module_of(target) or weights[name]
        elif converter is None:
            names[name] = target
        elif target in way.places:
            groups.setdefault(target, Conversion(model, converter, target)).sources[name] = pattern
        else:
            names[name] = name  # a conversion for nothing that is in this model
    made = []
    for group in groups.values():
        try:
            made.append((group, group({name: tensors[name] for name in group.sources})))
        except Exception as error:  # as many ways to fail as there are operations
            some = ", ".join([*group.sources][:3])
            raise CheckpointError(
                f"{group.target} of {type(model).__name__} cannot be made of {some} ({len(group.sources)} tensors): {error}"
            ) from error
    taken = [
        (f"{name}.weight", f"{target}.weight") if name in modules else (name, target) for name, target in names.items()
    ]
    taken += [(next(iter(group.sources)), target) for group, targets in made for target in targets]
    _check_distinct(((name, target) for name, target in taken if target in way.places), model)
    _check_stacks(stacks, forms, model)
    return IntoModel(names, tuple(made), tuple(way.used()), stacks)


def _take_member(
    members: dict[tuple[int, int], str], member: tuple[int, int], module: str, stack: str, model: Any
) -> None:
    other = members.setdefault(member, module)
    if other != module:
        raise CheckpointError(
            f"{other} and {module} are both a part of {stack} of {type(model).__name__}; one is left over"
        )


def _check_stacks(stacks: Mapping[str, Members], forms: Mapping[str, ExpertsForm], model: Any) -> None:
    """Raise unless every stack of quantized experts is whole, and so is what belongs to it."""
    for stack, members in stacks.items():
        experts, _, projection = stack.rpartition(".")
        form = forms[experts]
        other = f"{experts}.{form.down if projection == form.up else form.up}"
        if other not in stacks:
            raise CheckpointError(
                f"{stack} of {type(model).__name__} is quantized in the files and {other} is not; experts are loaded with both "
                f"quantized, or neither"
            )
        if WHOLE in members and len(members) == 1:
            continue
        wanted = set(members_of(stack, forms))
        fused = {(expert, -1) for expert in range(form.experts)}
        lacking = sorted((fused if fused & set(members) else wanted) - set(members))
        strays = sorted(set(members) - wanted - fused)
        if lacking:
            expert, part = lacking[0]
            raise CheckpointError(
                f"{stack} of {type(model).__name__} has {form.experts} experts; the files lack {len(lacking)} of its quantized "
                f"matrices, first {name_in_files(stack, expert, max(part, 0))} (they have {next(iter(members.values()))})"
            )
        if strays or len(members) not in (len(wanted), len(fused)):
            some = members[strays[0]] if strays else next(iter(members.values()))
            raise CheckpointError(
                f"{some} is no part of {stack} of {type(model).__name__}, which has {form.experts} experts"
            )


class FileNames:
    """The names that the files of a model have: those that it was loaded from, else those that transformers writes.

    Args:
        model: a module of any kind; what is no `PreTrainedModel` keeps its names. May be on meta.
        one_by_one: experts have the names of single ones, although the model was loaded from files with stacks.

    Raises:
        ConversionError: a tensor has no name that a reader would understand.
    """

    def __init__(self, model: nn.Module, one_by_one: bool = False) -> None:
        self._model: Any = model
        self._one_by_one = one_by_one
        self._known = is_pretrained(model)
        self._names: dict[str, str] = {}
        self._groups: dict[str, Conversion] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._modules: dict[str, str] = {}
        self._members: dict[tuple[str, int, int], str] = {}
        self._written: dict[str, list[str]] = {}  # names of what a group makes, by its target
        if self._known:
            self._forth, self._back = _Way(model), _Way(model, _backwards(model, one_by_one))
            self._plan()

    def module(self, name: str) -> str:
        """A quantized module. To be asked before its bias comes, which goes with it."""
        weight = f"{name}.weight"
        written = self._names.get(weight, weight)
        if weight in self._groups:  # what is packed is not converted: renamed alone
            renamed = self._back.rename(weight)
            written = renamed if self._forth.place(renamed)[::2] == (weight, None) else weight
        self._modules[name] = _module_of(written) or name
        return self._modules[name]

    def stack(self, name: str) -> str:
        """A whole stack of quantized experts ("….experts.gate_up_proj"), which lies where its router lies: engines that do not
        know transformers' names look for both there."""
        written = _module_of(self._back.rename(f"{name}.weight")) if self._known else None
        if written is None or written.rpartition(".")[2] != name.rpartition(".")[2]:
            return name  # of which files have no single experts, and a name of their own
        forms = experts_of(self._model) | quantized_experts(self._model)
        return written if self._forth.member(f"{written}.weight", forms) == (name, *WHOLE) else name

    def expert(self, stack: str, expert: int, part: int) -> str:
        """The name of a part of one expert ("….experts.3.gate_proj"), as files of this architecture have it."""
        if self._known and not self._members and not self._one_by_one:
            self._members = FileNames(self._model, one_by_one=True)._named_members()
        return self._members.get((stack, expert, part), name_in_files(stack, expert, part))

    def _named_members(self) -> dict[tuple[str, int, int], str]:
        """The names of all parts of experts, by (stack, expert, part)."""
        forms = experts_of(self._model) | quantized_experts(self._model)
        members: dict[tuple[str, int, int], str] = {}
        for group in self._groups.values():
            for written in self._written.get(group.target, ()):
                if (found := self._forth.member(written, forms)) is not None:
                    members[found] = _module_of(written) or written
        return members

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is to be written now that this tensor has come: itself, or what a conversion makes of it and of those that
        came before; nothing as long as one of them is missing."""
        module, _, leaf = name.rpartition(".")
        group = self._groups.get(name)
        if module in self._modules:
            yield f"{self._modules[module]}.{leaf}", tensor
        elif group is None:
            yield self._names.get(name, name), tensor
        else:
            arrived = self._waiting.setdefault(group.target, {})
            arrived[name] = tensor
            if len(arrived) == len(group.sources):
                del self._waiting[group.target]
                for made, value in group(arrived).items():
                    yield self._back.rename(made), value.contiguous()

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """What still waits for others, which do not come because they are quantized: under the names of the model."""
        for arrived in self._waiting.values():
            yield from arrived.items()
        self._waiting = {}

    def _plan(self) -> None:
        state = {name: tensor.detach().to("meta") for name, tensor in float_state(self._model).items()}
        groups: dict[str, Conversion] = {}
        for name in sorted(state, key=_natural):
            target, pattern, converter = self._back.convert(name)
            if converter is None:
                self._names[name] = self._back.rename(name)
            else:
                groups.setdefault(target, Conversion(self._model, converter, target)).sources[name] = pattern
        written = {self._names[name]: state[name] for name in self._names}
        for group in groups.values():
            try:
                made = group({name: state[name] for name in group.sources})
            except Exception as error:  # some operations have no way back
                log.debug("%s and what is stored with it keep their names: %s", group.target, error)
                continue
            self._groups |= dict.fromkeys(group.sources, group)
            named = {self._back.rename(name): tensor for name, tensor in made.items()}
            self._written[group.target] = [*named]
            written |= named
        self._keep_proved(state, written)

    def _keep_proved(self, state: Tensors, written: Tensors) -> None:
        """Give up the names from which no way leads back, for those of the model."""
        try:
            back = into_model(self._model, written)
        except CheckpointError as error:
            log.debug("%s keeps the names of its modules: %s", type(self._model).__name__, error)
            back = IntoModel({}, (), ())
        made = {name for _, targets in back.made for name in targets}
        self._groups = {name: g for name, g in self._groups.items() if all(other in made for other in g.sources)}
        self._names = {name: new for name, new in self._names.items() if back.names.get(new) == name}
        for name in state:
            if name not in self._groups and name not in self._names:
                target, _, converter = self._forth.place(name)
                if target != name or converter is not None:
                    raise ConversionError(
                        f"{name} of {type(self._model).__name__} cannot be saved: transformers would take a tensor of that name "
                        f"for {target}, and its conversion mapping has no way back"
                    )


def is_pretrained(model: object) -> bool:
    """Whether it is one of transformers' models, told by what this file asks of it: transformers need not be installed."""
    return hasattr(model, "config") and hasattr(model, "base_model_prefix")


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's stored tensors; a quantized layer has the weight that it stands for, on meta, and its bias."""
    quantized: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "quant_tensor")}
    stacked = quantized_experts(model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        layer = quantized.get(module)
        experts, _, child = module.rpartition(".")
        if layer is not None and experts in stacked:
            form = stacked[experts]
            projection = next(p for p in (form.up, form.down) if form.child(p) == child)
            if leaf == "bias":
                state[f"{experts}.{projection}_bias"] = tensor
            else:
                sizes = (stacked[experts].experts, layer.out_features, layer.in_features)
                weight = torch.empty(sizes, dtype=layer.dtype, device="meta")
                state[f"{experts}.{projection}"] = form.stored(projection, weight)
        elif layer is None or leaf == "bias":
            if isinstance(tensor, Tensor):
                state[name] = tensor
        else:
            shape = (layer.out_features, layer.in_features)
            state[f"{module}.weight"] = torch.empty(shape, dtype=layer.dtype, device="meta")
    return state


def quantized_experts(model: nn.Module) -> dict[str, ExpertsForm]:
    """The forms of a model's quantized experts, by name."""
    return {name: m.form for name, m in model.named_modules() if isinstance(getattr(m, "form", None), ExpertsForm)}


class _Way:
    """Transformers' transforms of a model, in one direction. They note what they have met, so each way has its own."""

    def __init__(self, model: Any, transforms: Iterable[Any] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        found = get_model_conversion_mapping(model) if transforms is None else transforms
        self._all = [copy.deepcopy(transform) for transform in found]
        self._renamings = [t for t in self._all if not isinstance(t, WeightConverter)]
        self._converters = [t for t in self._all if isinstance(t, WeightConverter)]
        self.places = float_state(model).keys()
        self._prefix = str(getattr(model, "base_model_prefix", ""))

    def rename(self, name: str) -> str:
        """The name after all renamings."""
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def convert(self, name: str) -> tuple[str, str, Any]:
        """The name that the first converter that matches gives, the pattern that did, and the converter; or none."""
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return renamed, pattern, converter
        return name, "", None

    def place(self, name: str) -> tuple[str, str, Any]:
        """As `convert`, for a name in the files: where transformers puts such a tensor. A model with a head reads the
        files of one without, and the other way round: they differ by the prefix of the base model."""
        target, pattern, converter = self.convert(self.rename(name))
        target = self._as_based(target)
        if target not in self.places and self._as_based(name) in self.places:
            return self._as_based(name), "", None
        return target, pattern, converter

    def member(self, weight: str, forms: Mapping[str, ExpertsForm]) -> tuple[str, int, int] | None:
        """Which part of which expert's stack the weight of a module in files is (`part_of`); None: of none."""
        renamed = _module_of(self.rename(weight)) or weight
        prefix = f"{self._prefix}."
        for name in (renamed, renamed.removeprefix(prefix), prefix + renamed):
            if (found := part_of(name, forms)) is not None:
                return found
            experts, _, projection = name.rpartition(".")
            if experts in forms and projection in (forms[experts].up, forms[experts].down):
                return name, *WHOLE
        return None

    def _as_based(self, name: str) -> str:
        without, with_one = name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"
        if name in self.places or not self._prefix:
            return name
        return without if without in self.places else with_one if with_one in self.places else name

    def used(self) -> Iterator[Any]:
        return (transform for transform in self._all if transform.was_used())


def _backwards(model: Any, one_by_one: bool = False) -> list[Any]:
    """The transforms that transformers would save a model by, as `revert_weight_conversion` chooses them; with those that take
    stacked experts apart, if asked."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used = getattr(model, "_weight_conversions", None)
    every = get_model_conversion_mapping(model, add_legacy=False)
    if used is None:  # not loaded, so whether its files have such a prefix is not known
        used = [transform for transform in every if not isinstance(transform, PrefixChange)]
    elif (
        one_by_one
    ):  # from files with stacks no conversion of single ones was used, and single ones have names all the same
        known = [_patterns(transform) for transform in used]
        used = [*used, *(t for t in every if _patterns(t) not in known and _makes_experts(t, model))]
    back = []
    for transform in reversed(used):
        try:
            back.append(transform.reverse_transform())
        except Exception as error:  # a conversion that cannot be undone: its tensors keep the model's names
            log.debug("%s of %s has no way back: %s", transform, type(model).__name__, error)
    return back


def _patterns(transform: Any) -> tuple[list[str], list[str]]:
    return list(transform.source_patterns), list(transform.target_patterns)


def _makes_experts(transform: Any, model: Any) -> bool:
    """Whether a conversion stacks quantized experts of a model out of single ones."""
    from transformers.core_model_loading import WeightConverter

    stacks = [f"{n}.{p}" for n, form in quantized_experts(model).items() for p in (form.up, form.down)]
    stacks += [f"{n}.{p}" for n, form in experts_of(model).items() for p in (form.up, form.down)]
    if not isinstance(transform, WeightConverter) or not stacks:
        return False
    try:
        back: Any = transform.reverse_transform()
    except Exception:  # it has no way back
        return False
    return any(back.rename_source_key(stack)[1] is not None for stack in stacks)


def _check_distinct(names: Iterable[tuple[str, str]], model: object) -> None:
    taken: dict[str, str] = {}
    for name, target in names:
        other = taken.setdefault(target, name)
        if other != name:
            raise CheckpointError(
                f"{other} and {name} are both {target} of {type(model).__name__}; one of them is left over"
            )


def _module_of(weight: str) -> str | None:
    return weight.removesuffix(".weight") if weight.endswith(".weight") else None


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorted by this, layer 10 comes after layer 2: the order in which experts are stacked."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"\.", name)]
