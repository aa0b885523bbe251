"""int8 activations on the emulator: the quantization of x bit for bit, and products against 64-bit integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from tests.cuda import calls, calls_a8, emulator
from tests.cuda.calls import DTYPES, in_room
from tests.cuda.calls_a8 import check, expected, in_fragment_order, multiply_call, noise, quantized
from tests.cuda.emulator import SCHEDULES, Call
from tests.cuda.units import in_full
from tests.ops.helpers import integers
from tests.strategies import random_weight

ROWS = Path(__file__).parent.parent / "golden" / "activations" / "rows.safetensors"

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DATA_RACE = "WARNING: ThreadSanitizer: data race"


@dtypes
@pytest.mark.parametrize("scheme", ["w4a8_g64", "w8a8_channel"])
def test_every_edge_of_the_token_tiles(scheme: str, dtype: torch.dtype) -> None:
    """Odd N, a short last strip, K that is no multiple of a step."""
    weight = random_weight(scheme, 71, 136, exact=True)
    for M in (1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129):
        check(weight, in_room(noise(M, 136, dtype)), integers(71, dtype=dtype))


@pytest.mark.parametrize("group", ["g32", "g64", "g128", "g192", "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_every_group_and_width(bits: int, group: str) -> None:
    """With random act-order and odd K (x is gathered), in both types, over splits of K."""
    for dtype, N, splits in zip(DTYPES, (67, 130), (2, 1)):
        weight = random_weight(f"w{bits}a8_{group}", N, 333, seed=bits, act_order=splits == 2, exact=True)
        check(weight, noise(5, 333, dtype), splits=splits)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tokens", [32, 64, 128])
def test_every_schedule_of_the_threads(tokens: int, schedule: str) -> None:
    """Nine steps: the ring of four goes round twice; groups of three steps end inside and at its end."""
    weight = random_weight("w4a8_g192", 130, 576, exact=True)
    check(weight, in_room(noise(20, 576, torch.float16)), None, tokens, 2, schedule)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_dtype_of_scales_and_bias(scale_dtype: torch.dtype) -> None:
    for dtype, bias_dtype in zip((*DTYPES, torch.float16), (torch.float16, torch.bfloat16, torch.float32)):
        weight = random_weight("w8a8_g32", 40, 136, dtype=scale_dtype, exact=True)
        check(weight, in_room(noise(2, 136, dtype)), integers(40, dtype=bias_dtype))


def test_the_largest_codes_and_tokens_do_not_overflow() -> None:
    """-128 * ±127 in every column: the sum is 2^24 * 127 / 8, which int32 holds and fp32 as well."""
    weight = random_weight("w8a8_channel", 64, 2048, exact=True)
    weight.codes.zero_()
    x = torch.ones(2, 2048, dtype=torch.float16)
    x[1] = -1
    q, scales = quantized(x)
    assert q.abs().min() == 127
    call = multiply_call(weight, x)
    emulator.run(calls.UNIT, call)
    sums = (q * -128).sum(1, keepdim=True)  # below 2^31, with 7 trailing zeros
    y = (sums.double() * weight.scales.double().T).float() * scales
    assert torch.equal(call.buffers["y"], y.half())  # type: ignore[arg-type]


def test_no_columns_leave_the_bias() -> None:
    weight, bias = random_weight("w4a8_g32", 40, 0), integers(40, dtype=torch.float16)
    call = multiply_call(weight, torch.zeros(3, 0, dtype=torch.float16), bias)
    emulator.run(calls.UNIT, call)
    assert torch.equal(call.buffers["y"], bias.expand(3, 40))  # type: ignore[arg-type]


@dtypes
@pytest.mark.parametrize("scheme", ["w4a8_g32", "w8a8_channel", "w4a8_g128"])
def test_random_scales_stay_within_the_bound(scheme: str, dtype: torch.dtype) -> None:
    """Beside the exact integers: u = 2^-24 for each group's FMA and for a sum past 2^24, two for the token's scale and
    the bias, and the output is rounded once."""
    weight = random_weight(scheme, 70, 328, seed=3, dtype=torch.float32)
    x = noise(20, 328, dtype)
    q, token_scales = quantized(x)
    exact = (q.double() @ weight.dequantize().double().T) * token_scales.double()
    terms = (q.double().abs() @ weight.dequantize().double().abs().T) * token_scales.double()
    call = multiply_call(weight, in_room(x))
    emulator.run(calls.UNIT, call)
    error = (weight.scales.shape[1] + 5) * 2.0**-24 * terms  # two of them: dequantize() above rounds as well
    error += torch.finfo(dtype).eps / 2 * (exact.abs() + error) + 2.0**-25
    y = call.buffers["y"]
    assert y is not None
    assert ((y.double() - exact).abs() <= error).all()


# --- the quantization of x -----------------------------------------------------------------------------------------------


def quantize(x: Tensor, order: Tensor | None = None, act: str = "int8") -> tuple[Tensor, Tensor]:
    """q int8 [M, K_pad] as it is stored, and the scales."""
    made = calls_a8.quantize(x, order, act)
    return made["codes"], made["scales"]


@dtypes
def test_quantization_is_the_definition_bit_for_bit(dtype: torch.dtype) -> None:
    """Aligned, odd and strided rows, more columns than a block has threads for; loud, tiny and equal values, ties."""
    smallest = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}[dtype]
    for x in (
        in_room(noise(3, 200, dtype)),
        noise(2, 77, dtype),
        noise(4500, 2, dtype).T,
        torch.arange(-127, 128).div(2).to(dtype).expand(2, -1).contiguous(),  # scale 1/2
        torch.cat([torch.tensor([127.0]), torch.arange(126) + 0.5]).to(dtype)[
            None
        ],  # scale 1: every other one is a tie
        torch.tensor([[smallest, -smallest, 0.0], [3 * smallest, smallest, 0.0], [0.0, 0.0, -0.0]]).to(dtype),
        torch.finfo(dtype).max * torch.tensor([[1.0, -1.0, 0.5]]).to(dtype),
    ):
        q, scales = quantized(x)
        stored, got = quantize(x)
        assert torch.equal(got, scales[:, 0])
        assert torch.equal(stored, in_fragment_order(q))


@dtypes
def test_wide_quantization_is_that_of_compressed_tensors(dtype: torch.dtype) -> None:
    """The rows of tests/golden/activations, whose codes the origin made, and others of the reference's."""
    name = str(dtype).removeprefix("torch.")
    rows = load_file(ROWS)
    x, codes = rows[f"{name}.x"], rows[f"expected.{name}.wide.codes"]
    assert codes.min() == -128
    assert torch.equal(quantize(x, act="int8_wide")[0], in_fragment_order(codes))
    for more in (in_room(noise(3, 200, dtype)), noise(2, 77, dtype), torch.full((1, 9), -3e4).to(dtype)):
        q, scales = quantized(more, "int8_wide")
        stored, got = quantize(more, act="int8_wide")
        assert torch.equal(got, scales[:, 0])
        assert torch.equal(stored, in_fragment_order(q))


