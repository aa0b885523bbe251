"""Products with stacked experts: schemas, checks, plain-PyTorch meaning and gradients of two ops for each layout that has them.

    grouped_gemm_<layout>    rows of x, sorted by expert, each with its expert's weight
    experts_<layout>         a whole block: up (and gate), activation, down, times routing weights, summed over a token's experts

Partial sums are fp32, in a fixed order over K and then over a token's experts, and are rounded once: the result has the same
bits every time, whatever the number of threads. Expert ids outside 0 … E - 1 (what expert parallelism gives to others) add
exactly 0. Weights are frozen; `grouped_gemm` has a gradient to x and bias (`grouped_gradient_<layout>`), `experts` has none:
whoever wants one composes the block of the other (`block`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.library import register_autograd

from ..errors import ArgumentError
from ..layouts import LAYOUTS, Layout, get_layout
from ..tensor import FLOAT_DTYPES
from ..text import describe
from . import reference, schema
from .backends import BACKENDS
from .weight import Weight, buffer_types, schema_of, weight_from_buffers

# What lies between the two products, by its number in the ops: gate and up [R, 2 I] (or up alone, [R, I]) -> [R, I].
ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "swiglu_oai", "relu2_ungated", "silu_ungated", "gelu_ungated")


class Stack(NamedTuple):
    """Stacked experts as an op takes them: packed buffers by name, bias `[E, N]` or None, and `Layout.numbers_of`."""

    buffers: Mapping[str, Tensor | None]
    bias: Tensor | None
    numbers: Sequence[float]
    in_features: int

    def arguments(self, layout: Layout) -> list[Any]:
        """In the order of the schema."""
        return [*(self.buffers[buffer.name] for buffer in layout.buffers), self.bias, *self.numbers]


def activate(name: str, up: Tensor, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    """One of `ACTIVATIONS` on `[..., 2 I]` (gate, then up) or `[..., I]`, in the dtype of its argument.

    "swiglu_oai" is that of gpt-oss: gate below `limit`, up between ±limit, (up + 1) gate sigmoid(alpha gate).
    """
    f = torch.nn.functional
    if name.endswith("_ungated"):
        if name == "relu2_ungated":
            return f.relu(up).square()
        return f.silu(up) if name == "silu_ungated" else f.gelu(up)
    gate, up = up.chunk(2, dim=-1)
    if name == "swiglu_oai":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    if name == "silu":
        return f.silu(gate) * up
    return f.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up


def sorted_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """How (token, expert) pairs are sorted by expert, those of one expert in the order of tokens.

    Args:
        ids: integers `[T, k]`; what lies outside 0 … E - 1 comes last.

    Returns:
        order int64 `[T k]`: the pair (t k + j) at each place; rows `[T k]`: its token; offsets `[E + 1]`: where experts begin.
    """
    flat = ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    by_expert, order = torch.sort(flat, stable=True)
    offsets = torch.searchsorted(by_expert, torch.arange(experts + 1, device=ids.device))
    return order, order // max(ids.shape[1], 1), offsets


def block(
    layouts: tuple[str, str], x: Tensor, ids: Tensor, weights: Tensor, up: Stack, down: Stack,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """A block of experts made of two grouped products: what `experts_<layout>` does, for any activation and with gradients.

    Args:
        layouts: of up and down.
        x: floating `[T, H]`.
        ids, weights: `[T, k]`.
        activation: fp32 `[R, 2 I]` -> `[R, I]`.

    Returns:
        `[T, H]` in x's dtype: sums over a token's experts in fp32, rounded once.
    """
    experts = up.buffers["qweight"].shape[0]  # type: ignore[union-attr]
    order, rows, offsets = sorted_by_expert(ids, experts)
    hidden = activation(grouped_gemm(layouts[0], x, rows, offsets, up, torch.float32)).to(x.dtype)
    here = torch.arange(rows.shape[0], device=x.device)
    y = grouped_gemm(layouts[1], hidden, here, offsets, down, torch.float32)
    pairs = y[torch.argsort(order)].unflatten(0, (ids.shape[0], ids.shape[1]))
    known = ((ids >= 0) & (ids < experts)).unsqueeze(-1)
    return torch.where(known, pairs * weights.float().unsqueeze(-1), 0.0).sum(1).to(x.dtype)


def grouped_gemm(layout: str, x: Tensor, rows: Tensor, offsets: Tensor, stack: Stack, dtype: torch.dtype) -> Tensor:
    """`y[r] = x[rows[r]] W[e]^T + bias[e]` for `offsets[e] <= r < offsets[e + 1]`, and 0 for rows that no expert has.

    Args:
        x: floating `[T, K]`.
        rows: int64 `[R]`, each 0 … T - 1.
        offsets: int64 `[E + 1]`, rising from 0 to at most R.
        dtype: of y: x's, or float32.

    Returns:
        `[R, N]`.

    Raises:
        ArgumentError: an argument has the wrong dtype, shape or device.
    """
    value = get_layout(layout)
    if not value.grouped:
        raise ArgumentError(f"layout {layout} has no grouped products; those of {', '.join(OPS)} have")
    y: Tensor = OPS[layout].gemm(x, rows, offsets, *stack.arguments(value), dtype)
    return y


def experts(
    layout: str, x: Tensor, ids: Tensor, weights: Tensor, up: Stack, down: Stack, activation: str, alpha: float = 0.0,
    limit: float = 0.0,
) -> Tensor:  # fmt: skip
    """A whole block in one op, without a gradient: see `block` and `activate`."""
    value, number = get_layout(layout), ACTIVATIONS.index(activation)
    arguments = [*up.arguments(value), *down.arguments(value), number, alpha, limit]
    y: Tensor = OPS[layout].experts(x, ids, weights, *arguments)
    return y


# --- arguments ------------------------------------------------------------------------------------------------------------


def _stack_types(layout: Layout, prefix: str = "") -> dict[str, str]:
    types = buffer_types(layout) | {"bias": "Tensor?"} | {n.name: n.type for n in layout.numbers}
    return {prefix + name: kind for name, kind in types.items()}


def _gemm_types(layout: Layout) -> dict[str, str]:
    return {"x": "Tensor", "rows": "Tensor", "offsets": "Tensor"} | _stack_types(layout) | {"dtype": "ScalarType"}


def _gradient_types(layout: Layout) -> dict[str, str]:
    first = {"dy": "Tensor", "rows": "Tensor", "offsets": "Tensor", "tokens": "SymInt", "in_features": "int"}
    return first | _stack_types(layout)


def _experts_types(layout: Layout) -> dict[str, str]:
    first = {"x": "Tensor", "ids": "Tensor", "weights": "Tensor"}
    both = _stack_types(layout, "up_") | _stack_types(layout, "down_")
    return first | both | {"activation": "int", "alpha": "float", "limit": "float"}


def _read(layout: Layout, arguments: Sequence[Any], in_features: int) -> tuple[Weight, Tensor | None]:
    """The weight and the bias of a stack's arguments."""
    end = len(layout.buffers)
    weight = weight_from_buffers(
        layout, arguments[:end], arguments[end + 1 : end + 1 + len(layout.numbers)], in_features
    )
    return weight, arguments[end]


