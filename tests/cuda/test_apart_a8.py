"""int8 activations as other origins make them, on the emulator: zero points, LLM.int8's outliers, one scale from the file. Codes
bit for bit, products against 64-bit integers, and what is added to them (apart_a8.cuh) in the order that is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cuda import calls, emulator
from tests.cuda.calls import DTYPES, in_room
from tests.cuda.calls_a8 import check, expected, in_fragment_order, multiply_call, noise, quantize, rows_of
from tests.cuda.emulator import SCHEDULES, Call
from tests.cuda.units import in_full
from tests.ops.helpers import integers
from tests.strategies import random_weight

ROWS = load_file(Path(__file__).parent.parent / "golden" / "activations" / "rows.safetensors")
KINDS = ("zero", "outliers", "static", "static_zero")
STATIC = torch.tensor([0.03125, 7.0])

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_act = pytest.mark.parametrize("act", ["8z", "8o6", "8s", "8sz"])
DATA_RACE = "WARNING: ThreadSanitizer: data race"


def with_outliers(M: int, K: int, dtype: torch.dtype, columns: tuple[int, ...] = (3, 70)) -> Tensor:
    """Noise in which one token each marks these columns: with 6, which is one, and with what is far beyond."""
    x = noise(M, K, dtype).clamp(-5.9, 5.9)
    for i, k in enumerate(columns):
        x[i % M, k] = (6.0, -48.5)[i % 2]
    return x


def static_of(kind: str) -> Tensor | None:
    return STATIC * torch.tensor([1, kind == "static_zero"]) if "static" in kind else None


# --- codes ---------------------------------------------------------------------------------------------------------------


def check_rows(x: Tensor, kind: str, static: Tensor | None, order: Tensor | None = None) -> None:
    """Codes, scales, zero points and marks are the reference's, in the order that is stored."""
    act, K = f"int8_{kind}", x.shape[1]
    stored = torch.arange(K) if order is None else order.long()
    right, made = rows_of(x, act, static), quantize(x, order, act, static)
    codes, scales, zeros = right.codes[:, stored], right.scales[:, 0], right.zeros
    if kind in ("zero", "static_zero"):
        codes = torch.cat([codes, torch.ones(1, K, dtype=torch.int64)])
        scales = torch.cat([scales, torch.ones(1)])
    assert torch.equal(made["codes"], in_fragment_order(codes))
    assert torch.equal(made["scales"].nan_to_num(nan=-1), scales.nan_to_num(nan=-1))
    if zeros is not None:
        known = zeros[:, 0].nan_to_num(nan=0)  # of a row that has none, its scale is NaN
        assert torch.equal(made["zeros"][: len(x)], known)
    if right.marked is not None:
        assert made["marked"].tolist() == right.marked[stored].nonzero()[:, 0].tolist()


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_origin(kind: str, dtype: torch.dtype) -> None:
    """The rows of tests/golden/activations, whose codes compressed-tensors and bitsandbytes made."""
    name = str(dtype).removeprefix("torch.")
    x, codes = ROWS[f"{name}.x"], ROWS[f"expected.{name}.{kind}.codes"].long()
    static = None
    if "static" in kind:
        static = torch.cat([ROWS[f"expected.{name}.{kind}.{part}"].float() for part in ("scale", "zero")])
    made = quantize(x, act=f"int8_{kind}", x_static=static)["codes"][: len(x)]
    rows = (codes != ROWS[f"expected.{name}.zero.zero"]).any(1) if kind == "zero" else torch.ones(len(x)).bool()
    assert torch.equal(made[rows], in_fragment_order(codes)[rows])  # a row without a range has another zero there
    check_rows(x, kind, static)
    if kind == "outliers":
        assert quantize(x, act="int8_outliers")["marked"].tolist() == ROWS[f"expected.{name}.outliers.columns"].tolist()


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_definition_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """Aligned, odd, strided and gathered rows, of more columns than a block has threads for, and of more rows than are marked one
    by one; what is tiny, huge, equal, positive alone, or nothing."""
    huge = torch.finfo(dtype).max
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).int()
    for x, by in (
        (in_room(with_outliers(3, 200, dtype)), None),
        (with_outliers(2, 77, dtype), None),
        (with_outliers(4500, 2, dtype, (1,)).T * 2, None),
        (with_outliers(3, 200, dtype), order),
        (with_outliers(131, 24, dtype, (3, 17, 23)), None),
        (torch.tensor([[1e-7, -1e-7, 0.0], [3e-5, 6.2e-5, 0.0], [0.0, 0.0, -0.0], [4.0, 5.0, 5.5]]).to(dtype), None),
        (huge * torch.tensor([[1.0, -1.0, 0.5], [0.25, -0.25, 0.0], [0.1, 0.2, 0.3]]).to(dtype), None),
        (torch.arange(-95, 96).div(16).to(dtype)[None], None),  # the largest below 6
        (torch.zeros(3, 0, dtype=dtype), None),
    ):
        check_rows(x, kind, static_of(kind), by)


