"""What makes a kernel a torch op: opcheck, compile, export, fake tensors, gradients, and errors that name what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import Library, opcheck, register_fake

from qkernels import QuantScheme, QuantTensor, extension, ops
from qkernels.errors import ArgumentError
from qkernels.kernels.catalogue import KERNELS, REFERENCES, Problem
from qkernels.layouts import BUFFERS, LAYOUTS, get_layout
from qkernels.ops import schema
from tests.ops.helpers import DTYPES, arguments, dequantize_arguments, integers
from tests.strategies import random_weight

N, K = 40, 96
# The layouts whose kernels run on this machine's CPU; tests/cuda has the others.
SMALL = Problem(64, 64, QuantScheme.parse("w4a16_g32"), torch.float32)
NAMES = [kernel.layout for kernel in (*REFERENCES, *KERNELS) if not kernel.reasons(SMALL)]
layouts = pytest.mark.parametrize("layout", NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
compiled = pytest.mark.skipif(not extension.status().isas, reason=f"no compiled extension: {extension.status().error}")


def operator(name: str) -> Any:
    return getattr(torch.ops.qkernels, name).default


def front(layout: str, weight: QuantTensor) -> Callable[..., Tensor]:
    """`ops.gemm` with everything but x and bias filled in."""
    buffers = get_layout(layout).pack(weight)

    def run(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.gemm(
            layout, x, **buffers, bias=bias, in_features=weight.K, out_features=weight.N, scheme=weight.scheme  # type: ignore[arg-type]
        )  # fmt: skip

    return run


# --- registration -----------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16_g32_asym", "w4a16_g32_offset", "w3a16_channel_fzero"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(layout: str, scheme: str, grad: bool) -> None:
    weight = random_weight(scheme, N, K, act_order=grad)
    for M, bias in [(1, None), (5, integers(N).requires_grad_(grad))]:
        args = arguments(weight, integers(M, K).requires_grad_(grad), bias, layout)
        result = opcheck(operator(f"gemm_{layout}"), args)
        assert set(result.values()) == {"SUCCESS"}, result
    if get_layout(layout).gemv_tokens is not None:
        args = arguments(weight, integers(3, K).requires_grad_(grad), None, layout)
        assert set(opcheck(operator(f"gemv_{layout}"), args).values()) == {"SUCCESS"}


@layouts
def test_opcheck_of_dequantize(layout: str) -> None:
    weight = random_weight("w4a16_g32_asym", N, K, act_order=True)
    args = dequantize_arguments(weight, torch.bfloat16, layout)
    assert set(opcheck(operator(f"dequantize_{layout}"), args).values()) == {"SUCCESS"}


def test_opcheck_notices_wrong_fakes() -> None:
    """Negative control: a transposed shape, and another dtype."""
    library = Library("qkernels_planted", "DEF")
    wrong: dict[str, Callable[[Tensor], Tensor]] = {
        "shape": lambda x: x.new_empty(x.shape[1], x.shape[0]),
        "dtype": lambda x: torch.empty_like(x, dtype=torch.float16),
    }
    for name, fake in wrong.items():
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, lambda x: x * 2, "CPU")
        register_fake(f"qkernels_planted::{name}", fake, lib=library)
        planted = getattr(torch.ops.qkernels_planted, name).default
        result = opcheck(planted, (torch.randn(2, 3),), raise_exception=False)
        assert any(outcome != "SUCCESS" for outcome in result.values()), name


# Made from `Layout.buffers` and `Layout.numbers`; what implements them in C++ goes by position.
PRODUCT = (
    "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? k_order, Tensor? outer_scales, Tensor? outer_zeros, {}"
    "Tensor? bias, int out_features, int bits, int group_size, bool zeros_are_offsets, int codebook, int factors) -> Tensor"
)
DEQUANTIZE = (
    "(Tensor qweight, Tensor scales, Tensor? zeros, Tensor? k_order, Tensor? outer_scales, Tensor? outer_zeros, {}"
    "int out_features, int in_features, int bits, int group_size, bool zeros_are_offsets, int codebook, int factors, "
    "ScalarType dtype) -> Tensor"
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_schemas_are_the_same_for_all_layouts(layout: str) -> None:
    own = "".join(f"Tensor{'?' * b.optional} {b.name}, " for b in get_layout(layout).buffers[len(BUFFERS) :])
    static = "Tensor? x_static, " if layout.endswith("_a8") else ""
    assert own == ("Tensor? table, " if layout == "kpack" else static)
    product, dequantize = PRODUCT.format(own), DEQUANTIZE.format(own)
    if layout.endswith("_a8"):
        product, dequantize = (s.replace("int factors", "int factors, int act") for s in (product, dequantize))
    assert str(operator(f"gemm_{layout}")._schema) == f"qkernels::gemm_{layout}{product}"
    assert str(operator(f"dequantize_{layout}")._schema) == f"qkernels::dequantize_{layout}{dequantize}"
    if get_layout(layout).gemv_tokens is not None:
        assert str(operator(f"gemv_{layout}")._schema) == f"qkernels::gemv_{layout}{product}"


# --- tracing ----------------------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_serves_every_number_of_tokens(layout: str, grad: bool) -> None:
    run = front(layout, random_weight("w4a16_g32_asym", N, K, act_order=True, exact=True))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    traced = torch.compile(lambda x: run(x * 2) + 1, fullgraph=True, dynamic=True, backend=backend)
    for M in (5, 2, 8, 9, 64):  # not 2 first: sizes that are equal then (2 tiles) are taken to be equal always
        x = integers(M, K).requires_grad_(grad)
        assert torch.equal(traced(x), run(x * 2) + 1)
    assert len(graphs) == 1
    assert f"qkernels.gemm_{layout}" in graphs[0].code
    torch._dynamo.reset()
    through_autograd = torch.compile(lambda x: run(x * 2), fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (5, 2, 9):
        x, y = integers(M, K).requires_grad_(grad), integers(M, K).requires_grad_(grad)
        assert torch.equal(through_autograd(x), run(y * 2))
        if grad:
            through_autograd(x).sum().backward()
            run(y * 2).sum().backward()
            assert x.grad is not None
            assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    torch._dynamo.reset()


@layouts
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_tokens(layout: str, strict: bool) -> None:
    run = front(layout, random_weight("w4a16_g32", N, K, exact=True))

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(x)

    dim = torch.export.Dim("M", min=2, max=1024)
    program = torch.export.export(Model(), (integers(3, K),), dynamic_shapes={"x": {0: dim}}, strict=strict)
    assert f"qkernels.gemm_{layout}" in str(program.graph)
    for M in (2, 7, 33):
        assert torch.equal(program.module()(integers(M, K)), run(integers(M, K)))


@layouts
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(layout: str, device: str) -> None:
    """Shapes without memory and without the device."""
    real = arguments(random_weight("w4a16_g32", N, K), integers(5, K, dtype=torch.bfloat16), None, layout)
    with FakeTensorMode():
        args = [torch.empty(a.shape, dtype=a.dtype, device=device) if isinstance(a, Tensor) else a for a in real]
        y = operator(f"gemm_{layout}")(*args)
        assert (list(y.shape), y.dtype, y.device.type) == ([5, N], torch.bfloat16, device)
        args[1] = torch.empty(3, 3, dtype=torch.uint8, device=device)
        with pytest.raises(ArgumentError, match="qweight must be uint8"):
            operator(f"gemm_{layout}")(*args)


@layouts
def test_meta_tensors(layout: str) -> None:
    real = arguments(random_weight("w4a16_g32", N, K), integers(5, K), integers(N), layout)
    y = operator(f"gemm_{layout}")(*(a.to("meta") if isinstance(a, Tensor) else a for a in real))
    assert (list(y.shape), y.device.type) == ([5, N], "meta")


# --- gradients --------------------------------------------------------------------------------------------------------------


@layouts
@dtypes
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16_g32_asym", "w4a16_channel_offset"])
def test_gradients_of_x_and_bias(layout: str, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx = dy W and dbias = sum(dy), exact on integers; the weight is dequantized in slices of 32 rows here."""
    monkeypatch.setattr(schema, "_SLICE_BYTES", 4 * 32 * K)
    rows = 70
    weight = random_weight(scheme, rows, K, act_order=scheme == "w8a16_g32_asym", exact=True)
    run = front(layout, weight)
    x, bias = integers(6, K, dtype=dtype).requires_grad_(), integers(rows, dtype=dtype).requires_grad_()
    dy = integers(6, rows, dtype=dtype, seed=2)
    dx, dbias = torch.autograd.grad(run(x, bias), (x, bias), dy)
    assert torch.equal(dx, (dy.float() @ weight.dequantize()).to(dtype))
    assert torch.equal(dbias, dy.float().sum(0).to(dtype))
    (only_bias,) = torch.autograd.grad(run(x.detach(), bias), bias, dy)
    assert torch.equal(only_bias, dbias)
    assert not run(x.detach(), bias.detach()).requires_grad
    with torch.no_grad():
        assert not run(x, bias).requires_grad


