"""Products with stacked experts, executed on the CPU (`emulator`): bit for bit where bits are exact.

Rows that no block owns, slots that are left over and workspaces start as NaN; every wrong row or expert is another number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qkernels.errors import ArgumentError, ConversionError, UnsupportedProblem
from qkernels.layouts import LAYOUTS
from qkernels.ops.grouped import ACTIVATIONS
from tests.ops.helpers import integers
from tests.strategies import random_weight
from tests.triton.problems import a_block_of_experts, exact_stack, product_by_expert, rows_by_expert

from . import calls, emulator
from .calls import DTYPES, Config, in_room
from .calls_experts import FEW, PAIRS, TILES, Experts, block_call, check, grouped_call, kernels_of, result
from .emulator import SCHEDULES, Call
from .interpreted import interpret
from .units import in_full, needs_nvcc

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
HALF, BRAIN = DTYPES
E = 5
COUNTS = {
    "few": [2, 0, 9, 0, 1],
    "many": [0, 35, 3, 0, 131],
    "one": [0, 0, 40, 0, 0],
    "none": [0] * E,
    "full": [8, 32, 0, 64, 16],
}
SCHEMES = ("w4a16_g64", "w4a16_g16_asym", "w8a16_g32_fzero", "w8a16_tensor", "w4a16_g128_offset", "w4a16_channel_asym")
ids_of = pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)


@pytest.mark.parametrize("config", TILES, ids=lambda c: f"{c.path}{c.tokens}")
def test_rows_of_each_expert_are_exact(config: Config) -> None:
    """Every kind of zero and width in turn; experts without rows, blocks that are not full, three rows of no expert."""
    for number, (scheme, counts) in enumerate(zip((*SCHEMES, *SCHEMES), (*COUNTS.values(), *COUNTS.values()))):
        dtype = DTYPES[number % 2]
        experts = Experts.exact(scheme, E, 70, 200, dtype, ordered=number == 3)
        if number % 3 == 2:
            experts = replace(experts, bias=None)
        x = in_room(integers(9, 200, dtype=dtype))
        rows, offsets = rows_by_expert(counts, 9)
        expected = product_by_expert(x, rows, offsets, *experts.values())
        to = torch.float32 if number % 4 == 1 else dtype
        call = grouped_call(experts, x, rows, offsets, config, to)
        check(result(call, SCHEDULES[number % 4]), expected.to(to), (scheme, counts))


@pytest.mark.parametrize(
    "scheme", ["nf4_g64", "iq4nl_g32", "mxfp4_g32", "fp8_g64", "nvfp4_g16", "q4_k", "q6_k", "w3a16_g64"]
)
def test_weights_with_few_kernels_have_the_bits_of_one_expert_alone(scheme: str) -> None:
    """Of the dense product of the same instance: sums in another order would have others. NVFP4: a factor a row."""
    experts = Experts.exact(scheme, 3, 70, 128, BRAIN)
    experts = replace(experts, bias=None)
    x = in_room(torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).bfloat16())
    rows, offsets = torch.arange(6), torch.tensor([0, 2, 2, 6])
    for config in (FEW, Config("gemm", 64)):
        got = result(grouped_call(experts, x, rows, offsets, config))
        for e, (begin, end) in enumerate(((0, 2), (2, 2), (2, 6))):
            if begin < end:
                alone = calls.multiply(experts.weight[e], in_room(x[begin:end]), config)
                assert torch.equal(got[begin:end], alone), (config, e)


def test_offsets_and_rows_from_outside_cannot_reach_outside() -> None:
    experts = Experts.exact("w4a16_g32", 3, 40, 96, HALF)
    x = in_room(integers(4, 96, dtype=HALF))
    rows = torch.tensor([0, 3, 99, -7, 2**40, -(2**62), 1])
    offsets = torch.tensor([2, 1, 2**33, -5])  # become 2, 2, 7, 7
    for config in (FEW, Config("gemm", 32)):
        got = result(grouped_call(experts, x, rows, offsets, config))
        expected = product_by_expert(x, rows.clamp(0, 3), torch.tensor([2, 2, 7, 7]), *experts.values())
        check(got, expected.half(), config)


def a_block(
    activation: str, dtype: torch.dtype, T: int = 5, per: int = 2, width: int = 20, ordered: bool = False
) -> tuple[Experts, Experts, Tensor, Tensor, Tensor]:
    rows = width * (1 if activation.endswith("_ungated") else 2)
    up = Experts.exact("w4a16_g32_asym", E, rows, 64, dtype, ordered)
    down = Experts.exact("w4a16_g32", E, 40, width, dtype, ordered)
    generator = torch.Generator().manual_seed(T)
    ids = torch.stack([torch.randperm(E + 2, generator=generator)[:per] for _ in range(T)])
    ids[T // 2, per - 1] = -1
    routing = torch.rand(T, per, generator=generator)
    return up, down, in_room(integers(T, 64, dtype=dtype) / 8), ids, routing


WAYS = {"pairs": ((PAIRS, replace(PAIRS, warps_n=1)), False), "few": ((FEW, FEW), True)}
WAYS |= {f"{c.path}{c.tokens}": ((c, c), True) for c in TILES[1:]}
ways = pytest.mark.parametrize("way", WAYS)


@ways
@ids_of
def test_a_block_is_exact_where_bits_are_exact(way: str, dtype: torch.dtype) -> None:
    """relu^2 of integers; K of down is no multiple of 8, and all experts have one order of columns (act-order). Ids of others add
    nothing, whatever their weight."""
    configs, is_sorted = WAYS[way]
    for T, per, x_dtype, ordered in ((5, 2, HALF, True), (1, 3, BRAIN, False), (40, 1, HALF, False)):
        up, down, x, ids, routing = a_block("relu2_ungated", x_dtype, T, per, ordered=ordered)
        x = in_room(integers(T, 64, dtype=x_dtype, most=1) * (torch.arange(64) < 4))
        up = replace(up, bias=None)
        routing = torch.tensor([1.0, 0.5, 2.0])[torch.arange(T * per) % 3].view(T, per)
        expected, _ = a_block_of_experts(x, ids, routing, up.values(), down.values(), "relu2_ungated")
        routing = torch.where((ids < 0) | (ids >= E), torch.nan, routing)
        call = block_call(up, down, x, ids.to(dtype), routing, "relu2_ungated", configs, is_sorted)
        check(result(call, SCHEDULES[T % 4]), expected.to(x_dtype), (T, per))


@pytest.mark.parametrize(("way", "dtype"), [("pairs", BRAIN), ("gemm32", HALF)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_is_what_its_products_are(activation: str, way: str, dtype: torch.dtype) -> None:
    """What lies between the products, in fp32, is off by a few of its steps, which may move it across one of x's type, whose
    distance is 2 u: errors are at most 2 u of the terms' magnitudes, and u of the result."""
    configs, is_sorted = WAYS[way]
    up, down, x, ids, routing = a_block(activation, dtype)
    got = result(block_call(up, down, x, ids, routing, activation, configs, is_sorted))
    expected, size = a_block_of_experts(x, ids, routing, up.values(), down.values(), activation)
    unit = 2.0**-9 if dtype == BRAIN else 2.0**-12
    assert bool(((got.double() - expected).abs() <= 3.02 * unit * size + 1e-6).all())
    assert bool(got.any())