def check_stack(layout: Layout, weight: Weight, bias: Tensor | None, device: torch.device) -> int:
    """The number of experts of a stack whose buffers are right.

    Raises:
        ArgumentError: a buffer or the bias has the wrong dtype, shape or device.
    """
    if schema.check_weight(layout, weight) != 1:
        raise ArgumentError(f"qweight must be of stacked experts [E, …], got {describe(weight.qweight)}")
    if weight.own.get("x_static") is not None:
        raise ArgumentError("x_static must be None for stacked experts, which have no static activations")
    count = int(weight.qweight.shape[0])
    shape = [count, weight.out_features]
    if bias is not None and (bias.dtype not in FLOAT_DTYPES or list(bias.shape) != shape):
        raise ArgumentError(f"bias must be None or floating [E, N] = {shape}, got {describe(bias)}")
    for name, t in (("qweight", weight.qweight), ("bias", bias)):
        if t is not None and t.device != device:
            raise ArgumentError(f"{name} must be on the device of x, {device}, got {t.device}; move one of them")
    return count


def _check_rows(x: Tensor, rows: Tensor, offsets: Tensor, count: int) -> None:
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"x must be float32, bfloat16 or float16 [T, K], got {describe(x)}")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ArgumentError(f"rows must be int64 [R], got {describe(rows)}")
    if offsets.dtype != torch.int64 or list(offsets.shape) != [count + 1]:
        raise ArgumentError(f"offsets must be int64 [E + 1] = [{count + 1}], got {describe(offsets)}")


