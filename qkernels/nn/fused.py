"""Several `QuantLinear` that read the same input as one packed matrix: q, k and v; gate and up.

The layers stay what they are, modules with names, buffers and a state dict of their own. Fusing only makes their rows lie one
after another in memory, each layer's buffers being slices of the whole. In a decode step the first layer of a group multiplies
its tokens with the whole, and the others pick up their slices.

What is kept between those calls is one product per thread, of a few tokens, and nobody depends on it: a layer that does not
find its slice for the very tensor it was given multiplies by itself. So results never change. These run layer by layer: more
tokens than a decode step has (the calls that fusing saves do not count there), calls whose gradient is recorded, and compiled
graphs.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layouts import get_layout
from ..model_structure import find_architecture, known_architectures
from ..ops import records_gradient
from .huge_pages import on_huge_pages
from .linear import BUFFERS, QuantLinear

DECODE_TOKENS = 8  # measured: docs/cpu-fused.md

_LAYING_OUT = threading.Lock()


class _Product(NamedTuple):
    """A decode step's product with the whole of a group, as far as it was not picked up: slices by the `id` of their part."""

    group: weakref.ref[FusedGroup]
    x: Tensor
    conditions: tuple[object, ...]
    slices: dict[int, Tensor]


class _PerThread(threading.local):
    product: _Product | None = None


_latest = _PerThread()


class FusedGroup:
    """The layers of one group, in the order in which the model calls them; see the module's text."""

    def __init__(self, parts: tuple[QuantLinear, ...]) -> None:
        self.parts = parts
        self._rows = [part.out_features for part in parts]
        self._whole: QuantLinear | None = None
        self._addresses: tuple[int, ...] = ()

    def multiply(self, part: QuantLinear, x: Tensor) -> Tensor | None:
        """`part(x)` from the product with the whole; None where the part has to multiply by itself.

        Between the calls of the parts nobody may write into the buffers in place; nor into x under `torch.inference_mode`, where
        torch does not count changes.
        """
        if x.numel() > DECODE_TOKENS * part.in_features or records_gradient(x, part.bias):
            return None
        if part is self.parts[0]:
            whole = self._matrix()
            if whole is None:
                return None
            first, *others = whole.forward(x).split_with_sizes(self._rows, -1)
            slices = {id(other): y for other, y in zip(self.parts[1:], others, strict=True)}
            _latest.product = _Product(weakref.ref(self), x, _conditions(x), slices)
            return first.contiguous()  # as it would be alone; a copy only if there are several tokens
        product = _latest.product
        if product is None or product.x is not x or product.group() is not self or product.conditions != _conditions(x):
            return None
        if self._addresses != self._current_addresses():  # loaded since
            return None
        y = product.slices.pop(id(part), None)
        if not product.slices:
            _latest.product = None
        return None if y is None else y.contiguous()

    def reasons(self) -> list[str]:
        """Why the layers cannot be one matrix; empty if they can."""
        first, layout = self.parts[0], get_layout(self.parts[0].layout)
        why = []
        for what, values in _properties(self.parts).items():
            if any(value != values[0] for value in values):
                why.append(f"{what} differ: {', '.join(map(str, values))}")
        device = first.qweight.device.type
        if not layout.fusible or device != layout.device:
            why.append(
                f"a row's bits may depend on its matrix in layout {layout.name} on {device}; they do not in the CPU's"
            )
        if any(rows % layout.rows_per_tile for rows in self._rows[:-1]):
            why.append(f"{self._rows} rows do not end where tiles of {layout.rows_per_tile} do")
        if not why and not all(_equal(first.k_order, part.k_order) for part in self.parts):
            why.append("each has an order of columns (act-order) of its own")
        return why

    def lay_out(self) -> None:
        """Put the parts' buffers one after another, and make each part's buffers slices of the whole."""
        whole = None
        if not self.reasons():
            with torch.inference_mode(False), torch.no_grad():
                whole = _whole_of(self.parts)
                first_row = 0
                for part in self.parts:
                    _share_rows(whole, part, first_row)
                    first_row += part.out_features
        self._whole, self._addresses = whole, self._current_addresses()

    def part_changed(self) -> None:
        """Let go of the whole if a part left it, so that no weight is held twice until the next decode step."""
        if self._addresses != self._current_addresses():
            self._whole, self._addresses = None, ()

    def _matrix(self) -> QuantLinear | None:
        """The whole, laid out again if something (loading, moving, casting, copying) gave a part other memory."""
        if self._addresses != self._current_addresses():
            with _LAYING_OUT:
                if self._addresses != self._current_addresses():
                    self.lay_out()
        return self._whole

    def _current_addresses(self) -> tuple[int, ...]:
        tensors = [t for part in self.parts for t in (*part._buffers.values(), part.bias) if t is not None]
        return tuple([t.data_ptr() for t in tensors])