def test_every_way_gives_the_same_bits_of_a_token_alone_and_in_parts() -> None:
    """Sorted rows do not hang on their neighbours, nor on how many tokens are multiplied at a time."""
    up, down, x, ids, routing = a_block("silu", HALF, 12, 3)
    for way in ("few", "gemm64"):
        configs, _ = WAYS[way]
        whole = result(block_call(up, down, x, ids, routing, "silu", configs, True))
        parts = result(block_call(up, down, x, ids, routing, "silu", configs, True, most_bytes=4 * 64 * 3 * 5))
        assert torch.equal(whole, parts)
        one = result(block_call(up, down, x[7:8], ids[7:8], routing[7:8], "silu", configs, True))
        assert torch.equal(one[0], whole[7])


def test_the_activations_of_infinities_are_those_of_torch() -> None:
    """NaN stays NaN; a gate of -1e4 gives 0, and not NaN."""
    up, down, x, ids, routing = a_block("swiglu_oai", HALF, 4, 1)
    x = x.clone()
    x[0, 3] = torch.nan
    x[1] = -6e4
    for activation in ("silu", "swiglu_oai", "gelu", "gelu_tanh"):
        got = result(block_call(up, down, x.contiguous(), ids * 0, routing, activation, WAYS["few"][0], True))
        assert bool(got[0].isnan().all())
        assert not bool(got[3].isnan().any())