@dtypes
@pytest.mark.parametrize("scheme", ["w4a8w_g32", "w8a8w_channel", "w3a8w_g64"])
def test_wide_products(scheme: str, dtype: torch.dtype) -> None:
    for M in (1, 33):
        check(random_weight(scheme, 70, 200, exact=True), noise(M, 200, dtype, seed=M))
    lowest = QuantTensor(
        torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 1), None, None, QuantScheme.parse("w8a8w_channel")
    )
    check(lowest, torch.full((2, 128), -127.5, dtype=dtype))  # -128 * -128 in every column


def test_tokens_are_gathered_in_the_stored_order_and_never_outside() -> None:
    x = noise(3, 100, torch.bfloat16)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1)).int()
    assert torch.equal(quantize(x, order)[0], in_fragment_order(quantized(x)[0][:, order.long()]))
    wild, clamped = order.clone(), order.clone()
    wild[:3] = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    clamped[:3] = torch.tensor([0, 99, 0], dtype=torch.int32)
    assert torch.equal(quantize(x, wild)[0], quantize(x, clamped)[0])


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(value: float, dtype: torch.dtype) -> None:
    """Its token becomes NaN, and no other does."""
    weight, x = random_weight("w8a8_channel", 40, 136), noise(3, 136, dtype)
    healthy, sick = multiply_call(weight, x), x.clone()
    sick[1, 70] = value
    call = multiply_call(weight, sick)
    for one in (healthy, call):
        emulator.run(calls.UNIT, one)
    y, right = call.buffers["y"], healthy.buffers["y"]
    assert y is not None
    assert right is not None
    assert y[1].isnan().all()
    assert torch.equal(y[::2], right[::2])


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"zero_type": 1}, {"group": 16}, {"splits": 0}, {"tokens": 96}])
def test_what_it_cannot_do_is_an_error(wrong: dict[str, int]) -> None:
    call = multiply_call(random_weight("w4a8_g32", 64, 128), torch.zeros(1, 128, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="multiply returned error"):
        emulator.run(calls.UNIT, Call(call.launcher, call.buffers, {**call.integers, **wrong}))


# --- sanitizers and negative controls ------------------------------------------------------------------------------------


def sanitized(tokens: int = 64, splits: int = 1) -> tuple[Call, Tensor]:
    """Nine steps: the last one's stage is the first of the ring, where the exchange lies."""
    weight = random_weight("w4a8_g64", 70, 576, act_order=tokens == 32, exact=True)
    x = noise(17, 576, torch.float16)
    return multiply_call(weight, x, None, tokens, splits), expected(weight, x, None, splits)


@pytest.mark.parametrize("flavour", [pytest.param("asan", marks=in_full), "tsan"])
@pytest.mark.parametrize(
    ("tokens", "splits"), [(32, 2), pytest.param(64, 1, marks=in_full), pytest.param(128, 1, marks=in_full)]
)
def test_sanitizers_find_nothing(flavour: emulator.Flavour, tokens: int, splits: int) -> None:
    """The first of its sanitizer waits for all kernels to be compiled under it: half a minute on two cores."""
    for schedule in ("random", "warp_ahead"):
        call, y = sanitized(tokens, splits)
        done = emulator.replay(calls.UNIT, call, flavour, schedule)
        assert done.status == 0, done.report[-2000:]
        assert torch.equal(done.buffers["y"], y)


@pytest.mark.parametrize("bug", ["A8_NO_BARRIER", "A8_NO_BARRIER_BEFORE_EXCHANGE", "A8_NO_BARRIER_FOR_THE_MAXIMUM"])
def test_a_missing_barrier_is_a_race(bug: str) -> None:
    assert DATA_RACE in emulator.replay(calls.UNIT, sanitized()[0], "tsan", bug=bug).report


@in_full
def test_a_missing_mask_is_an_overflow() -> None:
    assert "heap-buffer-overflow" in emulator.replay(calls.UNIT, sanitized()[0], "asan", bug="A8_NO_ROW_MASK").report


@pytest.mark.parametrize("bug", ["A8_SHORT_WAIT", "A8_LOST_GROUP", "A8_WRONG_ORDER"])
def test_wrong_values_are_noticed(bug: str) -> None:
    call, y = sanitized()
    done = emulator.replay(calls.UNIT, call, bug=bug)
    assert done.status == 0
    assert not torch.equal(done.buffers["y"], y)
