"""`QuantExperts`: a drop-in for the `.experts` module of a mixture of experts, whose stacked weights are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..factors import as_bytes
from ..kernels.catalogue import OnUnsupported, Problem, arch_of, select
from ..layouts import get_layout
from ..models.experts import PARTS, ExpertsForm, activation_of, experts_form, shell_of
from ..ops import grouped, records_gradient
from ..quantizers import RTN, Options
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from .huge_pages import on_huge_pages
from .packed import PackedModule
from .pretrained import mind_save_pretrained


class OrdersDiffer(ArgumentError):
    """Experts have orders of columns of their own, and were packed as if they had one."""


class QuantStack(PackedModule):
    """One projection of all experts, `[E, N, K]`, packed; its bias is `[E, N]`. A part of `QuantExperts`, which runs it."""

    @classmethod
    def of(
        cls,
        experts: Iterable[QuantTensor],
        count: int,
        bias: Tensor | None,
        device: torch.device | str,
        dtype: torch.dtype,
        on_unsupported: OnUnsupported = "raise",
        own_orders: bool = False,
    ) -> QuantStack:
        """Pack experts one after the other, so that one of them is in memory beside the result.

        Args:
            experts: `count` weights `[N, K]` of one scheme.
            own_orders: whether some have an order of columns (act-order) of their own.

        Raises:
            ArgumentError: they differ in what a stack has once.
            UnsupportedProblem: no kernel takes them.
        """
        device = torch.device(device)
        stack: QuantStack | None = None
        first: QuantTensor | None = None
        packed: dict[str, Tensor | None] = {}
        for index, weight in enumerate(experts):
            if stack is None or first is None:
                first, stack = weight, cls.__new__(cls)
                nn.Module.__init__(stack)
                stack.experts, stack._own_orders = count, own_orders
                stack._describe(weight.K, weight.N, weight.scheme, dtype, on_unsupported)
                stack.layout = stack._select(device, dtype)
            else:
                QuantTensor.stack([_header(first), _header(weight)])  # says what differs
            made = get_layout(stack.layout).pack(weight)
            if own_orders and weight.group_index is None:
                made["k_order"] = torch.arange(weight.K, dtype=torch.int32, device=weight.device)
            for buffer in get_layout(stack.layout).buffers:
                t = made[buffer.name]
                each = t is not None and (buffer.tiled or (buffer.name == "k_order" and own_orders))
                if index == 0:
                    packed[buffer.name] = t
                    if t is not None and each:
                        packed[buffer.name] = on_huge_pages(
                            torch.empty((count, *t.shape), dtype=t.dtype, device=device)
                        )
                if t is not None and each:
                    packed[buffer.name][index].copy_(t)  # type: ignore[index]
                elif index and not _same(t, packed[buffer.name]):
                    raise OrdersDiffer(f"expert {index} has another {buffer.name} than expert 0")
        if stack is None or index + 1 != count:
            raise ArgumentError(f"there must be {count} experts, got {0 if stack is None else index + 1}")
        with torch.inference_mode(False):
            stack._set_buffers({name: None if t is None else t.to(device) for name, t in packed.items()})
            stack.bias = None
            if bias is not None:
                stack.bias = nn.Parameter(bias.detach().to(device, dtype).clone(), requires_grad=bias.requires_grad)
        return stack

    def as_argument(self) -> grouped.Stack:
        """What the ops take."""
        return grouped.Stack(self._buffers, self.bias, self._numbers, self.in_features)

    def adopt(self) -> None:
        """Make the layout fit the device that something moved the buffers to."""
        if self._buffers["qweight"].device.type != self._device_type:
            self._adopt_moved_buffers()

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, layout={self.layout}"
        )


def _same(t: Tensor | None, other: Tensor | None) -> bool:
    if t is None or other is None:
        return t is other
    return t.is_meta or torch.equal(t, other.to(t.device))


def _header(weight: QuantTensor) -> QuantTensor:
    return QuantTensor(
        weight.codes.to("meta"), weight.scales.to("meta"), None if weight.zeros is None else weight.zeros.to("meta"),
        None, weight.scheme, None if weight.factors is None else weight.factors.to("meta"),
    )  # fmt: skip


class QuantExperts(nn.Module):
    """A mixture's experts with packed weights, and the forward contract of the module that it replaces (transformers 5):
    `forward(hidden [T, H], ids [T, k], weights [T, k]) -> [T, H]`, or for Llama 4 `forward(rows sorted by expert)`.

    Gate and up are one stack `[E, 2 I, H]`, gate's rows first, whatever the order of the source was. The activation is the
    source's own method. Products are of x in its dtype with fp32 sums; what lies between them is computed in fp32 and rounded
    once to x's dtype; products with routing weights and the sum over a token's experts are fp32 and rounded once. Ids outside
    0 … E - 1 (expert parallelism) add exactly 0.

    Made by `replace_linear`, `load` and `from_pretrained`. Its stacks are had under the names of the parameters, too
    (`experts.down_proj`).

    Raises:
        ArgumentError: `source` is no experts module that is covered.
        UnsupportedProblem: no kernel takes a projection.

    Example:
        >>> import torch
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> from qkernels.nn import QuantExperts
        >>> config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4)
        >>> source = MixtralExperts(config)
        >>> _ = [torch.nn.init.normal_(p) for p in source.parameters()]
        >>> experts = QuantExperts.from_experts(source, "w4a16_g32")
        >>> experts(torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [0, 4]]), torch.rand(3, 2)).shape
        torch.Size([3, 64])
    """

    up_stack: QuantStack
    down_stack: QuantStack

    def __init__(self, source: nn.Module, form: ExpertsForm, stacks: Mapping[str, QuantStack]) -> None:
        super().__init__()
        mind_save_pretrained(PackedModule)
        self.form = form
        self.num_experts, self.hidden_size, self.intermediate_size = form.experts, form.hidden, form.width
        self.shell = shell_of(source)
        self.known_activation = known_activation(self.shell, form)
        for name in (form.up, form.down):
            setattr(self, form.child(name), stacks[name])

    @classmethod
    def from_experts(
        cls,
        source: nn.Module,
        scheme: QuantScheme | str | Mapping[str, QuantScheme],
        method: Options | Mapping[str, Options] | None = None,
        on_unsupported: OnUnsupported = "raise",
        name: str = "experts",
    ) -> QuantExperts:
        """Quantize a float module without calibration data, one expert at a time.

        Args:
            scheme: for both projections, or one for each by name.
            method: how to round; `RTN()` if None.
            name: how error messages call the module.
        """
        form = experts_form(source)
        if form is None:
            raise ArgumentError(f"{type(source).__name__} is no experts module that QuantExperts covers")
        stacks: dict[str, QuantStack] = {}
        for projection in (form.up, form.down):
            one = scheme if isinstance(scheme, QuantScheme | str) else scheme[projection]
            rounding = method[projection] if isinstance(method, Mapping) else method
            rounding = (rounding or RTN()).with_scheme(one)
            parameter = source._parameters[projection]
            assert parameter is not None
            weights = form.of_projection(projection, parameter.detach())
            made = (
                rounding.quantize(weights[e].contiguous(), name=f"{name}.{projection}[{e}]")
                for e in range(form.experts)
            )
            bias = bias_of(form, projection, source._parameters.get(f"{projection}_bias"))
            stacks[projection] = QuantStack.of(
                made, form.experts, bias, parameter.device, parameter.dtype, on_unsupported
            )
        return cls(source, form, stacks)

    @staticmethod
    def check_supported(
        form: ExpertsForm, projection: str, scheme: QuantScheme, dtype: torch.dtype, device: torch.device,
        on_unsupported: OnUnsupported = "raise",
    ) -> None:  # fmt: skip
        """Raise `UnsupportedProblem` if no kernel would take this projection under `scheme`."""
        N, K = form.shape(projection)
        select(Problem(N, K, scheme, dtype, arch_of(device), form.experts), on_unsupported)

    @property
    def stacks(self) -> dict[str, QuantStack]:
        """Its projections by name."""
        return {self.form.up: self.up_stack, self.form.down: self.down_stack}

    def __getattr__(self, name: str) -> Any:
        if name in PARTS:
            form = self.__dict__["form"]
            if name in (form.up, form.down):
                return self._modules[form.child(name)]
        return super().__getattr__(name)

    def forward(
        self, hidden: Tensor, ids: Tensor | None = None, weights: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """See the class. T may be 0."""
        up, down = self.stacks.values()
        if not torch.compiler.is_compiling():
            up.adopt()
            down.adopt()
        x = hidden.reshape(-1, self.form.hidden)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.form.routed:
            return self._all_rows(x, up, down).view(hidden.shape)
        if ids is None or weights is None:
            raise ArgumentError(
                "experts are called with hidden [T, H], ids [T, k] and weights [T, k], got no ids or weights"
            )
        known = self.known_activation
        recorded = torch.is_grad_enabled() and (weights.requires_grad or any(map(_trained, (up, down))))
        if known is None or recorded or records_gradient(x, None) or up.layout != down.layout:
            made = activation_of(self.shell, self.form)
            layouts = (up.layout, down.layout)
            return grouped.block(layouts, x, ids, weights, up.as_argument(), down.as_argument(), made).view(
                hidden.shape
            )
        name, alpha, limit = known
        y = grouped.experts(up.layout, x, ids, weights, up.as_argument(), down.as_argument(), name, alpha, limit)
        return y.view(hidden.shape)

    def _all_rows(self, x: Tensor, up: QuantStack, down: QuantStack) -> Tensor:
        """Llama 4: as many rows for each expert, those of tokens that it was not chosen for being 0."""
        rows = torch.arange(x.shape[0], device=x.device)
        each = x.shape[0] // self.num_experts
        offsets = torch.arange(self.num_experts + 1, device=x.device) * each
        halves = grouped.grouped_gemm(up.layout, x, rows, offsets, up.as_argument(), torch.float32)
        inner = activation_of(self.shell, self.form)(halves).to(x.dtype)
        return grouped.grouped_gemm(down.layout, inner, rows, offsets, down.as_argument(), x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The parameters of the module that it replaced, by name and in their own order; biases are among them."""
        found: dict[str, Tensor] = {}
        for name, stack in self.stacks.items():
            found[name] = self.form.stored(name, stack.dequantize(dtype))
            if stack.bias is not None:
                bias = stack.bias.detach()
                found[f"{name}_bias"] = self.form.taking_turns(bias) if name == self.form.up else bias
        return found

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_size}, width={self.intermediate_size}"