@dataclass
class FuseReport:
    """What `fuse_linear` did: groups as "model.layers.0.mlp: gate_proj, up_proj", and those left alone with the reason."""

    fused: list[str] = field(default_factory=list)
    unfused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} groups of linear layers, left {len(self.unfused)} as they are"]
        return "\n".join(lines + [f"  not fused {name}: {reason}" for name, reason in self.unfused.items()])


def fuse_linear(model: nn.Module) -> FuseReport:
    """Let the `QuantLinear` of a model that read the same input (q, k, v; gate, up) share one packed matrix, in place.

    Results keep their bits, and names, state dict and checkpoints stay those of the model as it is. A model that is moved or
    cast, or that loads a state dict, fuses again by itself where it still can. `unfuse_linear` undoes it.

    Args:
        model: a `transformers` model whose architecture is in `qkernels.model_structure`, which says what reads the same input.

    Returns:
        The report: `.fused`, and `.unfused[group] = reason`; nothing is left out.
    """
    report = FuseReport()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    architecture = find_architecture(model_type)
    if architecture is None:
        known = ", ".join(known_architectures())
        report.unfused[type(model).__name__] = (
            f"which layers read the same input is known for {known}, not for {model_type}"
        )
        return report
    for owner, module in model.named_modules():
        for names in architecture.fused:
            found = {name: _submodule(module, name) for name in names}
            if not any(found.values()):
                continue
            title = (
                f"{owner}.{names[0].rpartition('.')[0]}: {', '.join(name.rpartition('.')[2] for name in names)}".lstrip(
                    "."
                )
            )
            parts = tuple(part for part in found.values() if isinstance(part, QuantLinear))
            if len(parts) < len(names):
                kinds = {name: "missing" if part is None else type(part).__name__ for name, part in found.items()}
                report.unfused[title] = f"all must be QuantLinear, got {', '.join(kinds.values())}"
                continue
            group = FusedGroup(parts)
            if reasons := group.reasons():
                report.unfused[title] = "; ".join(reasons)
                continue
            group.lay_out()
            for part in parts:
                part.fused = group
            report.fused.append(title)
    if not report.fused and not report.unfused:
        report.unfused[type(model).__name__] = f"{model_type} models have no layers that read the same input"
    return report


def unfuse_linear(model: nn.Module) -> None:
    """Undo `fuse_linear`: every layer of the model has memory of its own again."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.fused is not None:
            module.fused = None
            with torch.inference_mode(False), torch.no_grad():
                own = {name: getattr(module, name) for name in BUFFERS}
                module._set_buffers({name: None if t is None else on_huge_pages(t.clone()) for name, t in own.items()})
                if module.bias is not None:
                    module.bias.data = module.bias.data.clone()


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    for leaf in name.split("."):
        found = module._modules.get(leaf)
        if found is None:
            return None
        module = found
    return module


def _conditions(x: Tensor) -> tuple[object, ...]:
    """What must not change between the calls of the parts, beside which tensor x is."""
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    return (None if x.is_inference() else x._version, autocast, torch.is_inference_mode_enabled())


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _properties(parts: tuple[QuantLinear, ...]) -> dict[str, list[object]]:
    """What must be the same for all."""

    def dtype(t: Tensor | None) -> object:
        return "none" if t is None else str(t.dtype).removeprefix("torch.")

    return {
        "in_features": [part.in_features for part in parts],
        "schemes": [str(part.scheme) for part in parts],
        "layouts": [part.layout for part in parts],
        "devices": [str(part.qweight.device) for part in parts],
        "dtypes of scales": [dtype(part.scales) for part in parts],
        "dtypes of zeros": [dtype(part.zeros) for part in parts],
        "dtypes of bias": [dtype(part.bias) for part in parts],
    }


def _whole_of(parts: tuple[QuantLinear, ...]) -> QuantLinear:
    first = parts[0]
    whole = QuantLinear(
        first.in_features, sum(part.out_features for part in parts), first.bias is not None, scheme=first.scheme,
        device="meta", dtype=first.dtype, layout=first.layout,
    )  # fmt: skip

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return tensors[0] if tensors[0] is None or name == "k_order" else on_huge_pages(torch.cat(tensors))

    whole._set_buffers({name: joined(name) for name in BUFFERS})
    if first.bias is not None:
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]  # all, if reasons() had none
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return whole


def _share_rows(whole: QuantLinear, part: QuantLinear, first_row: int) -> None:
    tile = first_row // get_layout(whole.layout).rows_per_tile
    buffers = {}
    for name in BUFFERS:
        t, own = getattr(whole, name), getattr(part, name)
        buffers[name] = t if t is None or name == "k_order" else t[tile : tile + own.shape[0]]
    part._set_buffers(buffers)
    if whole.bias is not None and part.bias is not None:
        part.bias.data = whole.bias.data[first_row : first_row + part.out_features]