@dtypes
@pytest.mark.parametrize("kind", ["static", "static_zero"])
@pytest.mark.parametrize("static", [(1e-9, 3.0), (1e6, 3.0), (0.25, float("nan")), (0.25, float("inf")), (0.25, 300.0)])
def test_a_scale_that_is_nothing_in_fp16(static: tuple[float, float], kind: str, dtype: torch.dtype) -> None:
    """Files with such values are refused; whoever calls the op gets 0, NaN or what the zero point is cut to, and no wild code."""
    x = with_outliers(3, 96, dtype)
    usable = dtype == torch.bfloat16 or static[0] == 0.25
    made = quantize(x, act=f"int8_{kind}", x_static=torch.tensor(static))
    scale = torch.tensor(static[0]).to(dtype).float()
    assert made["scales"][:3].tolist() == [scale] * 3
    assert usable or not made["codes"][:3].any()
    if usable:
        zero = static[1] if kind == "static_zero" and static[1] < torch.inf else 0.0
        right = torch.tensor([static[0], min(zero, 127.0)])
        check_rows(x, kind, right)
        assert made["zeros"][:3].tolist() == [right[1] * scale] * 3


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(value: float, kind: str, dtype: torch.dtype) -> None:
    """A NaN makes its token NaN; an infinity does where the range is asked, is the largest code under a scale from the file, and
    an outlier, which multiplies as it is. No other token changes, but for the column that it marks."""
    x = noise(3, 136, dtype)
    x[1, 70] = value
    check_rows(x, kind, static_of(kind))
    weight = random_weight("w8a8_channel", 40, 136, exact=True)
    weight = replace(weight, scheme=replace(weight.scheme, act=f"int8_{kind}"), x_static=static_of(kind))
    call = multiply_call(weight, x)
    emulator.run(calls.UNIT, call)
    y, right = call.buffers["y"], expected(weight, x)
    assert y is not None
    assert torch.equal(y.isnan(), right.isnan())
    assert torch.equal(y.nan_to_num(nan=0), right.nan_to_num(nan=0))
    assert y[1].isfinite().all() == (kind.startswith("static") and value == value)
    assert y[::2].isfinite().all()


# --- products ------------------------------------------------------------------------------------------------------------


@every_act
@pytest.mark.parametrize(
    ("bits", "group"), [(8, "channel"), (4, "g32"), (3, "g64"), (5, "g192"), (4, "channel"), (8, "g32")]
)
def test_every_group_and_width(act: str, bits: int, group: str) -> None:
    """Odd N, K and M of two tiles, act-order, parts of K, and a bias; x gathered and in place."""
    for dtype, M, K, splits in (
        (torch.float16, 33, 333, 2),
        (torch.bfloat16, 32, 136, 1),
        (torch.bfloat16, 1, 1088, 3),
    ):
        weight = random_weight(f"w{bits}a{act}_{group}", 71, K, seed=bits, act_order=splits == 2, exact=True)
        x = with_outliers(M, K, dtype)
        check(weight, in_room(x) if splits == 1 else x, integers(71, dtype=dtype), splits=splits)


@every_act
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_the_threads(act: str, schedule: str) -> None:
    weight = random_weight(f"w4a{act}_g64", 130, 320, exact=True)
    check(weight, in_room(with_outliers(35, 320, torch.float16)), None, 64, 2, schedule)


@every_act
@pytest.mark.parametrize(("scheme", "tokens"), [("w4a{}_g64", 64), ("w8a{}_g32", 128), ("w8a{}_channel", 256)])
def test_hopper_leaves_sums_too(act: str, scheme: str, tokens: int) -> None:
    """M is a whole tile, so that a row of ones is in another; one part of K and two."""
    weight = random_weight(scheme.format(act), 71, 200, exact=True)
    for splits in (1, 2):
        x = in_room(with_outliers(tokens, 200, torch.bfloat16))
        check(weight, x, integers(71, dtype=torch.float32), tokens, splits, path="gemm_a8_sm90")


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 136])
def test_any_number_of_outliers(count: int) -> None:
    """They are added 32 columns at a time."""
    columns = torch.randperm(136, generator=torch.Generator().manual_seed(count))[:count].tolist()
    for scheme, act_order in (("w8a8o6_channel", False), ("w4a8o6_g32", True)):
        weight = random_weight(scheme, 70, 136, act_order=act_order, exact=True)
        for M, dtype in ((1, torch.float16), (70, torch.bfloat16)):
            check(weight, with_outliers(M, 136, dtype, tuple(columns)))


def test_a_neighbour_marks_a_column() -> None:
    """As in bitsandbytes: what one token marks is multiplied in floats for all of them."""
    weight, x = random_weight("w8a8o6_channel", 40, 64, exact=True), noise(2, 64, torch.float16)
    x[1, 5] = 7
    alone, beside = (multiply_call(weight, part) for part in (x[:1], x))
    for call in (alone, beside):
        emulator.run(calls.UNIT, call)
    assert not torch.equal(alone.buffers["y"], beside.buffers["y"][:1])  # type: ignore[arg-type, index]


