"""What counts as an experts module: stacked `[E, …]` weights with the forward contract of transformers 5, told by the flags of
its decorator (`use_experts_implementation`) and not by names; and Llama 4's, which is not decorated. What is not covered here
stays as it is and is named in reports."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

# What files call the parts of one expert, by the projection that they belong to, in the order of its rows.
PARTS: Final = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "up_proj": (("up_proj", "w1"),),
    "down_proj": (("down_proj", "w2"),),
}
_IN_FILES: Final = re.compile(r"(?P<experts>.+)\.(?P<expert>\d{1,6})\.(?P<part>[a-z0-9_]+)")


@dataclass(frozen=True)
class ExpertsForm:
    """How an experts module stores its weights and what it computes.

    Args:
        up, down: names of its parameters: "gate_up_proj" (or "up_proj" without a gate) and "down_proj".
        experts: E.
        hidden, width: H and I.
        transposed: whether the parameters are `[E, K, N]`.
        interleaved: whether rows of gate and up take turns.
        routed: whether `forward` is given ids and weights; else rows of x come expert by expert (Llama 4).
    """

    up: Literal["gate_up_proj", "up_proj"]
    experts: int
    hidden: int
    width: int
    transposed: bool = False
    interleaved: bool = False
    routed: bool = True

    @property
    def down(self) -> Literal["down_proj"]:
        """The second projection."""
        return "down_proj"

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.up == "gate_up_proj"

    def child(self, projection: str) -> str:
        """What the stack of a projection is called inside of `QuantExperts`. Not as the parameter was: PEFT's target_modules are
        the ends of names, and "down_proj" means linear layers."""
        return "down_stack" if projection == self.down else "up_stack"

    def shape(self, projection: str) -> tuple[int, int]:
        """(N, K) of a projection."""
        if projection == self.down:
            return self.hidden, self.width
        return (2 if self.gated else 1) * self.width, self.hidden

    def of_projection(self, projection: str, stored: Tensor) -> Tensor:
        """A parameter of the module, `[E, …]`, as `[E, N, K]`: gate's rows, then up's. A view where it can be one."""
        weight = stored.transpose(-1, -2) if self.transposed else stored
        return self.in_halves(weight, -2) if projection == self.up else weight

    def stored(self, projection: str, weight: Tensor) -> Tensor:
        """The inverse."""
        if projection == self.up and self.interleaved:
            gate, up = torch.split(weight, self.width, dim=-2)
            weight = torch.stack([gate, up], dim=-2).flatten(-3, -2)
        return weight.transpose(-1, -2).contiguous() if self.transposed else weight.contiguous()

    def in_halves(self, values: Tensor, dim: int) -> Tensor:
        """What gate and up have along a dimension: gate's half first."""
        if not self.interleaved:
            return values
        halves: list[Tensor] = [
            values.index_select(dim, torch.arange(i, 2 * self.width, 2, device=values.device)) for i in (0, 1)
        ]
        return torch.cat(halves, dim=dim)

    def taking_turns(self, values: Tensor) -> Tensor:
        """The inverse along the last dimension."""
        if not self.interleaved:
            return values
        gate, up = torch.split(values, self.width, dim=-1)
        return torch.stack([gate, up], dim=-1).flatten(-2)


def experts_form(module: nn.Module) -> ExpertsForm | None:
    """The form of an experts module, or None where it is none that is covered."""
    kind: Any = type(module)
    flags: Any = module
    names = {name for name, p in module._parameters.items() if p is not None}
    if kind.__name__ == "Llama4TextExperts":
        gated, bias, transposed, interleaved, routed = True, False, True, False, False
    elif all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        if getattr(module, "has_post_expert_norm", False):
            return None
        gated, bias, transposed = bool(flags.has_gate), bool(flags.has_bias), bool(flags.is_transposed)
        interleaved, routed = gated and not flags.is_concatenated, True
    else:
        return None
    up: Literal["gate_up_proj", "up_proj"] = "gate_up_proj" if gated else "up_proj"
    wanted = {up, "down_proj"} | ({f"{up}_bias", "down_proj_bias"} if bias else set())
    if names != wanted or any(b is not None for b in module._buffers.values()):
        return None
    down: Any = module._parameters["down_proj"]
    if down.dim() != 3 or not down.is_floating_point():
        return None
    hidden, width = (down.shape[2], down.shape[1]) if transposed else (down.shape[1], down.shape[2])
    form = ExpertsForm(up, down.shape[0], hidden, width, transposed, interleaved, routed)
    N, K = form.shape(up)
    first: Any = module._parameters[up]
    expected = [form.experts, K, N] if transposed else [form.experts, N, K]
    return form if list(first.shape) == expected and first.is_floating_point() else None


def experts_of(model: nn.Module) -> dict[str, ExpertsForm]:
    """Every covered experts module of a model, by name."""
    found = ((name, experts_form(module)) for name, module in model.named_modules())
    return {name: form for name, form in found if form is not None}


