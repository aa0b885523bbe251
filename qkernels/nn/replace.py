"""`replace_linear`: swap a model's linear layers for `QuantLinear`, in place, without calibration data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ArgumentError, UnsupportedProblem
from ..kernels.catalogue import OnUnsupported
from ..models.linears import as_linear, is_conv1d
from ..quantizers import NF4, RTN
from ..quantizers.grid import checked_weight
from ..reports import MIB
from ..scheme import QuantScheme
from .linear import BUFFERS, QuantLinear

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """One swapped layer: its scheme, the layout its kernel reads, bytes of the float weight and of the packed one."""

    scheme: QuantScheme
    layout: str
    bytes_before: int
    bytes_after: int


@dataclass
class ReplaceReport:
    """What `replace_linear` did. Nothing is left out: a weight is in `replaced`, or in `skipped` with the reason."""

    replaced: dict[str, Replaced] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        schemes = sorted({str(r.scheme) for r in self.replaced.values()})
        lines = [
            f"replaced {len(self.replaced)} linear layers ({', '.join(schemes) or 'none'}), skipped {len(self.skipped)}; "
            f"model {self.bytes_before * MIB:.1f} -> {self.bytes_after * MIB:.1f} MiB"
        ]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    scheme: QuantScheme | str = "w4a16_g128",
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str = ("lm_head",),
    overrides: Mapping[str, QuantScheme | str] | None = None,
    on_unsupported: OnUnsupported = "raise",
    progress: bool = True,
    method: RTN | NF4 | None = None,
) -> ReplaceReport:
    """Round every linear layer's weight to `scheme` and swap in a `QuantLinear`, in place.

    Patterns are shell patterns on the module's name as `model.named_modules()` spells it, or on its last part ("lm_head",
    "*.down_proj", "encoder.layer.0.*").

    Args:
        model: any `nn.Module`; no particular architecture is assumed. Transformers' `Conv1D` (GPT-2) is a linear layer too.
        scheme: for all layers, unless an override matches.
        include: only layers that match one of these patterns; None means all.
        exclude: never layers that match one of these.
        overrides: pattern -> scheme; the first match wins.
        on_unsupported: "raise" before anything is changed; "skip" leaves the layer as it is, with the reason in the report;
            "reference" runs it on the slow plain-PyTorch kernel.
        progress: show a progress bar if it takes more than two seconds.
        method: how to round; `RTN()` if None. Its options are taken, its scheme is not: `NF4(double_quant=True)` with "nf4_g64".

    Returns:
        The report: `.replaced`, `.skipped[name] = reason`, `.bytes_before`, `.bytes_after` of the whole model.

    Raises:
        SchemeError: a scheme cannot be parsed, or is none that the method rounds to.
        ArgumentError: a pattern matches no layer, a weight is NaN or infinite, or there is nothing to replace.
        UnsupportedProblem: no kernel takes a layer; the model is untouched.
    """
    scheme = QuantScheme.parse(scheme)
    rules = {pattern: QuantScheme.parse(s) for pattern, s in (overrides or {}).items()}
    rounding = {s: (method or RTN()).with_scheme(s) for s in (scheme, *rules.values())}
    include, exclude = as_patterns(include), as_patterns(exclude) or ()
    report = ReplaceReport(bytes_before=model_bytes(model))
    chosen = choose_layers(model, include, exclude, report)
    check_patterns([*(include or ()), *rules], linear_names(model))
    schemes = {name: next((s for p, s in rules.items() if matches(name, p)), scheme) for name in chosen}
    _check_supported(chosen, schemes, on_unsupported, report)
    for name in tqdm(list(chosen), desc="quantizing", unit="layer", delay=2, disable=not progress):
        linear = chosen.pop(name)  # so that the float weight is freed when its layer is swapped, not at the end
        if name in report.skipped:
            continue
        layer = QuantLinear.from_linear(
            linear, schemes[name], rounding[schemes[name]], on_unsupported, f"{name}.weight"
        )
        report.replaced[name] = Replaced(schemes[name], layer.layout, tensor_bytes(linear.weight), packed_bytes(layer))
        set_module(model, name, layer)
    if not report.replaced:
        raise ArgumentError(f"replace_linear found no layer to replace:\n{report}")
    report.bytes_after = model_bytes(model)
    logger.info("%s", report)
    return report


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` stands in `model`, in the same training mode."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, module)


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches a module's full name or its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def tensor_bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def packed_bytes(layer: QuantLinear) -> int:
    """Bytes of the buffers the kernel reads."""
    return sum(tensor_bytes(t) for t in (getattr(layer, name) for name in BUFFERS) if t is not None)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(map(tensor_bytes, tensors.values()))


def as_patterns(patterns: Iterable[str] | str | None) -> tuple[str, ...] | None:
    return None if patterns is None else (patterns,) if isinstance(patterns, str) else tuple(patterns)


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer that a pattern may mean, those included that are quantized already."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, QuantLinear)) or is_conv1d(m)]


def choose_layers(
    model: nn.Module, include: tuple[str, ...] | None, exclude: tuple[str, ...], report: ReplaceReport
) -> dict[str, nn.Linear]:
    """The layers to replace by name, `Conv1D` as linear layers (see `as_linear`); every other matrix of the model, but
    embeddings and convolutions, goes to `report.skipped` with its reason."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    chosen: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            report.skipped[name] = "already quantized"
        elif (linear := as_linear(module)) is not None:
            shared = [other for other in users[id(module._parameters["weight"])] if other != name]
            if any(matches(name, p) for p in exclude):
                report.skipped[name] = "excluded"
            elif include is not None and not any(matches(name, p) for p in include):
                report.skipped[name] = "not in include"
            elif shared:
                report.skipped[name] = f"its weight is shared with {', '.join(shared)}"
            elif type(module) is not nn.Linear and not is_conv1d(module):
                report.skipped[name] = f"{type(module).__name__} is a subclass of nn.Linear with a forward of its own"
            else:
                chosen[name] = linear
        else:
            _note_other_matrices(name, module, report)
    return chosen


def _note_other_matrices(name: str, module: nn.Module, report: ReplaceReport) -> None:
    """Matrices outside linear layers: experts in one tensor, routers."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)):
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        full = f"{name}.{leaf}".lstrip(".")
        size = f"{list(parameter.shape)}, {tensor_bytes(parameter):,} bytes"
        if parameter.dim() == 3:
            report.skipped[full] = f"stacked experts ({size}) are not supported yet"
        elif parameter.dim() == 2 and min(parameter.shape) > 1:
            report.skipped[full] = f"a matrix ({size}) of {type(module).__name__}, which is not an nn.Linear"


def check_patterns(patterns: list[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ArgumentError(
                f"pattern {pattern!r} matches no linear layer; names look like {', '.join(names[:3]) or '(there are none)'}"
            )


def _check_supported(
    chosen: dict[str, nn.Linear], schemes: dict[str, QuantScheme], on_unsupported: OnUnsupported, report: ReplaceReport
) -> None:
    """Ask the catalogue about every layer, and look at every weight, before the first is changed."""
    for name, linear in chosen.items():
        checked_weight(linear.weight, f"{name}.weight")
        try:
            QuantLinear.check_supported(linear, schemes[name], "raise" if on_unsupported == "skip" else on_unsupported)
        except UnsupportedProblem as error:
            if on_unsupported != "skip":
                raise UnsupportedProblem(f"{name}: {error}") from None
            report.skipped[name] = str(error)