@layouts
def test_gradients_flow_through_a_frozen_layer_to_an_adapter(layout: str) -> None:
    """Two backward passes deep, as gradient penalties need: dx is linear in dy."""
    run = front(layout, random_weight("w4a16_g32", N, K))
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (dx,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert second.abs().sum() > 0


# --- arguments --------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"x": torch.zeros(3, K, dtype=torch.float64)},
        "x must be float32, bfloat16 or float16 [M, K], got float64 [3, 96]",
    ),
    ({"x": torch.zeros(K)}, "x must be [M, K] with K = in_features = 96, got [96]"),
    ({"x": torch.zeros(3, K + 1)}, "x must be [M, K] with K = in_features = 96, got [3, 97]"),
    ({"qweight": torch.zeros(2, 7, dtype=torch.uint8)}, "qweight must be uint8 ["),
    ({"scales": torch.zeros(3)}, "scales must be floating ["),
    ({"zeros": None}, "zeros must be given for w4a16_g32_asym"),
    ({"zeros": torch.zeros(3, dtype=torch.uint8)}, "zeros must be uint8 or floating ["),
    ({"k_order": torch.zeros(K)}, "k_order must be None or int32 [K] = [96], got float32 [96]"),
    ({"k_order": torch.zeros(3, dtype=torch.int32)}, "k_order must be None or int32 [K] = [96], got int32 [3]"),
    ({"bias": torch.zeros(N + 1)}, "bias must be None or floating [N] = [40], got float32 [41]"),
    ({"bias": torch.zeros(N, dtype=torch.int32)}, "bias must be None or floating [N] = [40], got int32 [40]"),
    ({"bias": torch.zeros(N, device="meta")}, "bias must be on the device of x, cpu, got meta"),
    ({"out_features": N + 100, "bias": None}, "qweight must be uint8 ["),
    ({"scheme": QuantScheme(4, 32)}, "zeros must be None for w4a16_g32"),
    ({"scheme": QuantScheme(4, 48, "int")}, "scales must be floating ["),
]


