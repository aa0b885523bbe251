"""The Triton kernels of stacked experts executed from their compiled PTX, through the launcher."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from qkernels.kernels.triton import grouped_jit, grouped_launch
from qkernels.kernels.triton.table import Config, choose, for_stacks, read
from qkernels.layouts import LAYOUTS
from qkernels.ops.grouped import ACTIVATIONS, Stack
from tests.cuda.ptx.program import PtxError

from .executed import Executed
from .problems import ALPHA, LIMIT, a_block_of_experts, exact_stack, product_by_expert, rows_by_expert
from .test_executed import own_cache, races  # noqa: F401, a fixture of every test here

KERNELS = ("align", "gemv_pairs", "gemm_blocks", "combine")
E, HALF, BRAIN = 3, torch.float16, torch.bfloat16
TILE = Config("gemm", 16, 32, 64, 0, 2, 2)
ROW = Config("gemv", 1, 16, 64, 0, 4, 2)
paths = pytest.mark.parametrize("config", [ROW, TILE], ids=["pairs", "sorted"])
SHIPPED = [
    pytest.param(sm, config, id=f"{sm}-{config.kernel}-{config.block_m}x{config.block_n}x{config.block_k}")
    for sm in ("sm80", "sm90", "sm120")  # one for each kind of PTX that Triton writes
    for config in dict.fromkeys(entry.config for entry in read()[sm] if for_stacks(entry.config))
    if config.block_m <= 16 or (sm == "sm80" and config.num_warps < 4)  # larger ones differ in size alone, or are wgmma
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Executed]]:
    """Replaces the launcher's kernels by compiled ones; new memory holds NaN or far too large integers."""

    def new_empty(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or t.dtype
        return torch.full(shape, float("nan") if dtype.is_floating_point else 2**30, dtype=dtype)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)

    def compiled(sm: str = "sm80", **others: Any) -> dict[str, Executed]:
        made = {name: Executed(getattr(grouped_jit, name), sm, **others) for name in KERNELS}
        for name, kernel in made.items():
            monkeypatch.setattr(grouped_jit, name, kernel)
        return made

    return compiled


def grouped_gemm(x: Tensor, rows: Tensor, offsets: Tensor, stack: Stack, dtype: torch.dtype, config: Config) -> Tensor:
    return grouped_launch.grouped_gemm(x, rows, offsets, *stack.arguments(LAYOUTS["kpack"]), dtype, config=config)


def experts(x: Tensor, ids: Tensor, routing: Tensor, up: Stack, down: Stack, activation: str, config: Config) -> Tensor:
    layout, numbers = LAYOUTS["kpack"], (ACTIVATIONS.index(activation), ALPHA, LIMIT)
    return grouped_launch.experts(
        x, ids, routing, *up.arguments(layout), *down.arguments(layout), *numbers, configs=(config, config)
    )


@pytest.mark.parametrize(("sm", "config"), SHIPPED)
def test_shipped_configuration(kernels: Any, sm: str, config: Config) -> None:
    """A block that is full, one that is not, an expert without rows and rows of none."""
    made = kernels(sm)
    stack, x, weights, bias = exact_stack("w4a16_g128_asym", E, config.block_n + 6, 256, 4, HALF)
    rows, offsets = rows_by_expert([config.block_m + 1, 0, 2], 4)
    expected = product_by_expert(x, rows, offsets, weights, bias)
    assert torch.equal(grouped_gemm(x, rows, offsets, stack, HALF, config), expected.half())
    assert len(made["gemm_blocks"].outcomes) == len(made["align"].outcomes) == 1
    assert races(made) == set()


@paths
@pytest.mark.parametrize("scheme", ["w4a16_g16_fzero", "w8a16_channel", "nf4_g64", "q4_k", "nvfp4_g16"])
def test_blocks_of_schemes_are_exact_where_bits_are_exact(kernels: Any, scheme: str, config: Config) -> None:
    """As in the interpreter (`interpreted_grouped`), where a codebook's bound is told."""
    made = kernels()
    up, x, *of_up = exact_stack(scheme, E, 24, 256 if scheme[0] in "qn" else 96, 3, BRAIN)
    down, _, *of_down = exact_stack("w2a16_g8", E, 20, 24, 1, BRAIN)
    ids, routing = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1.0, 0.5], [2.0, 1.0]])
    x = torch.eye(x.shape[1])[[1, 70]].bfloat16()
    up, of_up[1] = up._replace(bias=None), of_up[1] * 0
    got = experts(x, ids, routing, up, down, "relu2_ungated", config)
    weights = (of_up[0], of_up[1]), (of_down[0], of_down[1])
    expected, size = a_block_of_experts(x, ids, routing, *weights, "relu2_ungated")
    if scheme == "nf4_g64":
        assert bool(((got - expected).abs() <= 4.02 * 2**-8 * size).all())
    else:
        assert torch.equal(got, expected.bfloat16())
    assert races(made) == set()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_block_is_what_its_products_are(kernels: Any, activation: str) -> None:
    """The bound is told in `interpreted_grouped`. Both paths in turn."""
    made = kernels()
    config, dtype = (TILE, HALF) if len(activation) % 2 else (ROW, BRAIN)
    gated = not activation.endswith("_ungated")
    up, x, *of_up = exact_stack("w4a16_g32_asym", E, 40 if gated else 20, 64, 2, dtype)
    down, _, *of_down = exact_stack("w8a16_g8", E, 40, 20, 1, dtype)
    ids, routing = torch.tensor([[0, 2], [1, E]]), torch.rand(2, 2)
    got = experts(x / 4, ids, routing, up, down, activation, config)
    weights = (of_up[0], of_up[1]), (of_down[0], of_down[1])
    truth, size = a_block_of_experts(x / 4, ids, routing, *weights, activation)
    u = torch.finfo(dtype).eps / 2
    assert bool(((got.double() - truth).abs() <= 2.01 * u * size + u * truth.abs() + 1e-5 * size).all())
    assert races(made) == set()


