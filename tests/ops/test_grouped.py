"""`grouped_gemm` and `experts` of the CPU: the bits of the dense products, whatever the rows, the schemes and the threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import HQQ, NF4, RTN, QuantTensor, extension, ops
from qkernels.errors import ArgumentError
from qkernels.layouts import get_layout
from qkernels.ops import grouped
from qkernels.ops.grouped import Stack
from qkernels.scheme import ACTIVATIONS, QuantScheme

E, N, K = 5, 72, 88


def stack(
    scheme: str, layout: str, n: int = N, k: int = K, bias: bool = False, count: int = E
) -> tuple[Stack, list[QuantTensor]]:
    torch.manual_seed(5)
    parsed = QuantScheme.parse(scheme)
    method: Any = NF4() if parsed.codebook == "nf4" else HQQ() if parsed.zeros == "float" else RTN()
    weights = [method.with_scheme(scheme).quantize(torch.randn(n, k)) for _ in range(count)]
    value = get_layout(layout)
    packed = value.pack(QuantTensor.stack(weights))
    numbers = value.numbers_of(n, k, parsed)
    return Stack(packed, torch.randn(count, n) if bias else None, numbers, k), weights


def dense(layout: str, x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    value = get_layout(layout)
    return ops.gemm(
        layout, x, **value.pack(weight), bias=bias, in_features=weight.K, out_features=weight.N, scheme=weight.scheme
    )


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


LAYOUT = {name: "cpu_tile_a8" if activation.integers else "cpu_tile_a16" for name, activation in ACTIVATIONS.items()}
SCHEMES = [
    "w4a16_g8",
    "w4a16_g24_asym",
    "w3a16_g16",
    "w8a16_channel",
    "w5a16_g8_asym",
    "w4a16_g8_fzero",
    "nf4_g8",
    "w4a8_g8",
    "w2a8_g8_asym",
    "w8a8z_channel_asym",
    "w4a8z_g8",
    "w8a8o6_channel",
    "w4a8o6_g8_fzero",
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("counts", [[1, 0, 3, 9, 0], [0, 70, 2, 0, 131], [0, 0, 0, 0, 0]], ids=["few", "many", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_bits_of_the_dense_product(scheme: str, counts: list[int], dtype: torch.dtype) -> None:
    layout = LAYOUT[QuantScheme.parse(scheme).act]
    experts, weights = stack(scheme, layout, bias=True)
    T, R = 11, sum(counts) + 2  # the last two rows are of no expert
    x, rows, offsets = 2 * torch.randn(T, K).to(dtype), torch.randint(T, (R,)), offsets_of(counts)  # some beyond 6
    y = grouped.grouped_gemm(layout, x, rows, offsets, experts, dtype)
    assert y.dtype == dtype
    assert experts.bias is not None
    for e, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        assert torch.equal(y[begin:end], dense(layout, x[rows[begin:end]], weights[e], experts.bias[e]))
    assert not y[-2:].any()
    wide = grouped.grouped_gemm(layout, x, rows, offsets, experts, torch.float32)
    assert torch.equal(wide.to(dtype), y)


@pytest.mark.parametrize("activation", grouped.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["cpu_tile_a16", "cpu_tile_a8", "reference", "reference_a8"])
def test_a_block_is_what_its_products_are(activation: str, layout: str) -> None:
    scheme = "w4a8_g8" if layout.endswith("a8") else "w4a16_g8"
    width = 40
    up, _ = stack(scheme, layout, width * (1 if activation.endswith("_ungated") else 2), 48, bias=True)
    down, _ = stack(scheme, layout, 48, width, bias=True)
    x, ids = torch.randn(13, 48) * 3, torch.stack([torch.randperm(E + 2)[:3] for _ in range(13)])
    ids[4, 1] = -1
    weights = torch.rand(13, 3, dtype=torch.float64).float()
    got = grouped.experts(layout, x, ids, weights, up, down, activation, 1.702, 7.0)
    between = lambda halves: grouped.activate(activation, halves, 1.702, 7.0)  # noqa: E731
    expected = grouped.block((layout, layout), x, ids, weights, up, down, between)
    if layout.endswith("a8"):  # a rounding of exp may move an activation across a step of int8
        assert float((got - expected).norm()) <= 2e-3 * float(expected.norm())
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    nobody = torch.full_like(ids, E)
    assert not grouped.experts(layout, x, nobody, weights * torch.nan, up, down, activation, 1.702, 7.0).any()


@pytest.mark.parametrize("activation", grouped.ACTIVATIONS)
def test_a_block_of_int8_has_the_bits_of_the_scalar_code(isa: str, activation: str) -> None:
    """What lies between and after the products is rounded operation by operation, whatever the vectors: widths beside whole
    ones and beyond a piece, numbers that overflow exp, NaN, places that no expert has."""
    width = 293
    up, _ = stack("w4a8_g8", "cpu_tile_a8", width * (1 if activation.endswith("_ungated") else 2), 48, bias=True)
    down, _ = stack("w4a8_g8", "cpu_tile_a8", 265, width, bias=True)
    x, ids, weights = torch.randn(9, 48), torch.randint(-1, E + 1, (9, 3)), torch.rand(9, 3)
    x[:, 0] *= torch.tensor([1e-3, 1.0, 9.0, 90.0, 900.0, 1e30, 1.0, 1.0, 1.0])
    x[7, 3] = torch.nan
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = ("cpu_tile_a8", x.to(dtype), ids, weights, up, down, activation, 1.702, 7.0)
        got = grouped.experts(*arguments)
        extension.use_isa("scalar")
        try:
            expected = grouped.experts(*arguments)
        finally:
            extension.use_isa(isa)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", ["w4a16_g8", "w4a8_g8", "w4a8z_g8", "w8a8o6_channel"])
def test_the_same_bits_with_any_number_of_threads(scheme: str) -> None:
    layout = LAYOUT[QuantScheme.parse(scheme).act]
    up, _ = stack(scheme, layout, 80, 48)
    down, _ = stack(scheme, layout, 48, 40)
    x, ids, weights = 2 * torch.randn(90, 48).bfloat16(), torch.randint(E, (90, 4)), torch.rand(90, 4)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [grouped.experts(layout, x, ids, weights, up, down, "silu") for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_a_row_does_not_hang_on_its_neighbours() -> None:
    up, _ = stack("w4a16_g8", "cpu_tile_a16", 80, 48)
    down, _ = stack("w4a16_g8", "cpu_tile_a16", 48, 40)
    x, ids, weights = torch.randn(150, 48), torch.randint(E, (150, 2)), torch.rand(150, 2)
    together = grouped.experts("cpu_tile_a16", x, ids, weights, up, down, "silu")
    for t in (0, 77, 149):
        alone = grouped.experts("cpu_tile_a16", x[t : t + 1], ids[t : t + 1], weights[t : t + 1], up, down, "silu")
        assert torch.equal(alone[0], together[t])


def test_infinite_products_are_summed_again_on_the_rows_they_have() -> None:
    """x = 1e36 overflows in sums of codes: the dense product is then made once more, of x itself."""
    experts, weights = stack("w4a16_channel", "cpu_tile_a16")
    x = torch.randn(3, K)
    x[1] *= 3e36
    rows, offsets = torch.tensor([2, 1, 0]), offsets_of([0, 0, 3, 0, 0])
    y = grouped.grouped_gemm("cpu_tile_a16", x, rows, offsets, experts, torch.float32)
    assert torch.equal(y, dense("cpu_tile_a16", x[rows], weights[2], None))


def test_one_order_of_columns_for_all_experts() -> None:
    torch.manual_seed(6)
    index = torch.randperm(K)[torch.arange(K)] // 8
    weights = [
        QuantTensor(w.codes, w.scales, w.zeros, index.int(), w.scheme)
        for w in (RTN(4, 8).quantize(torch.randn(N, K)) for _ in range(E))
    ]
    value = get_layout("cpu_tile_a16")
    numbers = value.numbers_of(N, K, weights[0].scheme)
    experts = Stack(value.pack(QuantTensor.stack(weights)), None, numbers, K)
    x, rows, offsets = torch.randn(6, K), torch.arange(6), offsets_of([2, 1, 0, 3, 0])
    y = grouped.grouped_gemm("cpu_tile_a16", x, rows, offsets, experts, torch.float32)
    assert torch.equal(y[3:], dense("cpu_tile_a16", x[3:], weights[3], None))


@pytest.mark.parametrize("layout", ["cpu_tile_a16", "reference"])
def test_wrong_rows_and_offsets_do_not_read_elsewhere(layout: str) -> None:
    experts, _ = stack("w4a16_g8", layout)
    x, rows = torch.randn(4, K), torch.tensor([0, 3, 1])
    for offsets in ([0, 9, -4, 2**40, 7, 3], [5, 5, 5, 5, 5, 5], [-1, 0, 1, 2, 3, 99]):
        y = grouped.grouped_gemm(layout, x, rows, torch.tensor(offsets), experts, torch.float32)
        assert y.shape == (3, N)
        assert bool(y.isfinite().all())
    if layout != "reference":  # plain indexing raises by itself
        grouped.grouped_gemm(
            layout, x, torch.tensor([10**6, -5, 0]), offsets_of([3, 0, 0, 0, 0]), experts, torch.float32
        )


def test_gradients_of_x_and_bias() -> None:
    experts, weights = stack("w4a16_g8", "cpu_tile_a16", bias=True)
    assert experts.bias is not None
    bias = experts.bias.clone().requires_grad_()
    x = torch.randn(7, K, requires_grad=True)
    rows, offsets = torch.tensor([0, 6, 6, 1, 2]), offsets_of([2, 0, 1, 1, 0])
    y = grouped.grouped_gemm("cpu_tile_a16", x, rows, offsets, experts._replace(bias=bias), torch.float32)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), dy)
    w = torch.stack([weight.dequantize() for weight in weights])
    owner = torch.tensor([0, 0, 2, 3])
    plain = torch.einsum("rnk,rk->rn", w[owner], x[rows[:4]]) + bias[owner]
    expected = torch.autograd.grad(plain, (x, bias), dy[:4])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3)}, r"rows must be int64 \[R\]"),
        ({"offsets": torch.zeros(4, dtype=torch.int64)}, r"offsets must be int64 \[E \+ 1\] = \[6\]"),
        ({"dtype": torch.float16}, "dtype must be that of x"),
        ({"x": torch.zeros(3, K, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.zeros(3, K + 8)}, "qweight must be uint8"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    experts, _ = stack("w4a16_g8", "reference")
    given: dict[str, Any] = {
        "x": torch.zeros(3, K),
        "rows": torch.arange(3),
        "offsets": offsets_of([3, 0, 0, 0, 0]),
        "dtype": torch.float32,
    }
    given |= change
    with pytest.raises((ArgumentError, RuntimeError), match=message):
        grouped.grouped_gemm("reference", given["x"], given["rows"], given["offsets"], experts, given["dtype"])


def test_opcheck() -> None:
    experts, _ = stack("w4a16_g8", "cpu_tile_a16", bias=True)
    arguments = experts.arguments(get_layout("cpu_tile_a16"))
    call = (
        torch.randn(4, K, requires_grad=True),
        torch.tensor([0, 3, 1]),
        offsets_of([1, 0, 2, 0, 0]),
        *arguments,
        torch.float32,
    )
    torch.library.opcheck(torch.ops.qkernels.grouped_gemm_cpu_tile_a16.default, call)
    up, _ = stack("w4a16_g8", "cpu_tile_a16", 80, 48)
    down, _ = stack("w4a16_g8", "cpu_tile_a16", 48, 40)
    value = get_layout("cpu_tile_a16")
    both = (*up.arguments(value), *down.arguments(value), 0, 0.0, 0.0)
    routed = (torch.randn(4, 48), torch.randint(E, (4, 2)), torch.rand(4, 2))
    torch.library.opcheck(torch.ops.qkernels.experts_cpu_tile_a16.default, (*routed, *both))