def read_gemm(
    layout: Layout, arguments: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Weight, Tensor | None, torch.dtype]:
    x, rows, offsets, *rest, dtype = arguments
    weight, bias = _read(layout, rest, x.shape[-1])
    _check_rows(x, rows, offsets, check_stack(layout, weight, bias, x.device))
    if dtype not in (x.dtype, torch.float32):
        raise ArgumentError(f"dtype must be that of x, {x.dtype}, or float32, got {dtype}")
    return x, rows, offsets, weight, bias, dtype


def read_experts(
    layout: Layout, arguments: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Stack, Stack, str, float, float]:
    x, ids, weights, *rest = arguments
    *both, activation, alpha, limit = rest
    half, end = len(both) // 2, len(layout.buffers)
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"x must be float32, bfloat16 or float16 [T, H], got {describe(x)}")
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ArgumentError(f"ids must be int64 [T, k] with T={x.shape[0]}, got {describe(ids)}")
    if weights.dtype not in FLOAT_DTYPES or weights.shape != ids.shape:
        raise ArgumentError(f"weights must be floating {list(ids.shape)} like ids, got {describe(weights)}")
    if not 0 <= activation < len(ACTIVATIONS):
        raise ArgumentError(f"activation must be 0 to {len(ACTIVATIONS) - 1}, got {activation}")
    name = ACTIVATIONS[activation]
    up_weight, up_bias = _read(layout, both[:half], x.shape[1])
    width = up_weight.out_features // (1 if name.endswith("_ungated") else 2)
    down_weight, down_bias = _read(layout, both[half:], width)
    counts = [check_stack(layout, w, b, x.device) for w, b in ((up_weight, up_bias), (down_weight, down_bias))]
    if counts[0] != counts[1] or up_weight.out_features != width * (1 if name.endswith("_ungated") else 2):
        raise ArgumentError(
            f"up and down must be of the same experts and of one width, got {counts} experts, width {width}"
        )
    stacks = []
    for part, columns in ((both[:half], x.shape[1]), (both[half:], width)):
        buffers = {b.name: t for b, t in zip(layout.buffers, part, strict=False)}
        stacks.append(Stack(buffers, part[end], part[end + 1 :], columns))
    return x, ids, weights, stacks[0], stacks[1], name, alpha, limit


# --- plain PyTorch --------------------------------------------------------------------------------------------------------


def expert_of(layout: Layout, weight: Weight, expert: int) -> Weight:
    """One expert of a stack."""
    buffers = []
    for buffer in layout.buffers:
        t: Tensor | None = weight.value(buffer.name)
        own = t is not None and (buffer.tiled or (buffer.name == "k_order" and t.dim() == 2))
        buffers.append(t[expert] if t is not None and own else t)
    numbers = [weight.value(number.name) for number in layout.numbers]
    return weight_from_buffers(layout, buffers, numbers, weight.in_features)


def _gemm(layout: Layout, *arguments: Any) -> Tensor:
    """One expert after the other is dequantized, those that have rows."""
    x, rows, offsets, weight, bias, dtype = read_gemm(layout, arguments)
    y = x.new_zeros((rows.shape[0], weight.out_features), dtype=torch.float32)
    for expert, part in _parts(offsets, rows.shape[0]):
        one = expert_of(layout, weight, expert)
        of_one = None if bias is None else bias[expert]
        y[part] = reference.unpacked_product(layout, x[rows[part]], one, of_one, torch.float32)
    return y.to(dtype)


def _parts(offsets: Tensor, total: int) -> list[tuple[int, slice]]:
    """The experts that have rows, with them; offsets come from outside and are clamped."""
    ends = [min(max(end, 0), total) for end in offsets.tolist()]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(ends)) if b > a]


def _experts(layout: Layout, *arguments: Any) -> Tensor:
    x, ids, weights, up, down, activation, alpha, limit = read_experts(layout, arguments)
    between = partial(activate, activation, alpha=alpha, limit=limit)
    return block((layout.name, layout.name), x, ids, weights, up, down, between)


