"""The CUDA kernels, executed on the CPU (`emulator`), against `QuantTensor.dequantize()`.

Bit-exact: integer inputs and power-of-two scales leave the rounding of the output as the only one. Outputs and workspaces
start as NaN, and x lies between NaN.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qkernels import QuantTensor
from tests.cuda import calls, emulator
from tests.cuda.bounds import ZEROS, bound
from tests.cuda.calls import DTYPES, STRAY, Config, decode, gemm, in_room, multiply
from tests.cuda.emulator import Call
from tests.ops.helpers import exact_product, integers, magnitudes
from tests.strategies import random_weight

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EDGES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129]  # around every tile of tokens


def check(
    weight: QuantTensor, x: Tensor, config: Config, bias: Tensor | None = None, schedule: str = "ascending"
) -> None:
    y, expected = multiply(weight, x, config, bias, schedule), exact_product(weight, x, bias)
    wrong = (y != expected).nonzero()
    assert len(wrong) == 0, f"{config}: {len(wrong)} of {y.numel()} differ, the first at [m, n] = {wrong[0].tolist()}"


@dtypes
@pytest.mark.parametrize("scheme", ["w4a16_g128_asym", "w8a16_g64"])
def test_every_edge_of_the_token_tiles(scheme: str, dtype: torch.dtype) -> None:
    """Odd N, a short last strip, K that is no multiple of a step; every path that takes so many tokens."""
    N, K = 71, 136
    weight = random_weight(scheme, N, K, exact=True)
    for M in EDGES:
        x, bias = in_room(integers(M, K, dtype=dtype)), integers(N, dtype=dtype)
        tile = 32 if M <= 32 else 64 if M <= 64 else 128
        for config in [gemm(tile), *([decode(M)] if M <= 32 else [])]:
            check(weight, x, config, bias)


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("group", ["g16", "g32", "g64", "g128", "g256", "g192", "channel", "tensor"])
def test_every_group_and_kind_of_zero(group: str, zeros: str) -> None:
    """With random act-order and odd K (x is gathered), in both types and both widths, over splits of K."""
    N, K = 67, 333
    for (bits, dtype), M in zip(itertools.product((4, 8), DTYPES), (5, 20, 3, 12)):
        weight = random_weight(f"w{bits}a16_{group}{zeros}", N, K, seed=bits, act_order=M != 12, exact=True)
        x = integers(M, K, dtype=dtype, most=2)
        check(weight, x, decode(M, warps_n=2, splits=2))
        check(weight, x, gemm(32, splits=2))


def test_codes_of_7_bits_ride_in_tiles_of_8() -> None:
    for zeros, M in zip(ZEROS, (1, 9, 3, 17)):
        weight = random_weight(f"w7a16_g32{zeros}", 40, 128, exact=True)
        for dtype, config in zip(DTYPES, (decode(M), gemm(32))):
            check(weight, in_room(integers(M, 128, dtype=dtype)), config)


@pytest.mark.parametrize("bits", [4, 8])
@dtypes
def test_every_pair_of_code_and_zero(bits: int, dtype: torch.dtype) -> None:
    """All 16 x 16 and 256 x 256 differences, ±255 included, each alone in a sum."""
    levels = 2**bits
    codes = torch.arange(levels, dtype=torch.uint8).repeat_interleave(16)
    zeros = torch.arange(levels, dtype=torch.uint8)[:, None].expand(-1, levels).contiguous()
    scheme = random_weight(f"w{bits}a16_g16_asym", 1, 16).scheme
    scales = torch.ones(levels, levels, dtype=dtype)
    weight = QuantTensor(codes.expand(levels, -1).contiguous(), scales, zeros, None, scheme)
    picked = range(levels) if bits == 4 else [0, 1, 127, 128, 200, 255]
    x = torch.zeros(len(picked), 16 * levels, dtype=dtype)
    for row, code in enumerate(picked):
        x[row, code * 16 + code % 16] = 1
    expected = torch.tensor(list(picked))[:, None] - torch.arange(levels)
    for config in (Config("decode", 16, 1, 4, 4), gemm(32)):
        assert torch.equal(multiply(weight, x, config).int(), expected.int())


@pytest.mark.parametrize("warps", [4, 8, 16])
def test_every_arrangement_of_the_warps(warps: int) -> None:
    weight = random_weight("w4a16_g64_asym", 300, 448, exact=True)  # 5 strips, 7 steps: some warps have nothing to do
    x = in_room(integers(3, 448, dtype=torch.float16))
    for warps_n, splits in [(1, 1), (2, 3), (4, 7), (warps, 1)]:
        check(weight, x, Config("decode", 8, warps_n, warps // warps_n, splits))


@pytest.mark.parametrize("scheme", ["w4a16_g64_asym", "w8a16_g64"])
def test_decode_rings_come_round(scheme: str) -> None:
    """13 steps a warp, more than twice its ring: of four, or of five with 32 tokens and 4 bit."""
    weight = random_weight(scheme, 70, 13 * 64, exact=True)
    for M in (3, 12, 20):
        check(
            weight,
            in_room(integers(M, 13 * 64, dtype=torch.float16, most=2)),
            Config("decode", 8 * -(-M // 8) if M < 17 else 32, 4, 1),
        )


@pytest.mark.parametrize(
    "config", [decode(8, 2), decode(20, 4, 2), gemm(32), gemm(64), gemm(128, 2), gemm(64, 1, True)], ids=str
)
@pytest.mark.parametrize("schedule", ["descending", "random", "warp_ahead"])
def test_every_schedule_of_the_threads(config: Config, schedule: str) -> None:
    weight = random_weight("w4a16_g64_asym", 130, 448, exact=True)
    for seed in (1, 2):
        x = in_room(integers(min(config.tokens, 20), 448, dtype=torch.float16, seed=seed, most=2))
        y = multiply(weight, x, config, None, schedule, seed)
        assert torch.equal(y, exact_product(weight, x))


@dtypes
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_dtype_of_scales_zeros_and_bias(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    for zeros, bias_dtype in zip(ZEROS, (None, torch.float16, torch.bfloat16, torch.float32)):
        weight = random_weight(f"w4a16_g32{zeros}", 40, 96, dtype=scale_dtype, exact=True)
        x, bias = in_room(integers(2, 96, dtype=dtype)), None if bias_dtype is None else integers(40, dtype=bias_dtype)
        check(weight, x, decode(2), bias)
        check(weight, x, gemm(32), bias)


def test_strided_activations() -> None:
    """Rows and columns picked out of a larger tensor of other numbers."""
    weight = random_weight("w4a16_g32_fzero", 40, 96, exact=True)
    for M, dtype in ((1, torch.float16), (9, torch.bfloat16)):
        x = integers(M, 96, dtype=dtype)
        room = torch.full((2 * M + 1, 3 * 96 + 5), STRAY, dtype=dtype)
        for view in (room[1::2, 5:101], room[:M, 4 : 4 + 3 * 96 : 3], room.T[2:98, :M].T):
            room.fill_(STRAY)
            view.copy_(x)
            check(weight, view, decode(M))
            check(weight, view, gemm(32))
    row = integers(1, 96, dtype=torch.float16)
    check(weight, row.expand(10, 96), decode(10))


def test_no_columns_leave_the_bias() -> None:
    weight, bias = random_weight("w4a16_g32", 40, 0), integers(40, dtype=torch.float16)
    for config in (decode(3), gemm(32)):
        assert torch.equal(multiply(weight, torch.zeros(3, 0, dtype=torch.float16), config, bias), bias.expand(3, 40))


def test_orders_from_outside_cannot_read_outside() -> None:
    weight = random_weight("w4a16_g32", 40, 96, act_order=True, exact=True)
    x = integers(3, 96, dtype=torch.float16)
    results = []
    for wild in ([-1, 2**31 - 1, -(2**31)], [0, 95, 0]):
        call = calls.multiply_call(weight, x, decode(3))
        order = call.buffers["k_order"]
        assert order is not None
        order[:3] = torch.tensor(wild, dtype=torch.int32)
        emulator.run(calls.UNIT, call)
        results.append(call.buffers["y"])
    assert torch.equal(*results)  # type: ignore[arg-type]


@pytest.mark.parametrize("K", [96, 90])
def test_an_order_may_lie_anywhere(K: int) -> None:
    """Indices are read 16 bytes at a time where they are aligned, one by one in a view that is not, and past the last eight."""
    weight = random_weight("w4a16_g32", 40, K, act_order=True, exact=True)
    x = integers(3, K, dtype=torch.float16)
    expected = exact_product(weight, x)
    for offset in range(4):
        call = calls.multiply_call(weight, x, decode(3))
        order = call.buffers["k_order"]
        assert order is not None
        room = torch.full((K + 8,), -1, dtype=torch.int32)
        start = -room.data_ptr() % 16 // 4 + offset
        moved = room[start : start + K].copy_(order)
        assert moved.data_ptr() % 16 == 4 * offset
        emulator.run(calls.UNIT, Call("multiply", {**call.buffers, "k_order": moved}, call.integers))
        assert torch.equal(call.buffers["y"], expected)  # type: ignore[arg-type]


def test_a_row_depends_on_nothing_but_itself() -> None:
    """Bitwise, within a configuration: not on M, not on its place, not on the other rows."""
    weight = random_weight("w4a16_g64_asym", 70, 200)
    x = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for config in (Config("decode", 32, 2, 2, 2), gemm(64)):
        whole = multiply(weight, x, config)
        for M in (1, 7):
            assert torch.equal(multiply(weight, x[-M:], config), whole[-M:])


# --- rounding ---------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("scheme", ["w4a16_g16_asym", "w4a16_g128", "w8a16_g64_fzero", "w4a16_channel_offset"])
def test_random_inputs_stay_within_the_bound(scheme: str, dtype: torch.dtype) -> None:
    weight = random_weight(scheme, 70, 328, seed=3, dtype=torch.float32)
    x = torch.randn(20, 328, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ weight.dequantize().double().T
    for config in (decode(20, 2, 2), gemm(64, 3)):
        error = (multiply(weight, in_room(x), config).double() - exact).abs()
        assert (error <= bound(weight, x, config.splits, max(config.warps_k, 1))).all(), config


def test_fp16_accumulation_costs_what_fp16_costs() -> None:
    """64 columns are summed in fp16, 2^-11 an addition; and the fp32 bound is really broken by it (negative control)."""
    weight = random_weight("w4a16_g64", 70, 320, seed=3)
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(0)).half()
    exact = x.double() @ weight.dequantize().double().T
    error = (multiply(weight, in_room(x), gemm(64, 1, True)).double() - exact).abs()
    fp32 = bound(weight, x, 1, 1)
    assert (error <= fp32 + 64 * 2.0**-11 * (x.double().abs() @ magnitudes(weight).T)).all()
    assert (error > fp32).any()


def test_wrong_codes_scales_and_zeros_are_noticed() -> None:
    """Negative controls of the exact comparison."""
    weight = random_weight("w4a16_g64_asym", 70, 136, exact=True)
    x = torch.ones(9, 136, dtype=torch.float16)
    expected = exact_product(weight, x)
    for name in ("codes", "zeros", "scales"):
        for config in (decode(9), gemm(32)):
            call = calls.multiply_call(weight, x, config)
            buffer = call.buffers[name]
            assert buffer is not None
            if name == "scales":
                buffer.copy_(buffer.roll(1, -1))
            else:
                buffer.view(-1)[5] ^= 1
            emulator.run(calls.UNIT, call)
            assert not torch.equal(call.buffers["y"], expected), (name, config)  # type: ignore[arg-type]


# --- side kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantize_is_the_definition_bit_for_bit(bits: int, zeros: str) -> None:
    """Every type of result and of scales; the order of x, the stored order, padded, a slice of the strips."""
    for group, dtype, scale_dtype in zip(
        ("g16", "g32", "g128", "channel"),
        (*DTYPES, torch.float32, torch.float16),
        (*DTYPES, torch.float32, torch.float16),
    ):
        N, K = 150, 200 if group != "channel" else 77
        weight = random_weight(f"w{bits}a16_{group}{zeros}", N, K, act_order=True, dtype=scale_dtype)
        expected = weight.dequantize(dtype)
        assert torch.equal(calls.dequantize(weight, dtype, K, ordered=True), expected)
        order = weight.k_order()
        stored = expected if order is None else expected[:, order.long()]
        padded = torch.nn.functional.pad(stored, (0, -K % 64))
        assert torch.equal(calls.dequantize(weight, dtype, K), stored)
        assert torch.equal(calls.dequantize(weight, dtype, K + -K % 64), padded)
        assert torch.equal(calls.dequantize(weight, dtype, K, first=1, count=1), stored[64:128])


def test_staged_x_is_gathered_and_padded() -> None:
    for act_order, K, dtype in itertools.product((False, True), (64, 77, 200), DTYPES):
        weight = random_weight("w4a16_g16", 8, K, act_order=act_order)
        x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).to(dtype)
        order = weight.k_order()
        expected = x if order is None else x[:, order.long()]
        assert torch.equal(calls.stage(weight, x.T.contiguous().T), torch.nn.functional.pad(expected, (0, -K % 64)))


# --- sanitizers (bugs that are planted for them: mutants.py) -----------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("config", [decode(3), decode(20, 2, 3), gemm(32, 2), gemm(128)], ids=str)
def test_sanitizers_find_nothing(flavour: emulator.Flavour, config: Config) -> None:
    """The first of its sanitizer waits for all kernels to be compiled under it: half a minute on two cores."""
    weight = random_weight("w4a16_g64_asym", 70, 448, act_order=config.path == "decode", exact=True)
    x = integers(min(config.tokens, 20) - 3, 448, dtype=torch.float16, most=2)
    for schedule in ("random", "warp_ahead"):
        done = emulator.replay(calls.UNIT, calls.multiply_call(weight, x, config), flavour, schedule)
        assert done.status == 0, done.report[-2000:]
        assert torch.equal(done.buffers["y"], exact_product(weight, x))
