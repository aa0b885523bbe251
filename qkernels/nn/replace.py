"""`replace_linear`: swap a model's linear layers for `QuantLinear`, in place, without calibration data."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import nn
from tqdm import tqdm

from ..errors import ArgumentError
from ..kernels.catalogue import OnUnsupported
from ..memory import GivingBack
from ..models.linears import linear_of
from ..quantizers import RTN, Options
from ..quantizers.grid import checked_weight
from ..reports import MIB
from ..scheme import QuantScheme
from .experts import QuantExperts, QuantStack
from .linear import QuantLinear
from .modules import model_bytes, other_names, packed_bytes, set_module
from .packed import PackedModule
from .selection import Overrides, Patterns, Selection, select_linears

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replaced:
    """One swapped layer: its scheme, the layout its kernel reads, bytes of the float weight and of the packed one."""

    scheme: QuantScheme
    layout: str
    bytes_before: int
    bytes_after: int


@dataclass
class ReplaceReport:
    """What `replace_linear` did. Nothing is left out: a weight is in `replaced`, or in `skipped` with the reason.

    >>> from torch import nn
    >>> from qkernels import replace_linear
    >>> model = nn.ModuleDict({"body": nn.Linear(512, 512), "head": nn.Linear(512, 512)})
    >>> report = replace_linear(model, "w8a16_g128", exclude="head")  # a ReplaceReport
    >>> print(report)
    replaced 1 linear layers (w8a16_g128), skipped 1; model 2.0 -> 1.3 MiB
      skipped head: excluded
    """

    replaced: dict[str, Replaced] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    stacks: set[str] = field(default_factory=set)  # of those replaced, the stacks of experts

    @classmethod
    def of(cls, selection: Selection, model: nn.Module | None = None) -> ReplaceReport:
        """The report of a selection of which nothing is replaced yet."""
        return cls(skipped=dict(selection.skipped), bytes_before=0 if model is None else model_bytes(model))

    def add(self, name: str, layer: PackedModule, bytes_before: int) -> None:
        """A layer, or a stack of experts, now stands in the place of a float weight of so many bytes."""
        if isinstance(layer, QuantStack):
            self.stacks.add(name)
        self.replaced[name] = Replaced(layer.scheme, layer.layout, bytes_before, packed_bytes(layer))

    def __str__(self) -> str:
        schemes = sorted({str(r.scheme) for r in self.replaced.values()})
        stacks = f" and {len(self.stacks)} stacks of experts" if self.stacks else ""
        lines = [
            f"replaced {len(self.replaced) - len(self.stacks)} linear layers{stacks} ({', '.join(schemes) or 'none'}), "
            f"skipped {len(self.skipped)}; "
            f"model {self.bytes_before * MIB:.1f} -> {self.bytes_after * MIB:.1f} MiB"
        ]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    scheme: QuantScheme | str = "w4a16_g128",
    include: Patterns = None,
    exclude: Patterns = None,
    overrides: Overrides = None,
    on_unsupported: OnUnsupported = "raise",
    progress: bool = True,
    method: Options | None = None,
) -> ReplaceReport:
    """Round every linear layer's weight to `scheme` and swap in a `QuantLinear`, in place.

    Stacked experts of a mixture (transformers 5) become `QuantExperts`; routers and gates of shared experts stay.

    Patterns are shell patterns on the module's name as `model.named_modules()` spells it, or on its last part ("lm_head",
    "*.down_proj", "encoder.layer.0.*").

    All or nothing: layers are swapped when all of them are made, so an error or an interruption leaves the model as it was, and
    for that time memory holds the float layers and the packed ones. A layer under several names is replaced under all. Hooks
    stay. What is not a plain linear layer (parametrized, pruned, a subclass that computes something else) is skipped, with the
    reason.

    Args:
        model: any `nn.Module`; no particular architecture is assumed. Transformers' `Conv1D` (GPT-2) is a linear layer too.
        scheme: for all layers, unless an override matches.
        include: only layers that match one of these patterns; None means all.
        exclude: never layers that match one of these; None means heads (`lm_head`, `score`, `classifier`, …: see
            `nn.selection.heads`), unless `include` names them, and () means none.
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

    >>> import torch
    >>> from torch import nn
    >>> from qkernels import replace_linear
    >>> model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    >>> report = replace_linear(model, "w4a16_g128", overrides={"2": "w8a16_g128"})
    >>> {name: str(layer.scheme) for name, layer in report.replaced.items()}
    {'0': 'w4a16_g128', '2': 'w8a16_g128'}
    >>> model(torch.zeros(3, 256)).shape
    torch.Size([3, 64])
    """
    scheme = QuantScheme.parse(scheme)
    rules = {pattern: QuantScheme.parse(s) for pattern, s in (overrides or {}).items()}
    rounding = {s: (method or RTN()).with_scheme(s) for s in (scheme, *rules.values())}
    selection = select_linears(model, scheme, include, exclude, rules, on_unsupported)
    report = ReplaceReport.of(selection, model)
    if not selection.chosen and not selection.experts:
        raise ArgumentError(f"replace_linear found no layer to replace:\n{report}")
    for name in selection.chosen:
        checked_weight(linear_of(model, name).weight, f"{name}.weight")
    for name, schemes in selection.experts.items():
        for projection in schemes:
            checked_weight(model.get_parameter(f"{name}.{projection}"), f"{name}.{projection}")
    layers: dict[str, QuantLinear] = {}
    experts: dict[str, QuantExperts] = {}
    with GivingBack() as memory:
        for name, chosen in tqdm(
            selection.chosen.items(), desc="quantizing", unit="layer", delay=2, disable=not progress
        ):
            linear = linear_of(model, name)
            layers[name] = QuantLinear.from_linear(linear, chosen, rounding[chosen], on_unsupported, f"{name}.weight")
        for name, schemes in tqdm(
            selection.experts.items(), desc="quantizing experts", unit="module", delay=2, disable=not progress
        ):
            methods = {projection: rounding[chosen] for projection, chosen in schemes.items()}
            source = model.get_submodule(name)
            experts[name] = QuantExperts.from_experts(source, schemes, methods, on_unsupported, name)
        also = other_names(model)
        for name, layer in layers.items():
            float_bytes = linear_of(model, name).weight.nbytes
            report.add(name, layer, float_bytes)
            set_module(model, name, layer, also.get(name, ()))
            memory.freed(float_bytes)
        for name, module in experts.items():
            for projection, stack in module.stacks.items():
                float_bytes = model.get_parameter(f"{name}.{projection}").nbytes
                report.add(f"{name}.{projection}", stack, float_bytes)
                memory.freed(float_bytes)
            set_module(model, name, module, also.get(name, ()))
    report.bytes_after = model_bytes(model)
    log.info("%s", report)
    return report