def bias_of(form: ExpertsForm, projection: str, stored: Tensor | None) -> Tensor | None:
    """A bias `[E, N]` in the order of a stack's rows."""
    if stored is None or projection != form.up:
        return stored
    return form.in_halves(stored, -1)


def rows_in_halves(form: ExpertsForm, weight: QuantTensor) -> QuantTensor:
    """One expert's gate and up, whose rows may take turns, with gate's first."""
    if not form.interleaved:
        return weight
    assert weight.factors is None
    order = form.in_halves(torch.arange(weight.N, device=weight.device), 0)
    zeros = None if weight.zeros is None else weight.zeros[order]
    scales = as_bytes(weight.scales)[order].view(weight.scales.dtype)
    scheme = replace(weight.scheme, rows=1)
    return QuantTensor(weight.codes[order], scales, zeros, weight.group_index, scheme)


def _trained(stack: QuantStack) -> bool:
    return stack.bias is not None and stack.bias.requires_grad


def known_activation(shell: Any, form: ExpertsForm) -> tuple[str, float, float] | None:
    """What a module computes between its projections, as one of `ops.grouped.ACTIVATIONS` with alpha and limit; found by running
    it on small numbers, not by names. None: a formula of its own, which runs between two ops."""
    generator = torch.Generator().manual_seed(0)
    width = form.width
    probe = torch.randn((64, (2 if form.gated else 1) * width), generator=generator, device="cpu") * 8
    alpha, limit = (float(getattr(shell, name, 0.0) or 0.0) for name in ("alpha", "limit"))
    own: Callable[[Tensor], Tensor] = activation_of(shell, form)
    try:
        with torch.inference_mode(False), torch.no_grad():
            expected = own(probe)
            for name in grouped.ACTIVATIONS:
                if name.endswith("_ungated") == form.gated:
                    continue
                got = grouped.activate(name, probe, alpha, limit)
                if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-5, atol=1e-5):
                    return name, alpha, limit
    except Exception:  # whatever it needs, it is none of these
        return None
    return None