def _gradient_op(
    layout: Layout, dy: Tensor, rows: Tensor, offsets: Tensor, tokens: int, in_features: int, *rest: Any
) -> Tensor:
    """dx = dy W, fp32 `[T, K]`, one expert at a time."""
    weight, _ = _read(layout, rest, in_features)
    check_stack(layout, weight, None, dy.device)
    dx = dy.new_zeros((tokens, in_features), dtype=torch.float32)
    for expert, part in _parts(offsets, rows.shape[0]):
        dx.index_add_(0, rows[part], schema.gradient_of_x(layout, expert_of(layout, weight, expert), dy[part]))
    return dx


# --- definitions ----------------------------------------------------------------------------------------------------------


class Ops(NamedTuple):
    """The ops of a layout."""

    gemm: Callable[..., Tensor]
    gradient: Callable[..., Tensor]
    experts: Callable[..., Tensor]


OPS: dict[str, Ops] = {}


def _fake_gemm(layout: Layout, *arguments: Any) -> Tensor:
    x, rows, _, weight, _, dtype = read_gemm(layout, arguments)
    return x.new_empty((rows.shape[0], weight.out_features), dtype=dtype)


def _fake_gradient(
    layout: Layout, dy: Tensor, rows: Tensor, offsets: Tensor, tokens: int, in_features: int, *_: Any
) -> Tensor:
    return dy.new_empty((tokens, in_features), dtype=torch.float32)


def _fake_experts(layout: Layout, *arguments: Any) -> Tensor:
    x, _, _, _, down, *_ = read_experts(layout, arguments)
    return x.new_empty((x.shape[0], int(down.numbers[0])))


def _save(layout: Layout, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows, offsets, *rest, _ = inputs
    end = len(layout.buffers)
    ctx.save_for_backward(rows, offsets, *rest[:end])
    ctx.numbers, ctx.shape, ctx.x_dtype = rest[end + 1 :], x.shape, x.dtype
    ctx.bias = None if rest[end] is None else (rest[end].shape, rest[end].dtype)


def _backward(layout: Layout, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    rows, offsets, *buffers = ctx.saved_tensors
    tokens, in_features = ctx.shape
    names = tuple(_gemm_types(layout))
    wanted = dict(zip(names, ctx.needs_input_grad, strict=True))
    found: dict[str, Tensor] = {}
    if wanted["x"]:
        dx = OPS[layout.name].gradient(dy, rows, offsets, tokens, in_features, *buffers, None, *ctx.numbers)
        found["x"] = dx.to(ctx.x_dtype)
    if wanted["bias"]:
        (experts_, N), dtype = ctx.bias
        place = torch.arange(rows.shape[0], device=dy.device)
        owner = torch.searchsorted(offsets[1:], place, right=True)
        sums = dy.new_zeros((experts_ + 1, N), dtype=torch.float32).index_add(0, owner, dy.float())
        found["bias"] = sums[:experts_].to(dtype)
    return tuple(found.get(name) for name in names)


def _define(layout: Layout) -> None:
    def define(kind: str, types: dict[str, str], fake: Callable[..., Tensor], run: Callable[..., Tensor]) -> Any:
        name = f"{kind}_{layout.name}"
        defined = schema.define_op(name, schema_of(types), partial(fake, layout))
        backend = BACKENDS[layout.backend]
        if backend.device is None or kind == "grouped_gradient":
            schema.LIBRARY.impl(name, partial(run, layout), "CompositeExplicitAutograd")
            return defined
        if backend.device == "cuda":
            schema.LIBRARY.impl(name, partial(schema.needs_cuda, name), "CPU")
        if not backend.built():
            schema.LIBRARY.impl(name, partial(schema.not_built, name, backend), backend.device.upper())
        return defined

    OPS[layout.name] = Ops(
        define("grouped_gemm", _gemm_types(layout), _fake_gemm, _gemm),
        define("grouped_gradient", _gradient_types(layout), _fake_gradient, _gradient_op),
        define("experts", _experts_types(layout), _fake_experts, _experts),
    )
    register_autograd(
        f"qkernels::grouped_gemm_{layout.name}", partial(_backward, layout), setup_context=partial(_save, layout),
        lib=schema.LIBRARY,
    )  # fmt: skip


for _layout in LAYOUTS.values():
    if _layout.grouped:
        _define(_layout)
