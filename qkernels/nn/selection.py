"""`Selection`: which linear layers of a model are quantized, with which scheme, and why the others are not.

`replace_linear`, `quantize`, its dry run and the transformers plug-in all ask `select_linears`, so that they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..errors import ArgumentError, UnsupportedProblem
from ..kernels.catalogue import OnUnsupported
from ..models.experts import ExpertsForm, experts_of, routers
from ..models.linears import is_conv1d, linear_of, scaled_in_place, why_not_plain
from ..scheme import QuantScheme
from .experts import QuantExperts, QuantStack
from .linear import QuantLinear
from .modules import names_of_modules

# What transformers, timm and older checkpoints call heads, wherever they are.
HEADS = (
    "lm_head", "*.lm_heads.*", "embed_out", "output_projection", "score", "scorer", "classifier", "classification_head",
    "qa_outputs", "qa_classifier", "seq_relationship", "start_logits", "end_logits", "bbox_predictor",
)  # fmt: skip
A_ROUTER = "a router: which experts a token gets, or how much of the shared one, stays exact"
A_HEAD = "a head; name it in include to quantize it"

Patterns = Iterable[str] | str | None
Overrides = Mapping[str, QuantScheme | str] | None
T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """What is to be done with the matrices of a model, none left out.

    Args:
        chosen: the scheme of each linear layer that is to be quantized, by its name, in the model's order.
        skipped: the reason for every other matrix, by the name of its linear layer, or of the parameter where it is in
            none; embeddings and convolutions are not mentioned.
        experts: of each experts module that is to be quantized, the schemes of its projections.
    """

    chosen: Mapping[str, QuantScheme]
    skipped: Mapping[str, str]
    experts: Mapping[str, Mapping[str, QuantScheme]] = field(default_factory=dict)

    @property
    def every(self) -> dict[str, QuantScheme]:
        """Layers and stacks of experts ("….experts.down_proj") alike."""
        stacks = {f"{name}.{p}": scheme for name, schemes in self.experts.items() for p, scheme in schemes.items()}
        return {**self.chosen, **stacks}


def select_linears(
    model: nn.Module,
    scheme: QuantScheme | str,
    include: Patterns = None,
    exclude: Patterns = None,
    overrides: Overrides = None,
    on_unsupported: OnUnsupported | None = None,
) -> Selection:
    """Choose the linear layers and stacked experts to quantize; nothing is changed, and no weight is read.

    Patterns are shell patterns on the module's name as `model.named_modules()` spells it, or on its last part; of a module under
    several names, on any of them; of experts, on that of their module or of a projection.

    Args:
        model: its parameters may be on meta. `Conv1D` (GPT-2) is a linear layer too.
        scheme: for every layer that no override matches.
        include: only layers that match; None means all.
        exclude: never these layers; None means heads (see `heads`), unless `include` names them, and () means none.
        overrides: pattern -> scheme; the first match wins.
        on_unsupported: what a layer without a kernel means: "raise", "skip", or "reference" to run it on the slow one;
            None where no kernel is asked for, since only files are made.

    Raises:
        SchemeError: a scheme cannot be parsed.
        ArgumentError: a pattern matches no linear layer, or one of `exclude` nothing at all; or the model is a linear layer.
        UnsupportedProblem: no kernel takes a layer; names it.

    Example:
        >>> from torch import nn
        >>> from qkernels.nn.selection import select_linears
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
        >>> selection = select_linears(model, "w4a16_g32", exclude="0", overrides={"1": "w8a16_channel"})
        >>> str(selection.chosen["1"]), selection.skipped
        ('w8a16_channel', {'0': 'excluded'})
    """
    default = QuantScheme.parse(scheme)
    rules = {pattern: QuantScheme.parse(spelled) for pattern, spelled in (overrides or {}).items()}
    wanted, unwanted = as_patterns(include), as_patterns(exclude)
    if _is_linear(model):
        raise ArgumentError(
            f"layers are swapped inside a model, and this {type(model).__name__} is itself the layer; "
            f"QuantLinear.from_linear(layer, scheme) makes the quantized one"
        )
    aliases = {names[0]: names for names in names_of_modules(model).values()}
    forms = experts_of(model)
    names, skipped = _sorted_out(model, aliases, wanted, unwanted)
    stacks, reasons = _sorted_experts(model, forms, wanted, unwanted)
    skipped |= reasons
    _check_patterns([*(wanted or ()), *rules], model)
    _check_exclude(unwanted or (), model)
    chosen = {name: _first_match(aliases[name], rules, default) for name in names}
    if on_unsupported is not None:
        lacking = _without_kernel(model, chosen, on_unsupported)
        chosen = {name: scheme for name, scheme in chosen.items() if name not in lacking}
        skipped |= lacking
    of_experts = {
        name: {p: _first_match([f"{name}.{p}", name], rules, default) for p in projections}
        for name, projections in stacks.items()
    }
    if on_unsupported is not None:
        lacking = _experts_without_kernel(model, forms, of_experts, on_unsupported)
        of_experts = {
            n: schemes for n, schemes in of_experts.items() if not any(f"{n}.{p}" in lacking for p in schemes)
        }
        skipped |= lacking
    return Selection(chosen, skipped, of_experts)


def heads(model: nn.Module) -> set[str]:
    """The linear layers that turn what a model thinks into its answer: few, sensitive, and often new. They are the layer that
    transformers calls the output embeddings, those outside of a model's base, and those with a usual name.

    >>> from torch import nn
    >>> from qkernels.nn.selection import heads
    >>> heads(nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": nn.Linear(8, 2)}))
    {'classifier'}
    """
    base: Any = getattr(model, "base_model", None)
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    inside = set(base.modules()) if isinstance(base, nn.Module) else set()
    if not any(_is_linear(module) for module in inside):
        inside = set(model.modules())
    return {
        name
        for name, module in model.named_modules()
        if _is_linear(module)
        and (module is output or module not in inside or any(matches(name, pattern) for pattern in HEADS))
    }


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches a module's full name or its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def first_match(name: str, rules: Mapping[str, T], default: T) -> T:
    """What the first pattern that matches says."""
    return next((value for pattern, value in rules.items() if matches(name, pattern)), default)


def as_patterns(patterns: Patterns) -> tuple[str, ...] | None:
    """One pattern or several, as a tuple."""
    return None if patterns is None else (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _first_match(names: Sequence[str], rules: Mapping[str, T], default: T) -> T:
    """The same for a module of several names."""
    return next((value for pattern, value in rules.items() if _any_matches(names, (pattern,))), default)


def _any_matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names for pattern in patterns)


def _sorted_out(
    model: nn.Module,
    aliases: Mapping[str, Sequence[str]],
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
) -> tuple[list[str], dict[str, str]]:
    """The linear layers to quantize, and the reason for every other matrix."""
    users: dict[int, list[str]] = {}  # of every parameter, each module once
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    tied, scaled = _tied_later(model), scaled_in_place(model)
    with_experts = [name for name, m in model.named_modules() if isinstance(m, QuantExperts)]
    covered = experts_of(model)
    choosing = routers(model, [*covered, *with_experts])
    spared = heads(model) if exclude is None else set()
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            skipped[name] = "already quantized"
        elif isinstance(module, QuantExperts):
            skipped |= {f"{name}.{p}".lstrip("."): "already quantized" for p in module.stacks}
        elif isinstance(module, QuantStack):
            continue
        elif name in covered:
            continue  # `_sorted_experts`
        elif name in choosing and not _is_linear(module):
            weight = module.get_parameter("weight")
            size = f"({list(weight.shape)}, {weight.nbytes:,} bytes)"
            skipped[f"{name}.weight"] = A_ROUTER.replace("a router", f"a router {size}", 1)
        elif _is_linear(module):
            weight = module._parameters.get("weight")
            shared = [other for other in users.get(id(weight), []) if other != name and weight is not None]
            named = include is not None and _any_matches(aliases[name], include)
            if _any_matches(aliases[name], exclude or ()):
                skipped[name] = "excluded"
            elif name in choosing:
                skipped[name] = A_ROUTER
            elif include is not None and not named:
                skipped[name] = "not in include"
            elif name in spared and not named:
                skipped[name] = A_HEAD
            elif shared:
                skipped[name] = f"its weight is shared with {', '.join(shared)}"
            elif reason := scaled.get(name) or why_not_plain(module):
                skipped[name] = reason
            elif name in tied:
                skipped[name] = "its weight is tied to another module's"
            else:
                chosen.append(name)
        else:
            skipped |= _other_matrices(name, module)
    return chosen, skipped


def _sorted_experts(
    model: nn.Module,
    forms: Mapping[str, ExpertsForm],
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The projections of experts modules to quantize, by module, and the reason for every other one."""
    chosen: dict[str, tuple[str, str]] = {}
    skipped: dict[str, str] = {}
    for name, form in forms.items():
        projections = (form.up, form.down)
        names = [name, *(f"{name}.{p}" for p in projections)]
        module = model.get_submodule(name)
        reason = None
        if _any_matches(names, exclude or ()):
            reason = "excluded"
        elif include is not None and not _any_matches(names, include):
            reason = "not in include"
        elif any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
            reason = "its weights are no plain tensors"
        if reason is None:
            chosen[name] = projections
        else:
            skipped |= {f"{name}.{p}": reason for p in projections}
    return chosen, skipped


def _experts_without_kernel(
    model: nn.Module,
    forms: Mapping[str, ExpertsForm],
    chosen: Mapping[str, Mapping[str, QuantScheme]],
    on_unsupported: OnUnsupported,
) -> dict[str, str]:
    """The same as `_without_kernel`: both projections stay where one lacks a kernel."""
    lacking: dict[str, str] = {}
    for name, schemes in chosen.items():
        for projection, scheme in schemes.items():
            t = model.get_submodule(name)._parameters[projection]
            assert t is not None
            allowed: OnUnsupported = "raise" if on_unsupported == "skip" else on_unsupported
            try:
                QuantExperts.check_supported(forms[name], projection, scheme, t.dtype, t.device, allowed)
            except UnsupportedProblem as error:
                if on_unsupported != "skip":
                    raise UnsupportedProblem(f"{name}.{projection}: {error}") from None
                lacking |= {f"{name}.{p}": str(error) for p in schemes}
    return lacking


def _tied_later(model: nn.Module) -> set[str]:
    """Modules whose weight is on meta, and which transformers ties to another's once it is there. Weights that are there
    say it themselves: they are one."""
    table: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    both = {name for pair in table.items() for name in pair}
    return {name.rpartition(".")[0] for name in both if name in parameters and parameters[name].is_meta}


def _other_matrices(name: str, module: nn.Module) -> dict[str, str]:
    """Matrices outside linear layers: experts in one tensor, routers, positions. Vectors, of whatever rank, are not mentioned."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)):
        return {}
    found = {}
    for leaf, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, UninitializedParameter):
            continue
        full = f"{name}.{leaf}".lstrip(".")
        size = f"{list(parameter.shape)}, {parameter.nbytes:,} bytes"
        what = "a matrix" if parameter.dim() == 2 else "a tensor"
        if parameter.dim() == 3 and "expert" in f"{full} {type(module).__name__}".lower():
            found[full] = f"stacked experts ({size}) are not supported yet"
        elif sum(length > 1 for length in parameter.shape) > 1:
            found[full] = f"{what} ({size}) of {type(module).__name__}, which is not an nn.Linear"
    return found


def _check_patterns(patterns: Sequence[str], model: nn.Module) -> None:
    """Every pattern must mean a linear layer, of which some may be quantized already."""
    modules = model.named_modules(remove_duplicate=False)
    names = [name for name, module in modules if _is_linear(module) or isinstance(module, QuantLinear)]
    for name, form in experts_of(model).items():
        names += [name, f"{name}.{form.up}", f"{name}.{form.down}"]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ArgumentError(
                f"pattern {pattern!r} matches no linear layer; names look like {', '.join(names[:3]) or '(there are none)'}"
            )


def _check_exclude(patterns: Sequence[str], model: nn.Module) -> None:
    """A pattern to exclude must mean something in the model: a misspelt one would let the layer be quantized. What heads are
    called may be named for models without one."""
    names = [name for name, _ in (*model.named_modules(remove_duplicate=False), *model.named_parameters()) if name]
    for pattern in patterns:
        if pattern in HEADS or any(matches(name, pattern) for name in names):
            continue
        leaves = sorted({name.rpartition(".")[2] for name in names})
        close = get_close_matches(pattern.rpartition(".")[2], leaves, n=3)
        raise ArgumentError(
            f"exclude pattern {pattern!r} matches nothing in the model; "
            f"{'did you mean ' + ' or '.join(close) if close else 'names look like ' + ', '.join(names[:3])}?"
        )


def _without_kernel(
    model: nn.Module, chosen: Mapping[str, QuantScheme], on_unsupported: OnUnsupported
) -> dict[str, str]:
    """Ask the catalogue about every layer; the reasons for those to skip."""
    lacking = {}
    for name, scheme in chosen.items():
        try:
            QuantLinear.check_supported(
                linear_of(model, name), scheme, "raise" if on_unsupported == "skip" else on_unsupported
            )
        except UnsupportedProblem as error:
            if on_unsupported != "skip":
                raise UnsupportedProblem(f"{name}: {error}") from None
            lacking[name] = str(error)
    return lacking


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)
