"""Checks of every Triton kernel and format in Triton's interpreter. `test_interpreted.py` runs this file in a process of its own.

Buffers end at guard pages: an access past an end kills the process. Workspaces and results start as NaN.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from dataclasses import replace
from itertools import product as product_of
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from qkernels.kernels.triton import launch
from qkernels.kernels.triton.table import Config
from qkernels.layouts import LAYOUTS
from qkernels.layouts.tiles import GPU_PLANES
from qkernels.scheme import CODEBOOKS, FACTORS
from tests.ops.helpers import integers
from tests.strategies import random_weight

from .interpreter import guarded, repair
from .problems import BUFFERS, exact_problem, numbers

repair()

SCHEMES = [
    "w2a16_g32", "w3a16_g24_asym", "w4a16_g32", "w4a16_g16_asym", "w4a16_g64", "w4a16_g64_fzero", "w4a16_g128_offset",
    "w4a16_channel", "w5a16_g32", "w6a16_g24_asym", "w8a16_g32_asym", "w8a16_g64", "w8a16_tensor", "nf4_g64", "fp4_g32",
]  # fmt: skip
FLOATING = [
    "mxfp4_g32", "iq4nl_g32", "fp8_channel", "fp8_block128", "e5m2_g64", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs",
    "nvfp4_g16", "nvfp4m_g16",
]  # fmt: skip
DTYPES = [torch.float16, torch.bfloat16]
GEMV = Config("gemv", 1, 16, 64, 2, 4, 2)
GEMM = Config("gemm", 16, 32, 64, 2, 4, 2)
DEQUANTIZE = Config("dequantize", 1, 64, 256, 0, 4, 1)
INF, NAN = float("inf"), float("nan")
schemes = pytest.mark.parametrize("scheme", [*SCHEMES, *FLOATING])
# Each scheme with and without act-order, once in each dtype; in a full run each of both with both.
FULL = bool(os.environ.get("QKERNELS_TEST_FULL"))
ORDERS = list(product_of((False, True), DTYPES) if FULL else zip((False, True), DTYPES))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
configs = pytest.mark.parametrize("config", [GEMV, GEMM], ids=["gemv", "gemm"])


@pytest.fixture(autouse=True)
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`new_empty` ends at a guard page and holds NaN, or far too large integers: whatever a kernel leaves out shows."""

    plain = Tensor.new_empty

    def new_empty(t: Tensor, shape: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        if others or shape == 0:  # the interpreter's own, for its view of a buffer
            return plain(t, shape, dtype=dtype, **others)
        dtype = dtype or t.dtype
        return guarded(torch.full(shape, float("nan") if dtype.is_floating_point else 2**30, dtype=dtype))

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


def buffers(weight: QuantTensor) -> tuple[Tensor | None, ...]:
    packed = LAYOUTS["kpack"].pack(weight)
    return tuple(None if t is None else guarded(t) for t in (packed[n] for n in BUFFERS))


def product(x: Tensor, weight: QuantTensor, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    bias = None if bias is None else guarded(bias)
    return launch.gemm(guarded(x), *buffers(weight), bias, weight.N, *numbers(weight), config=config)


# In a full run every format in each order and dtype; else the next of them for every format.
@pytest.mark.parametrize(
    ("scheme", "act_order", "dtype"),
    [
        (scheme, *order)
        for i, scheme in enumerate((*SCHEMES, *FLOATING))
        for j, order in enumerate(ORDERS)
        if FULL or i % len(ORDERS) == j
    ],
    ids=str,
)
def test_dequantize_is_bit_identical(scheme: str, act_order: bool, dtype: torch.dtype) -> None:
    for N, K in ((70, 200), (1, 1), (64, 65)):
        weight = random_weight(scheme, N, K, act_order=act_order)
        made = launch.dequantize(*buffers(weight), N, K, *numbers(weight), dtype)
        assert torch.equal(made, weight.dequantize(dtype))


@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "q4_k", "nvfp4_g16", "mxfp4_g32"])
def test_dequantize_takes_experts_and_fp32(scheme: str) -> None:
    weight = random_weight(scheme, 40, 96, experts=(3,))
    made = launch.dequantize(*buffers(weight), 40, 96, *numbers(weight), torch.float32)
    assert torch.equal(made, weight.dequantize())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("scheme", ["mxfp4_g32", "w4a16_g32", "fp8_block128"])