@layouts
@pytest.mark.parametrize(("change", "message"), WRONG, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(WRONG)])
def test_wrong_arguments_are_named(layout: str, change: dict[str, Any], message: str) -> None:
    weight = random_weight("w4a16_g32_asym", N, K)
    right: dict[str, Any] = {
        **get_layout(layout).pack(weight), "x": torch.zeros(3, K), "bias": torch.zeros(N),
        "in_features": K, "out_features": N, "scheme": weight.scheme,
    }  # fmt: skip
    ops.gemm(layout, **right)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        ops.gemm(layout, **right | change)


@layouts
def test_stacked_experts_are_refused(layout: str) -> None:
    weight = random_weight("w4a16_g32_asym", N, K, experts=(2,))
    with pytest.raises(ArgumentError, match="stacked experts are not taken here, got uint8"):
        front(layout, weight)(torch.zeros(3, K))


def test_unknown_layouts_and_too_many_tokens_are_named() -> None:
    weight = random_weight("w4a16_g32", N, K)
    rest: dict[str, Any] = {"in_features": K, "out_features": N, "scheme": weight.scheme}
    tiles, plain = get_layout("cpu_tile_a16").pack(weight), get_layout("reference").pack(weight)
    with pytest.raises(ArgumentError, match=f"layout must be one of {', '.join(LAYOUTS)}, got 'tiles'"):
        ops.gemm("tiles", torch.zeros(1, K), **tiles, **rest)  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentError, match="gemv takes layout cpu_tile_a16 or .*mma_tile.*, got 'reference'; call gemm"
    ):
        ops.gemv("reference", torch.zeros(1, K), **plain, **rest)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"gemv_cpu_tile_a16 takes M <= 8 rows of x, got 9; call gemm_cpu_tile_a16"):
        ops.gemv("cpu_tile_a16", torch.zeros(9, K), **tiles, **rest)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="qweight must be uint8"):
        ops.dequantize("reference", **tiles, **rest)  # type: ignore[arg-type]


