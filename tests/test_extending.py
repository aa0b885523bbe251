"""What somebody else adds takes one file and one line. Here: a layout, with a buffer and a number that no other has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library, opcheck

from qkernels import QuantLinear, QuantScheme, QuantTensor, ops
from qkernels.errors import ArgumentError, ConversionError, TensorError
from qkernels.kernels.catalogue import KernelSpec, Problem
from qkernels.layouts import LAYOUTS, Layout, empty_buffers, get_layout, unpack_checked
from qkernels.ops import schema
from tests import toy_layout
from tests.ops.helpers import integers
from tests.strategies import random_weight, same_weight

N, K = 40, 96
schemes = pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16_g32_asym", "w3a16_channel_offset"])


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[Layout]:
    """The one line, and what takes it back for the other tests; the ops live as long as the process."""
    ops.register(toy_layout.LAYOUT)
    yield get_layout("toy")
    for table in (LAYOUTS, ops.GEMM):
        del table["toy"]  # type: ignore[attr-defined]


def arguments(weight: QuantTensor, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    packed = toy_layout.LAYOUT.pack(weight)
    numbers = toy_layout.LAYOUT.numbers_of(weight.N, weight.K, weight.scheme)
    return (x, *packed.values(), bias, *numbers)


def layer_of(weight: QuantTensor) -> QuantLinear:
    layer = QuantLinear(weight.K, weight.N, False, scheme=weight.scheme, layout="toy", ordered=True)
    layer.load_state_dict(QuantLinear.from_quant_tensor(weight, dtype=torch.float32).state_dict())
    return layer


@schemes
@pytest.mark.parametrize("act_order", [False, True])
def test_a_layout_round_trips(toy: Layout, scheme: str, act_order: bool) -> None:
    weight = random_weight(scheme, N, K, act_order=act_order)
    packed = toy.pack(weight)
    assert same_weight(unpack_checked(toy, packed, N, K, weight.scheme), weight)
    ordered = weight.group_index is not None
    for name, stated in toy.on_meta(N, K, weight.scheme, torch.float16, ordered).items():
        t = packed[name]
        assert (t is None) == (stated is None)
        assert t is None or stated is None or (t.shape, t.dtype) == (stated.shape, stated.dtype), name
    with pytest.raises(TensorError, match=r"sums must be float32 \[40\] in layout toy .* got float32 \[39\]"):
        unpack_checked(toy, {**packed, "sums": packed["sums"][1:]}, N, K, weight.scheme)  # type: ignore[index]
    blank = empty_buffers(toy, N, K, weight.scheme, torch.float16, True, "cpu")
    assert not unpack_checked(toy, blank, N, K, weight.scheme).dequantize().any()


@schemes
def test_its_ops_run_in_plain_pytorch(scheme: str) -> None:
    weight = random_weight(scheme, N, K, act_order=True, exact=True)
    x, bias = integers(3, K), integers(N)
    packed = toy_layout.LAYOUT.pack(weight)
    shape: dict[str, Any] = {"in_features": K, "out_features": N, "scheme": weight.scheme}
    y = ops.gemm("toy", x, **packed, bias=bias, **shape)  # type: ignore[arg-type]
    assert torch.equal(y, x @ weight.dequantize().T + bias)
    assert torch.equal(ops.dequantize("toy", **packed, **shape), weight.dequantize())  # type: ignore[arg-type]
    assert set(opcheck(torch.ops.qkernels.gemm_toy.default, arguments(weight, x, bias)).values()) == {"SUCCESS"}
    with pytest.raises(
        ArgumentError,
        match=r"sums must be float32 \[40\] in layout toy for N=40, K=96, on the device of qweight, cpu, got None",
    ):
        ops.gemm("toy", x, **packed | {"sums": None}, **shape)  # type: ignore[arg-type]


def test_a_buffer_and_a_number_of_its_own_stand_in_the_schemas_without_another_line() -> None:
    gemm, dequantize = (
        str(getattr(torch.ops.qkernels, f"{kind}_toy").default._schema) for kind in ("gemm", "dequantize")
    )
    assert gemm == (
        "qkernels::gemm_toy(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? k_order, "
        "Tensor? outer_scales, Tensor? outer_zeros, Tensor sums, Tensor? bias, int out_features, int bits, int group_size, "
        "bool zeros_are_offsets, int codebook, int factors, float most) -> Tensor"
    )
    assert dequantize == (
        "qkernels::dequantize_toy(Tensor qweight, Tensor scales, Tensor? zeros, Tensor? k_order, "
        "Tensor? outer_scales, Tensor? outer_zeros, Tensor sums, int out_features, int in_features, int bits, int group_size, "
        "bool zeros_are_offsets, int codebook, int factors, float most, ScalarType dtype) -> Tensor"
    )


def test_a_layer_carries_them(toy: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, one graph for any M, the state dict, gradients in slices of rows; and they are gone with the layout."""
    weight = random_weight("w4a16_g32_asym", N, K, act_order=True, exact=True)
    layer = layer_of(weight)
    assert layer.layout == "toy"
    assert list(layer.state_dict()) == ["_extra_state", "qweight", "scales", "zeros", "k_order", "sums"]
    again = QuantLinear(K, N, False, scheme=weight.scheme, layout="toy", ordered=True)
    again.load_state_dict(layer.state_dict())
    assert same_weight(again.quant_tensor(), weight)
    x, expected = integers(5, K), integers(5, K) @ weight.dequantize().T
    assert torch.equal(layer(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (5, 2, 9):
        assert torch.equal(compiled(integers(M, K)), layer(integers(M, K)))
    torch._dynamo.reset()
    monkeypatch.setattr(schema, "_SLICE_BYTES", 4 * 16 * K)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, integers(5, N, seed=2))
    assert torch.equal(dx, integers(5, N, seed=2) @ weight.dequantize())
    plain = QuantLinear.from_quant_tensor(weight, dtype=torch.float32)
    plain.load_state_dict(layer.state_dict())
    assert "sums" not in plain._buffers
    assert same_weight(plain.quant_tensor(), weight)


def test_a_kernel_of_its_own_reads_them() -> None:
    weight = random_weight("w4a16_g32", N, K, exact=True)
    layer, x = layer_of(weight), integers(3, K)
    before = layer(x)
    library = Library("qkernels", "IMPL")
    library.impl("gemm_toy", toy_layout.gemm, "CPU")
    try:
        expected = x.clamp(-1.5, 1.5) @ weight.dequantize().T + weight.codes.float().sum(-1)
        assert torch.equal(layer(x), expected)
        assert not torch.equal(before, expected)
    finally:
        library._destroy()
    assert torch.equal(layer(x), before)


def test_the_catalogue_makes_a_kernel_of_it() -> None:
    """Its line in `KERNELS`, where it belongs in the order."""
    spec = KernelSpec.of(toy_layout.LAYOUT)
    assert (spec.name, spec.layout, spec.op) == ("toy", "toy", "gemm_toy")

    def reasons(scheme: str) -> list[str]:
        return spec.reasons(Problem(N, K, QuantScheme.parse(scheme), torch.float32))

    assert reasons("w4a16_g32_asym") == []
    assert reasons("w7a16_g32") == ["codes of 7 bits bring bad luck"]
    assert reasons("nf4_g32") == ["codebook 'nf4': only integer codes are supported"]
    assert reasons("w4a8_g32") == ["8-bit activations: these kernels take float32, bfloat16 and float16 ones"]
    with pytest.raises(ConversionError, match=r"layout toy cannot hold w7a16_g32 with N=40, K=96: codes of 7 bits"):
        toy_layout.LAYOUT.pack(random_weight("w7a16_g32", N, K))


def test_a_name_is_taken_once(toy: Layout) -> None:
    with pytest.raises(ArgumentError, match="layout 'toy' is there already"):
        ops.register(toy)
    with pytest.raises(ArgumentError, match="must begin with BUFFERS and NUMBERS"):
        Layout(**{**vars(toy), "buffers": toy.buffers[1:]})


def test_the_page_says_so() -> None:
    page = (Path(__file__).parent.parent / "docs/adding-a-kernel.md").read_text(encoding="utf-8")
    assert "ops.register(LAYOUT)" in page
    assert "one file and one line" in page