def test_what_does_not_exist_is_refused() -> None:
    up, down, x, ids, routing = a_block("silu", HALF)
    for wrong in (replace(FEW, splits=2), replace(FEW, tokens=24), Config("gemm_a8", 64), Config("dequantize", 32)):
        call = block_call(up, down, x, ids, routing, "silu", (FEW, FEW), True)
        changed = {f"up_{name}": value for name, value in wrong.integers().items()}
        with pytest.raises(RuntimeError, match="experts returned error 1"):
            emulator.run(calls.UNIT, Call(call.launcher, call.buffers, {**call.integers, **changed}))


# --- the choice -------------------------------------------------------------------------------------------------------------


def chosen(
    shape: tuple[int, int, int, int], T: int, sm: int = 90, codebook: int = 0, activation: str = "silu"
) -> tuple[bool, list[list[int]]]:
    """(sorted, fields of up and of down) for hidden, width, experts and experts of a token."""
    hidden, width, count, per = shape
    numbers = {"type": 4, "M": T, "x_columns": hidden, "row_stride": hidden, "column_stride": 1, "x_offset": 0, "per": per,
               "id_words": 2, "weights_type": 2, "activation": ACTIVATIONS.index(activation), "sm": sm,
               "multiprocessors": 132}  # fmt: skip
    for prefix, N, K in (("up_", 2 * width, hidden), ("down_", hidden, width)):
        one = {"N": N, "K": K, "bits": 4, "group": 128, "scale_type": 4, "experts": count, "codebook": codebook}
        numbers |= {prefix + name: value for name, value in one.items()}
    configs = torch.zeros(12, dtype=torch.int32)
    emulator.run(calls.UNIT, Call("choose_block", {"configs": configs}, numbers))
    rows = configs.view(2, 6).tolist()
    assert rows[0][0] == rows[1][0]
    return bool(rows[0][0]), [row[1:] for row in rows]


QWEN, MIXTRAL = (2048, 768, 128, 8), (4096, 14336, 8, 2)


@pytest.mark.parametrize(
    ("shape", "T", "is_sorted", "sizes"),
    [
        (QWEN, 1, False, {8}), (QWEN, 8, False, {8}), (QWEN, 16, True, {8}), (QWEN, 64, True, {8, 16}),
        (QWEN, 256, True, {16, 32}), (QWEN, 2048, True, {32, 64}), (MIXTRAL, 1, False, {8}), (MIXTRAL, 2, False, {8}),
        (MIXTRAL, 2048, True, {32, 64, 128}),
    ],
)  # fmt: skip
def test_the_choice_goes_by_rows_of_an_expert(
    shape: tuple[int, int, int, int], T: int, is_sorted: bool, sizes: set[int]
) -> None:
    for sm in (80, 89, 90):
        got, (up, down) = chosen(shape, T, sm)
        assert got is is_sorted
        assert up[1] in (sizes if T < 2048 or sm < 90 else {128}), (sm, up)
        assert up[1] == down[1]  # one table of blocks for both
        assert up[4] == down[4] == 1  # K is not split
        assert up[0] == down[0]
        many = 3 if sm == 90 else 1  # gemm_sm90, or gemm_sm80
        assert up[0] in ((many,) if T == 2048 else (0,) if T < 64 else (0, 1))  # decode, or gemm_sm80