@layouts
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w8a16_channel", "w2a16_g16_offset"])
def test_dequantize_is_the_definition(layout: str, scheme: str) -> None:
    weight = random_weight(scheme, N, K, act_order=True, experts=(2,))
    buffers = get_layout(layout).pack(weight)
    for dtype in DTYPES:
        w = ops.dequantize(
            layout, **buffers, in_features=K, out_features=N, scheme=weight.scheme, dtype=dtype  # type: ignore[arg-type]
        )  # fmt: skip
        assert torch.equal(w, weight.dequantize(dtype))


@compiled
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, K, dtype=torch.float64), "x must be float32, bfloat16 or float16"),
        (0, torch.zeros(3, 2 * K), "qweight must be contiguous uint8"),
        (1, torch.zeros(2, 1536, dtype=torch.int8), "qweight must be contiguous uint8"),
        (1, torch.zeros(1536, 2, dtype=torch.uint8).T, "qweight must be contiguous uint8"),
        (2, torch.zeros(2, 3, 32, dtype=torch.float64), "scales must be contiguous floating"),
        (2, torch.zeros(2, 3, 31), "scales must be contiguous floating"),
        (3, torch.zeros(2, 3, 32, dtype=torch.int8), "zeros must be contiguous uint8 or floating"),
        (4, torch.zeros(K, dtype=torch.int64), "k_order must be contiguous int32"),
        (4, torch.zeros(K - 1, dtype=torch.int32), "k_order must be contiguous int32"),
        (7, torch.zeros(N + 1), "bias must be floating"),
        (8, -1, "out_features not negative"),
        (9, 9, "bits must be 2 to 8"),
        (10, 0, "group_size positive"),
        (10, 12, "group_size must be a multiple of 8"),
        (11, True, "zeros must be contiguous floating"),
        (12, 1, "codebook 1 takes 4 bits and no zeros, got bits=4 and zeros"),
        (12, 99, "codebook must be 0 to 6, got 99"),
        (13, 9, "factors must be 0 to 7, got 9"),
    ],
)
def test_the_compiled_op_checks_for_itself(position: int, value: Any, message: str) -> None:
    """Called directly, it must never read outside its buffers."""
    args = list(arguments(random_weight("w4a16_g32_asym", N, K), torch.zeros(3, K)))
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        operator("gemm_cpu_tile_a16")(*args)


@compiled
def test_the_decode_op_refuses_more_tokens() -> None:
    args = arguments(random_weight("w4a16_g32", N, K), torch.zeros(9, K))
    with pytest.raises(RuntimeError, match="gemv_cpu_tile_a16 takes M <= 8 rows of x"):
        operator("gemv_cpu_tile_a16")(*args)