def shell_of(module: nn.Module) -> nn.Module:
    """An experts module without its weights: what its activation, a method that it may override, is computed by."""
    shell = copy.copy(module)
    hooks = {name: type(value)() for name, value in vars(module).items() if name.endswith("_hooks") and value}
    shell.__dict__ |= hooks | {"_parameters": {}, "_buffers": {}, "_modules": dict(module._modules)}
    shell.__dict__.pop("_hf_hook", None)
    shell.__dict__.pop("forward", None)
    return shell


def activation_of(shell: Any, form: ExpertsForm) -> Callable[[Tensor], Tensor]:
    """What an experts module computes between its projections: `[..., 2 I]` (gate, then up) or `[..., I]` -> `[..., I]`."""
    if not form.gated:
        ungated: Callable[[Tensor], Tensor] = shell.act_fn
        return ungated
    if hasattr(shell, "_apply_gate"):
        return lambda halves: shell._apply_gate(form.taking_turns(halves))

    def gated(halves: Tensor) -> Tensor:
        gate, up = halves.chunk(2, dim=-1)
        y: Tensor = up * shell.act_fn(gate)
        return y

    return gated


def routers(model: nn.Module, experts: Iterable[str]) -> set[str]:
    """Modules that choose among experts, or weigh a shared one: beside an experts module, with one weight, `[E, H]` or `[1, H]`.

    Told by structure: names differ (gate, router, router.layer), and "gate" is also what projections are called.
    """
    found: set[str] = set()
    for name in experts:
        parent, _, leaf = name.rpartition(".")
        inner: Any = model.get_submodule(name)
        shapes = [(count, hidden_of(inner)) for count in (inner.num_experts, 1)]
        for child, module in model.get_submodule(parent).named_children():
            if child == leaf:
                continue
            like = [n for n, p in module.named_parameters() if tuple(p.shape) in shapes]
            others = [
                n for n, p in module.named_parameters() if sum(size > 1 for size in p.shape) > 1 and n not in like
            ]
            if len(like) == 1 and not others:  # vectors beside it correct or scale what it says
                found.add(f"{parent}.{child}.{like[0]}".lstrip(".").rpartition(".")[0])
    return found


def hidden_of(module: nn.Module) -> int | None:
    """H of an experts module, as it is or quantized."""
    form = getattr(module, "form", None) or experts_form(module)
    return None if form is None else form.hidden


def part_of(module: str, forms: Mapping[str, ExpertsForm]) -> tuple[str, int, int] | None:
    """Where a module of one expert in files belongs: (its stack, "….experts.gate_up_proj"; which expert; which part of its rows).

    >>> from qkernels.models.experts import ExpertsForm, part_of
    >>> part_of("mlp.experts.3.up_proj", {"mlp.experts": ExpertsForm("gate_up_proj", 8, 64, 32)})
    ('mlp.experts.gate_up_proj', 3, 1)
    """
    match = _IN_FILES.fullmatch(module)
    form = forms.get(match["experts"]) if match is not None else None
    if match is None or form is None:
        return None
    for projection in (form.up, form.down):
        if match["part"] == projection:
            if projection == form.up and form.gated:  # both in one: not apart
                return f"{match['experts']}.{projection}", int(match["expert"]), -1
            return f"{match['experts']}.{projection}", int(match["expert"]), 0
        for index, names in enumerate(PARTS[projection]):
            if match["part"] in names:
                return f"{match['experts']}.{projection}", int(match["expert"]), index
    return None


def members_of(stack: str, forms: Mapping[str, ExpertsForm]) -> list[tuple[int, int]]:
    """(expert, part) of every matrix that a stack is made of, in its order."""
    experts, _, projection = stack.rpartition(".")
    form = forms[experts]
    return [(expert, part) for expert in range(form.experts) for part in range(len(PARTS[projection]))]


def name_in_files(stack: str, expert: int, part: int) -> str:
    """What a part of one expert is called where its architecture has no names of its own."""
    experts, _, projection = stack.rpartition(".")
    return f"{experts}.{expert}.{PARTS[projection][part][0]}"


def stack_at(model: nn.Module, name: str) -> tuple[str, ExpertsForm, str] | None:
    """(the experts module, its form, the projection) where a name is that of stacked float experts; None: of a layer."""
    experts, _, projection = name.rpartition(".")
    if projection not in PARTS:
        return None
    try:
        form = experts_form(model.get_submodule(experts))
    except AttributeError:
        return None
    return (experts, form, projection) if form is not None and projection in (form.up, form.down) else None


def parameter_of(model: nn.Module, name: str) -> str:
    """The parameter that is the weight of a linear layer or of stacked experts."""
    return f"{name}.weight" if stack_at(model, name) is None else name