@pytest.mark.parametrize("counts", [[1, 0, 0], [0, 0, 0], [40, 1, 15]], ids=str)
def test_alignment(kernels: Any, counts: list[int]) -> None:
    """Scans over segments, one or several warps of them (E = 3 and 200)."""
    made = kernels()
    for extra in (0, 197):
        offsets = torch.tensor([0, *counts, *[0] * extra]).cumsum(0)
        total = int(offsets[-1]) + 2
        begin, end, expert = grouped_launch._aligned(offsets, total, 8).tolist()
        found = {r: e for b, n, e in zip(begin, end, expert) for r in range(b, min(b + 8, n))}
        owners = [e for e, n in enumerate(counts) for _ in range(n)]
        assert found == dict(enumerate([*owners, *[len(offsets) - 1] * 2]))
    assert races(made) == set()


def test_no_number_of_tokens_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many binaries as tiles."""
    from .test_executed import Recorded

    made = {name: Recorded(getattr(grouped_jit, name)) for name in KERNELS}
    for name, kernel in made.items():
        monkeypatch.setattr(grouped_jit, name, kernel)
    monkeypatch.setattr(grouped_launch, "card_of", lambda _: ("sm90", 132))
    up, *_ = exact_stack("w4a16_g64", 8, 512, 256, 1, HALF)
    down, *_ = exact_stack("w4a16_g64", 8, 256, 256, 1, HALF)
    layout, tiles = LAYOUTS["kpack"], set()
    for T in (1, 2, 3, 5, 8, 17, 64, 65, 200, 201, 1000):
        x, ids, routing = torch.zeros(T, 256).half(), torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
        grouped_launch.experts(x, ids, routing, *up.arguments(layout), *down.arguments(layout), 0, 0.0, 0.0)
        tiles.add(choose("sm90", -(-2 * T // 8), 512, 256) if 4 * T > 8 else None)
    assert len(set(made["gemv_pairs"].binaries)) == 2
    assert 4 < len(set(made["gemm_blocks"].binaries)) <= 2 * len(tiles)
    assert len(set(made["combine"].binaries)) == 1


def test_pairs_without_sorting_where_an_expert_is_seldom_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with a user's table that has a tile of tensor cores for one token, sorted rows for both products."""
    better = grouped_launch.unsorted_is_better
    assert [better(T, 8 * T, 128) for T in (1, 8, 9)] == [True, True, False]  # Qwen3-30B-A3B
    assert [better(T, 2 * T, 8) for T in (1, 2, 3)] == [True, True, False]  # Mixtral
    up, *_ = exact_stack("w4a16_g64", 8, 512, 256, 1, HALF)
    weight = grouped_launch._weight_of(up)
    x = torch.zeros(1, 256).half()
    assert {c.kernel for c in grouped_launch._configs(x, 1, 2, weight, weight)} == {"gemv"}
    monkeypatch.setattr(grouped_launch, "choose", lambda _, M, N, K: Config("dequantize", 1, 16, 128, 0, 4, 1))
    assert {c.kernel for c in grouped_launch._configs(x, 1, 2, weight, weight)} == {"gemm"}


# --- controls: each of the checks above can fail ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "pattern", "by"),
    [
        ("align", r"redux\.sync\.add\.s32\s+(%r\d+), (%r\d+), %r\d+", r"mov.b32 \1, \2"),
        ("gemm_blocks", r"(mma\.sync[^;]*\}, \{)([^}]*)(\}, \{)([^}]*)\};", r"\1\4\3\2};"),
        ("gemv_pairs", r"(shfl\.sync\.bfly\.b32[^;]*), 1, 31", r"\1, 2, 31"),
        ("combine", r"@%p\d+ st\.global[^;]*;", ""),
    ],
)
def test_a_mutated_instruction_is_noticed(kernels: Any, kernel: str, pattern: str, by: str) -> None:
    def mutate(ptx: str) -> str:
        mutated, count = re.subn(pattern, by, ptx, count=1)
        assert count == 1, f"no {pattern} in the PTX"
        return mutated

    kernels()[kernel].mutate = mutate
    up, x, *of_up = exact_stack("w4a16_g32", E, 20, 64, 2, BRAIN)
    down, _, *of_down = exact_stack("w2a16_g8", E, 20, 20, 1, BRAIN)
    up, of_up[1] = up._replace(bias=None), of_up[1] * 0
    ids, routing = torch.tensor([[0, 2], [1, 0]]), torch.ones(2, 2)
    x = torch.eye(64)[[1, 40]].bfloat16()
    try:
        got = experts(x, ids, routing, up, down, "relu2_ungated", ROW if kernel == "gemv_pairs" else TILE)
    except PtxError:
        return  # blocks of nonsense read out of bounds
    weights = (of_up[0], of_up[1]), (of_down[0], of_down[1])
    assert not torch.equal(got, a_block_of_experts(x, ids, routing, *weights, "relu2_ungated")[0].bfloat16())


def test_an_expert_past_the_end_is_noticed(kernels: Any) -> None:
    kernels()
    stack, x, _, _ = exact_stack("w4a16_channel", E, 64, 64, 2, HALF)
    rows, offsets = rows_by_expert([0, 0, 2], 2)
    given = stack.arguments(LAYOUTS["kpack"])
    given[1] = given[1][:2].clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkernels.ops.grouped.check_stack", lambda *_: E)
        with pytest.raises(PtxError, match="global access out of bounds"):
            grouped_launch.grouped_gemm(x, rows, offsets, *given, HALF, config=TILE)