@every_act
def test_no_columns_leave_the_bias(act: str) -> None:
    weight, bias = random_weight(f"w4a{act}_g32", 40, 0), integers(40, dtype=torch.float16)
    call = multiply_call(weight, torch.zeros(3, 0, dtype=torch.float16), bias)
    emulator.run(calls.UNIT, call)
    assert torch.equal(call.buffers["y"], bias.expand(3, 40))  # type: ignore[arg-type]


@dtypes
@every_act
@pytest.mark.parametrize("scheme", ["w4a{}_g32", "w8a{}_channel"])
def test_random_scales_stay_within_the_bound(scheme: str, act: str, dtype: torch.dtype) -> None:
    """As in test_gemm_a8.py, u = 2^-24 a group and five more; for zero points the same of a second product, and three of zero
    point times scale, its product and the difference; for outliers two a column, of the weight and of the sum."""
    weight = random_weight(scheme.format(act), 70, 328, seed=3, dtype=torch.float32)
    x = with_outliers(20, 328, dtype)
    rows, w = rows_of(x, weight.scheme.act, weight.x_static), weight.dequantize().double().T
    exact = (rows.codes.double() @ w) * rows.scales.double()
    terms = (rows.codes.double().abs() @ w.abs()) * rows.scales.double()
    roundings = weight.scales.shape[1] + 5
    if rows.zeros is not None:
        exact -= rows.zeros.double() * w.sum(0)
        terms += rows.zeros.double().abs() * w.abs().sum(0)
        roundings += 3
    if rows.marked is not None:
        assert rows.marked.sum() == 2
        exact += x.double()[:, rows.marked] @ w[rows.marked]
        terms += x.double().abs()[:, rows.marked] @ w.abs()[rows.marked]
        roundings += 2 * 2
    call = multiply_call(weight, in_room(x))
    emulator.run(calls.UNIT, call)
    error = roundings * 2.0**-24 * terms
    error += torch.finfo(dtype).eps / 2 * (exact.abs() + error) + 2.0**-25
    y = call.buffers["y"]
    assert y is not None
    assert ((y.double() - exact).abs() <= error).all()


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_a_static_scale_goes_with_static_activations() -> None:
    x = noise(2, 64, torch.float16)
    for weight, given in (
        (random_weight("w8a8s_channel", 40, 64), None),
        (random_weight("w8a8z_channel", 40, 64), STATIC),
    ):
        call = multiply_call(weight, x)
        with pytest.raises(RuntimeError, match="multiply returned error"):
            emulator.run(calls.UNIT, Call(call.launcher, {**call.buffers, "x_static": given}, call.integers))


# --- sanitizers and negative controls ------------------------------------------------------------------------------------


def sanitized(act: str, M: int = 35) -> tuple[Call, Tensor]:
    """35 tokens are two blocks of what finishes them; 48 columns are marked, in two rounds of what adds them. TSan has fibers for
    no more than 17 tokens."""
    weight = random_weight(f"w4a{act}_g64", 70, 333, act_order=True, exact=True)
    x = with_outliers(M, 333, torch.float16, tuple(range(0, 333, 7)))
    return multiply_call(weight, x, integers(70), 64, 2), expected(weight, x, integers(70), 2)


@in_full
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("act", ["8o6", "8sz"])
def test_sanitizers_find_nothing(flavour: emulator.Flavour, act: str) -> None:
    call, y = sanitized(act, 17 if flavour == "tsan" else 35)
    done = emulator.replay(calls.UNIT, call, flavour, "random")
    assert done.status == 0, done.report[-2000:]
    assert torch.equal(done.buffers["y"], y)


def check_that_it_is_noticed(bug: str, act: str) -> None:
    call, y = sanitized(act)
    done = emulator.replay(calls.UNIT, call, bug=bug)
    assert done.status == 0
    assert not torch.equal(done.buffers["y"], y)


@pytest.mark.parametrize(
    ("bug", "act"), [("APART_LOST_MARK", "8o6"), ("APART_WRONG_SIGN", "8z"), ("APART_LOST_PART", "8z")]
)
def test_wrong_values_are_noticed(bug: str, act: str) -> None:
    check_that_it_is_noticed(bug, act)


@in_full
@pytest.mark.parametrize(
    ("bug", "act"),
    [
        ("APART_LOST_ROUND", "8o6"),
        ("APART_MARKED_TWICE", "8o6"),
        ("APART_ENTRIES_IN_THE_MAXIMUM", "8o6"),
        ("APART_ONES_PAST_K", "8sz"),
    ],
)
def test_more_wrong_values_are_noticed(bug: str, act: str) -> None:
    check_that_it_is_noticed(bug, act)


@in_full
@pytest.mark.parametrize("bug", ["APART_NO_BARRIER_FOR_THE_RANGE", "APART_NO_BARRIER_FOR_WEIGHTS"])
def test_a_missing_barrier_is_a_race(bug: str) -> None:
    assert DATA_RACE in emulator.replay(calls.UNIT, sanitized("8o6", 17)[0], "tsan", bug=bug).report