def test_wgmma_is_for_more_rows_of_an_expert_than_decode_takes() -> None:
    """For every kind of codes; sums that gate and up's blocks activate at once are not stored, which counts."""
    for shape in (QWEN, MIXTRAL):
        count, per = shape[2:]
        paths = []
        for mean in (8, 32, 33, 64, 128, 512):
            _, (up, down) = chosen(shape, mean * count // per)
            assert up[0] == down[0]
            paths.append(up[0])
            assert mean > 32 or up[0] != 3
        assert paths[3:] == [3, 3, 3]
        assert chosen(shape, 512 * count // per, codebook=1)[1][0][0] == 3
        assert chosen(shape, 512 * count // per, sm=100)[1][0][0] == 1
    assert chosen(QWEN, 1024, activation="gelu_ungated")[1][0][0] == 1


def test_codebooks_are_given_tiles_that_they_have() -> None:
    for T in (1, 16, 64, 256, 2048):
        _, configs = chosen(QWEN, T, codebook=1)
        for path, tokens, *_ in configs:
            assert (path, tokens) in {(0, 8), (0, 32), (1, 64)} or (path == 3 and T == 2048)


# --- as compiled, and what is planted -----------------------------------------------------------------------------------------


def small_grouped(config: Config = TILES[3]) -> tuple[Call, Tensor]:
    experts = Experts.exact("w4a16_g64_asym", E, 70, 136, HALF)
    x = in_room(integers(9, 136, dtype=HALF))
    rows, offsets = rows_by_expert([3, 0, 33, 0, 1], 9)
    expected = product_by_expert(x, rows, offsets, *experts.values())
    return grouped_call(experts, x, rows, offsets, config), expected.half()


def small_block(way: str) -> tuple[Call, Tensor]:
    up, down, x, ids, routing = a_block("relu2_ungated", HALF, 6, 2)
    up, x = replace(up, bias=None), in_room(integers(6, 64, dtype=HALF, most=1) * (torch.arange(64) < 4))
    routing = torch.tensor([1.0, 0.5, 2.0])[torch.arange(12) % 3].view(6, 2)
    expected, _ = a_block_of_experts(x, ids, routing, up.values(), down.values(), "relu2_ungated")
    return block_call(up, down, x, ids, routing, "relu2_ungated", *WAYS[way]), expected.half()


def test_what_a_call_launches() -> None:
    """Four launches of few tokens, six of sorted rows; and of rows that are sorted already four."""

    assert kernels_of(small_block("pairs")[0]) == ["decode", "activate", "decode", "combine"]
    assert kernels_of(small_block("gemm32")[0]) == ["route", "gather", "gemm", "activate", "gemm", "combine"]
    assert kernels_of(small_grouped()[0]) == ["align", "gather", "gemm", "finish"]


@needs_nvcc
@pytest.mark.parametrize("which", ["rows", "pairs", pytest.param("few", marks=in_full)])
def test_the_compiled_kernels_give_the_exact_bits(which: str) -> None:
    """Interpreted, without races and without bank conflicts where it counts."""
    pytest.importorskip("numpy", minversion="2.0")
    call, expected = small_grouped() if which == "rows" else small_block(which)
    for one in interpret(calls.UNIT, call):
        assert one.outcome.races == set()
        traffic = [one.shared(opcode) for opcode in ("ldmatrix", "ld.shared", "cp.async")]
        assert {t.used / t.least for t in traffic if t.least} <= {1.0}, one.launch.kernel
    assert torch.equal(call.buffers["y"], expected)  # type: ignore[arg-type]


@in_full
@needs_nvcc
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_compiled_activations_are_those_of_the_emulator(activation: str) -> None:
    """To a step of x's type: the hardware's 2^x and CUDA's erf are not those of this machine."""
    pytest.importorskip("numpy", minversion="2.0")
    call, again = (block_call(*a_block(activation, HALF, 3, 2), activation, *WAYS["few"]) for _ in range(2))
    interpret(calls.UNIT, call)
    torch.testing.assert_close(call.buffers["y"], result(again), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_sanitizers_find_nothing(flavour: emulator.Flavour) -> None:
    for call, expected in (small_grouped(), small_grouped(FEW), small_block("pairs"), small_block("few")):
        done = emulator.replay(calls.UNIT, call, flavour, "random")
        assert done.status == 0, done.report[-2000:]
        assert torch.equal(done.buffers["y"], expected)


def test_other_rows_and_experts_would_be_seen() -> None:
    for bug in ("EXPERTS_WITHOUT_A_SLOT", "EXPERTS_PAST_THE_END"):
        calls_of = [small_grouped(), small_block("few")]
        done = [emulator.replay(calls.UNIT, call, schedule="descending", bug=bug) for call, _ in calls_of]
        assert any(d.status != 0 or not torch.equal(d.buffers["y"], y) for d, (_, y) in zip(done, calls_of)), bug


@in_full
def test_another_experts_strips_and_a_missing_barrier_would_be_seen() -> None:
    call, expected = small_grouped()
    done = emulator.replay(calls.UNIT, call, bug="EXPERTS_WRONG_STRIPS")
    assert done.status != 0 or not torch.equal(done.buffers["y"], expected)
    assert "data race" in emulator.replay(calls.UNIT, small_block("few")[0], "tsan", bug="EXPERTS_NO_BARRIER").report


# --- the ops, without a GPU -----------------------------------------------------------------------------------------------------


def test_fake_cuda_tensors_give_shapes_and_wrong_ones_are_named() -> None:
    """Meta functions of both ops; an order of columns for each expert is refused when it is packed."""
    up, *_ = exact_stack("w4a16_g64_asym", 6, 128, 64, 9, HALF, name="mma_tile")
    down, *_ = exact_stack("w4a16_g32", 6, 40, 64, 1, HALF, name="mma_tile")
    layout = LAYOUTS["mma_tile"]

    def on_cuda(given: list[Any]) -> list[Any]:
        return [torch.empty(t.shape, dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t for t in given]

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, ids = torch.empty(9, 64, dtype=HALF, device="cuda"), torch.empty(9, 2, dtype=torch.int64, device="cuda")
        rows, offsets, short = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (11, 7, 5))
        of_up, of_down = on_cuda(up.arguments(layout)), on_cuda(down.arguments(layout))
        y = torch.ops.qkernels.grouped_gemm_mma_tile(x, rows, offsets, *of_up, torch.float32)
        assert (list(y.shape), y.dtype, y.device.type) == ([11, 128], torch.float32, "cuda")
        y = torch.ops.qkernels.experts_mma_tile(x, ids, ids.float(), *of_up, *of_down, 0, 0.0, 0.0)
        assert (list(y.shape), y.dtype, y.device.type) == ([9, 40], HALF, "cuda")
        with pytest.raises(ArgumentError, match=r"offsets must be int64 \[E \+ 1\] = \[7\]"):
            torch.ops.qkernels.grouped_gemm_mma_tile(x, rows, short, *of_up, HALF)
    given = (torch.zeros(1, 64).half(), torch.zeros(1).long(), torch.zeros(7).long())
    with pytest.raises(UnsupportedProblem, match="runs on CUDA devices, got tensors on cpu"):
        torch.ops.qkernels.grouped_gemm_mma_tile(*given, *up.arguments(layout), HALF)
    plain = random_weight("w4a16_g32", 16, 64, experts=(2,))
    own = replace(plain, group_index=torch.stack([torch.arange(64) // 32, (63 - torch.arange(64)) // 32]).int())
    with pytest.raises(
        ConversionError, match=r"layout mma_tile holds one order of columns \(act-order\), got one for each"
    ):
        layout.pack(own)