def test_every_byte_of_a_scale_is_the_number_that_it_means(scheme: str, scale_dtype: torch.dtype) -> None:
    """All that are numbers, subnormals among them, over all codes."""
    parsed = QuantScheme.parse(scheme)
    length = parsed.group_length(256) if parsed.group_size != "channel" else 256
    every = torch.arange(256, dtype=torch.uint8)
    every = torch.where(every.view(scale_dtype).float().isfinite(), every, 1)
    scales = every.repeat(128 if parsed.rows > 1 else 1).view(-1, 256 // length)
    if parsed.rows > 1:
        scales = scales[: 256 * 2 : 2].repeat_interleave(parsed.rows, 0)[:256]
    codes = torch.arange(256).remainder(parsed.max_code + 1).to(torch.uint8)
    if parsed.codebook == "e4m3":
        codes[[127, 255]] = 0  # which are no numbers
    codes = codes.expand(len(scales), -1).contiguous()
    weight = QuantTensor(codes, scales.view(scale_dtype), None, None, parsed)
    for dtype in (torch.float32, torch.bfloat16):
        made = launch.dequantize(*buffers(weight), weight.N, 256, *numbers(weight), dtype)
        expected = weight.dequantize(dtype)
        assert torch.equal(made.isnan(), expected.isnan())
        assert torch.equal(made.nan_to_num(), expected.nan_to_num())


# In a full run every format through both kernels; else those without act-order through one, those with it through the other.
PRODUCTS = [
    (scheme, *order, config)
    for scheme in (*SCHEMES, *FLOATING)
    for order in ORDERS
    for config in (GEMV, GEMM)
    if FULL or (config is GEMM) == order[0]
]


@pytest.mark.parametrize(("scheme", "act_order", "dtype", "config"), PRODUCTS, ids=str)
def test_product_is_exact_where_bits_are_exact(
    scheme: str, act_order: bool, dtype: torch.dtype, config: Config
) -> None:
    """Integers and power-of-two scales: the only rounding left is that of the result."""
    weight, x, bias, expected = exact_problem(scheme, 3, 70, 200, dtype, act_order)
    assert torch.equal(product(x, weight, bias, config), expected)


@dtypes
@configs
@pytest.mark.parametrize(("N", "K"), [(1, 1), (70, 200), (130, 63)])
def test_random_weights_within_the_rounding(dtype: torch.dtype, config: Config, N: int, K: int) -> None:
    """Bound (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2; S = sum |x w|, u of x's dtype): a weight
    is rounded once, u S. A sum of K fp32 products in any order, so also over parts of K, is K - 1 additions, since adding zero
    is exact; with the rounding of the products gamma S, gamma = K v / (1 - K v), v = 2^-24. The result is rounded once, u.
    What is not normal is off by u times the smallest normal number instead."""
    weight = random_weight("w4a16_g32_asym", N, K)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    W = weight.dequantize().double()
    exact, size = x.double() @ W.T, x.double().abs() @ W.abs().T
    u, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    gamma = K * 2**-24 / (1 - K * 2**-24)
    rounded = u * size + u * tiny * x.double().abs().sum(1, keepdim=True)
    before = rounded + gamma * (size + rounded)
    error = (product(x, weight, None, config).double() - exact).abs()
    assert (error <= before + u * (exact.abs() + before) + u * tiny).all()


@schemes
def test_dequantized_product_is_exact_where_bits_are_exact(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices of one strip; x in natural order and strided, the order of columns and a bias of another dtype are there."""
    monkeypatch.setattr(launch, "SLICE_BYTES", 1)
    dtype, act_order = (torch.float16, True) if "asym" in scheme else (torch.bfloat16, "g64" in scheme)
    weight, x, bias, expected = exact_problem(scheme, 3, 70, 200, dtype, act_order)
    made = launch.gemm(x.T.contiguous().T, *buffers(weight), bias.float(), 70, *numbers(weight), config=DEQUANTIZE)
    assert torch.equal(made, expected)


def test_a_dequantized_product_without_bias_without_columns_and_under_autocast() -> None:
    weight, x, _, _ = exact_problem("w4a16_g32", 3, 70, 200, torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        made = product(x, weight, None, DEQUANTIZE)
    assert torch.equal(made, (x.double() @ weight.dequantize().double().T).half())
    bias = integers(5, dtype=torch.float16)
    empty = product(torch.zeros(2, 0).half(), random_weight("w4a16_g32_asym", 5, 0), bias, DEQUANTIZE)
    assert torch.equal(empty, bias.expand(2, 5))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g16_asym", "w4a16_g64_fzero", "w8a16_g32_offset", "nf4_g64"])
@dtypes
@pytest.mark.parametrize("config", [GEMV, GEMM, DEQUANTIZE], ids=["gemv", "gemm", "dequantize"])
def test_infinities_and_huge_numbers_give_what_a_float_layer_gives(
    scheme: str, dtype: torch.dtype, config: Config
) -> None:
    """A row for each case, and the last one without. A weight is formed before it meets x: no term of it is multiplied apart."""
    cases: list[dict[int, float]] = [{5: INF}, {5: INF, 60: INF}, {5: INF, 6: -INF}, {7: NAN}, {5: -INF, 9: NAN}]
    if dtype == torch.bfloat16:
        cases += [{k: 1e36 for k in range(96)}, {3: 3e38}, {3: -1e37, 70: 1e37}]
    weight = random_weight(scheme, 20, 96)
    x = torch.randn(len(cases) + 1, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for row, special in zip(x, cases):
        for k, value in special.items():
            row[k] = value
    y, truth = product(x, weight, None, config), x.double() @ weight.dequantize().double().T
    expected, usual = truth.to(torch.float32).to(dtype), y.isfinite()
    assert torch.equal(y.isnan(), truth.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[y.isinf()])
    bound = (1e-2 if dtype == torch.bfloat16 else 1e-3) * (x.double().abs() @ weight.dequantize().double().abs().T + 1)
    assert bool(((y.double() - truth).abs() <= bound)[usual].all())
    assert usual[-1].all()
    assert not usual[0].any()


@pytest.mark.parametrize("M", [0, 1, 2, 8, 9, 15, 16, 17, 33, 65, 600])
def test_any_number_of_tokens_with_the_shipped_table(M: int) -> None:
    weight, x, bias, expected = exact_problem("w4a16_g64_asym", M, 70, 200, torch.float16)
    assert torch.equal(product(x, weight, bias), expected)


@configs
@pytest.mark.parametrize("programs_per_sm", [0, 1, 64])
def test_splits_add_up(config: Config, programs_per_sm: int) -> None:
    weight = random_weight("w8a16_g32_asym", 70, 200, exact=True)
    x = integers(17, 200, dtype=torch.bfloat16)
    expected = (x.double() @ weight.dequantize().double().T).bfloat16()
    assert torch.equal(product(x, weight, None, replace(config, programs_per_sm=programs_per_sm)), expected)


def test_strided_x_and_other_dtypes_of_scales_and_bias() -> None:
    weight = random_weight("w4a16_g32", 40, 96, exact=True)
    wide = QuantTensor(weight.codes, weight.scales.float(), None, None, weight.scheme)
    x, bias = integers(96, 4, dtype=torch.float16).T, integers(40, dtype=torch.float32)
    made = launch.gemm(x, *buffers(wide), guarded(bias), 40, *numbers(wide))
    assert torch.equal(made, (x.double() @ weight.dequantize().double().T + bias.double()).half())


def test_empty_weights() -> None:
    for N, K in ((0, 64), (5, 0)):
        weight = random_weight("w4a16_g32_asym", N, K)
        bias = integers(N, dtype=torch.float16)
        assert torch.equal(product(torch.zeros(2, K).half(), weight, bias), bias.expand(2, N))


@configs
def test_a_column_order_from_outside_reads_nothing_past_the_end(config: Config) -> None:
    weight = random_weight("w4a16_g32", 40, 4096, act_order=True)
    given = buffers(weight)
    k_order = given[BUFFERS.index("k_order")]
    assert k_order is not None
    k_order[0], k_order[1] = 2**31 - 1, -(2**31)
    x = guarded(torch.ones(1, 4096, dtype=torch.float16))
    y = launch.gemm(x, *given, None, 40, *numbers(weight), config=config)
    assert torch.isfinite(y).all()
    launch.dequantize(*given, 40, 4096, *numbers(weight), torch.float16)


# --- controls: each of the checks above can fail ------------------------------------------------------------------------------


@configs
def test_a_wrong_code_is_noticed(config: Config) -> None:
    weight = random_weight("w4a16_g32", 40, 96, exact=True)
    wrong = weight.codes.clone()
    wrong[39, 95] ^= 1
    off = QuantTensor(wrong, weight.scales, None, None, weight.scheme)
    x = torch.ones(1, 96, dtype=torch.float16)
    assert not torch.equal(product(x, off, None, config), product(x, weight, None, config))


def test_a_read_past_the_end_kills_the_process() -> None:
    """A buffer one strip short, in a child that has to die by SIGSEGV."""
    weight = random_weight("w4a16_channel", 128, 4096)
    qweight, *others = buffers(weight)
    assert qweight is not None
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # the parent's log shows no trace of a death that is meant
        signal.alarm(60)
        launch.gemm(
            torch.ones(1, 4096).half(),
            guarded(qweight[:1]),
            *others,
            None,
            128,
            *numbers(weight),
            config=GEMV,
        )
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_scheme_names_cover_every_kind_of_zero_codebook_and_plane() -> None:
    parsed = [QuantScheme.parse(scheme) for scheme in (*SCHEMES, *FLOATING)]
    assert {scheme.zeros for scheme in parsed} == {"none", "int", "float", "offset"}
    assert {scheme.codebook for scheme in parsed} == {None, *CODEBOOKS}
    assert {scheme.factors for scheme in parsed} == {None, *FACTORS}
    assert {GPU_PLANES[scheme.bits] for scheme in parsed} == set(GPU_PLANES.values())
