"""Every Triton kernel executed from its compiled PTX, through the launcher, against `QuantTensor.dequantize()`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from qkernels import QuantTensor
from qkernels.kernels.triton import jit, launch
from qkernels.kernels.triton.table import Config, choose, read
from qkernels.layouts import LAYOUTS
from tests.cuda.ptx.program import PtxError
from tests.strategies import random_weight

from .executed import OPTIONS, Executed, specialized
from .problems import BUFFERS, exact_problem, numbers

KERNELS = ("gemv", "gemm", "reduce_parts", "dequantize")
GEMV = Config("gemv", 1, 16, 64, 0, 4, 2)
GEMM = Config("gemm", 16, 32, 64, 0, 2, 2)
DEQUANTIZE = Config("dequantize", 1, 16, 64, 0, 4, 1)
FULL = bool(os.environ.get("QKERNELS_TEST_FULL"))
DTYPES = [torch.float16, torch.bfloat16]
# In a full run each of these in both dtypes; else one, since a weight is fp32 before it meets x.
SCHEMES = ["w4a16_g16_fzero", "w8a16_channel", "nf4_g64"]
# With shifts, bytes and products of their own.
OTHERS = ["w3a16_g24_offset", "mxfp4_g32", "q6_k", "nvfp4_g16"]
OTHERS += ["fp8_channel", "iq4_xs", "q2_k", "q4_k", "q5_k"] if FULL else []
formats = pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        *(("w4a16_g64_asym", dtype) for dtype in DTYPES),
        *((scheme, dtype) for scheme in SCHEMES for dtype in DTYPES if FULL or dtype == torch.float16),
        *((scheme, torch.bfloat16) for scheme in OTHERS),
    ],
    ids=lambda value: {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(value, value),
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
configs = pytest.mark.parametrize("config", [GEMV, GEMM], ids=["gemv", "gemm"])
SHIPPED = [
    pytest.param(sm, config, id=f"{sm}-{config.kernel}-{config.block_m}x{config.block_n}x{config.block_k}")
    for sm in ("sm80", "sm90", "sm120")  # one for each kind of PTX that Triton writes
    for config in dict.fromkeys(entry.config for entry in read()[sm])
    if not (sm == "sm90" and config.kernel == "gemm" and config.num_warps >= 4)  # wgmma
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Binaries of this run only, each made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Executed]]:
    """Replaces the launcher's kernels by compiled ones; new memory holds NaN, so that what a kernel leaves out shows."""

    def new_empty(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype or t.dtype)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)

    def compiled(sm: str = "sm80", **others: Any) -> dict[str, Executed]:
        made = {name: Executed(getattr(jit, name), sm, **others) for name in KERNELS}
        for name, kernel in made.items():
            monkeypatch.setattr(jit, name, kernel)
        return made

    return compiled


def buffers(weight: QuantTensor) -> list[Tensor | None]:
    packed = LAYOUTS["kpack"].pack(weight)
    return [packed[name] for name in BUFFERS]


def dequantized(weight: QuantTensor, dtype: torch.dtype) -> Tensor:
    return launch.dequantize(*buffers(weight), weight.N, weight.K, *numbers(weight), dtype)


def product(weight: QuantTensor, x: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    return launch.gemm(x, *buffers(weight), bias, weight.N, *numbers(weight), config=config)


def races(made: dict[str, Executed]) -> set[str]:
    """Without two warps that store the same bytes: with more warps than a tile needs, Triton lets them."""
    found = set().union(*(outcome.races for kernel in made.values() for outcome in kernel.outcomes))
    return {race for race in found if not race.startswith("repeated write")}


@pytest.mark.parametrize(("sm", "config"), SHIPPED)
def test_shipped_configuration(kernels: Any, sm: str, config: Config) -> None:
    made = kernels(sm)
    M = config.block_m + 5 if config.kernel == "gemm" else 2
    weight, x, bias, expected = exact_problem("w4a16_g128_asym", M, config.block_n + 6, 512, torch.float16)
    assert torch.equal(product(weight, x, bias, config), expected)
    assert len(made[config.kernel].outcomes) == 1
    assert races(made) == set()


@formats
@configs
def test_product_is_exact_where_bits_are_exact(kernels: Any, scheme: str, dtype: torch.dtype, config: Config) -> None:
    """Also with the columns in another order, without a bias, and with a single row, column and token."""
    made = kernels()
    for M, N, K, act_order in ((3, 70, 200, True), (1, 1, 1, False), (1, 16, 64, False)):
        weight, x, bias, expected = exact_problem(scheme, M, N, K, dtype, act_order)
        assert torch.equal(product(weight, x, bias, config), expected)
        without = (x.double() @ weight.dequantize().double().T).to(dtype)
        assert torch.equal(product(weight, x, None, config), without)
    assert races(made) == set()


@configs
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 64), (1, 64, 1), (2, 1, 1), (16, 16, 16), (3, 33, 49), (2, 15, 201)],
    ids="{0[0]}x{0[1]}x{0[2]}".format,
)
def test_odd_shapes(kernels: Any, shape: tuple[int, int, int], config: Config) -> None:
    """Triton compiles a number 1 into the code, and numbers and addresses that are multiples of 16 apart from others."""
    made, (M, N, K) = kernels(), shape
    for scheme in ("w4a16_g24_asym", "w8a16_channel"):
        weight, x, bias, expected = exact_problem(scheme, M, N, K, torch.bfloat16)
        unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(M, K)
        for given in (x, unaligned):
            assert torch.equal(product(weight, given, bias, config), expected)
        assert torch.equal(dequantized(weight, torch.bfloat16), weight.dequantize(torch.bfloat16))
    assert races(made) == set()


@formats
def test_dequantize_is_bit_identical(kernels: Any, scheme: str, dtype: torch.dtype) -> None:
    made = kernels()
    for N, K, act_order in ((70, 200, True), (1, 1, False), (64, 64, False)):
        weight = random_weight(scheme, N, K, act_order=act_order)
        assert torch.equal(dequantized(weight, dtype), weight.dequantize(dtype))
    assert races(made) == set()


@configs
@dtypes
@pytest.mark.parametrize("programs_per_sm", [2, 64])
def test_splits_add_up(kernels: Any, config: Config, dtype: torch.dtype, programs_per_sm: int) -> None:
    made = kernels()
    weight, x, bias, expected = exact_problem("w4a16_g32_asym", 1, 40, 500, dtype)
    assert torch.equal(product(weight, x, bias, replace(config, programs_per_sm=programs_per_sm)), expected)
    assert len(made["reduce_parts"].outcomes) == 1
    assert races(made) == set()


@dataclass
class Recorded:
    """Stands in for a kernel, launches nothing, and keeps what Triton would compile for each launch."""

    kernel: Any
    binaries: list[str] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*args: Any, **named: Any) -> None:
            values = dict(zip(self.kernel.arg_names, args)) | {k: v for k, v in named.items() if k not in OPTIONS}
            options = {k: v for k, v in named.items() if k in OPTIONS}
            self.binaries.append(repr((specialized(self.kernel, values), options)))

        return launched


def test_no_number_of_tokens_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all numbers of tokens there are as many binaries as tiles, split or not: 4 tokens after 3 compile nothing."""
    made = {name: Recorded(getattr(jit, name)) for name in KERNELS}
    for name, kernel in made.items():
        monkeypatch.setattr(jit, name, kernel)
    weight = random_weight("w4a16_g64_asym", 512, 256)
    seen: dict[Any, set[str]] = {}
    for M in [*range(1, 140), 255, 256, 257, 1000, 2048, 4096]:
        config = choose("sm90", M, 512, 256)
        reductions = len(made["reduce_parts"].binaries)
        product(weight, torch.zeros(M, 256, dtype=torch.float16), None, config)
        split = len(made["reduce_parts"].binaries) > reductions
        seen.setdefault((config, split), set()).add(made[config.kernel].binaries[-1])
    assert all(len(binaries) == 1 for binaries in seen.values())
    assert len(seen) > 5  # several tiles were met
    assert len(set(made["reduce_parts"].binaries)) == 1


# --- controls: each of the checks above can fail ------------------------------------------------------------------------------


def once(pattern: str, by: str) -> Callable[[str], str]:
    """Changes the first instruction that matches."""

    def mutate(ptx: str) -> str:
        mutated, count = re.subn(pattern, by, ptx, count=1)
        assert count == 1, f"no {pattern} in the PTX"
        return mutated

    return mutate


@pytest.mark.parametrize(
    ("kernel", "pattern", "by"),
    [
        ("gemv", r"(or\.b32[^;]*), 1132462080;", r"\1, 1132494848;"),
        ("gemm", r"(and\.b32[^;]*), 491520;", r"\1, 229376;"),
        ("gemv", r"(shfl\.sync\.bfly\.b32[^;]*), 1, 31", r"\1, 2, 31"),
        ("gemm", r"(cvt\.rn\.f16x2\.f32\s+%\w+), (%\w+), (%\w+);", r"\1, \3, \2;"),
        ("gemm", r"(mma\.sync[^;]*\}, \{)([^}]*)(\}, \{)([^}]*)\};", r"\1\4\3\2};"),
        ("reduce_parts", r"add(\.f32)", r"sub\1"),
        ("dequantize", r"(and\.b32[^;]*), 7864320;", r"\1, 3670016;"),
        ("dequantize", r"@%p\d+ st\.global[^;]*;", ""),
    ],
    ids=[
        "exponent",
        "mask",
        "shuffle",
        "halves swapped",
        "operands swapped",
        "sign",
        "mask of the other half",
        "no store",
    ],
)
def test_a_mutated_instruction_is_noticed(kernels: Any, kernel: str, pattern: str, by: str) -> None:
    kernels()[kernel].mutate = once(pattern, by)
    if kernel == "dequantize":
        weight = random_weight("w4a16_g64_asym", 70, 200)
        assert not torch.equal(dequantized(weight, torch.float16), weight.dequantize(torch.float16))
        return
    weight, x, bias, expected = exact_problem("w4a16_g64_asym", 3, 70, 200, torch.float16)
    config = GEMM if kernel == "gemm" else GEMV
    splits = 64 if kernel == "reduce_parts" else 0
    assert not torch.equal(product(weight, x, bias, replace(config, programs_per_sm=splits)), expected)


def test_a_missing_barrier_is_noticed(kernels: Any) -> None:
    made = kernels(mutate=lambda ptx: ptx.replace("bar.sync", "// bar.sync"))
    weight, x, bias, _ = exact_problem("w4a16_g64_asym", 17, 70, 200, torch.float16)
    product(weight, x, bias, GEMM)
    assert any(race.startswith(("read", "write")) for race in races(made))


def test_a_read_past_the_end_is_noticed(kernels: Any) -> None:
    kernels()
    weight, x, bias, _ = exact_problem("w4a16_channel", 1, 128, 256, torch.float16)
    qweight, *others = buffers(weight)
    assert qweight is not None
    with pytest.raises(PtxError, match="global access out of bounds"):
        launch.gemm(x, qweight[:1].clone(), *others, bias, 128, *numbers(weight), config=GEMV)


def test_what_cannot_be_executed_is_an_error(kernels: Any) -> None:
    """sm90 multiplies 64 tokens and more with wgmma, which the interpreter does not have: refused, not skipped."""
    kernels("sm90")
    weight, x, bias, _ = exact_problem("w4a16_g64_asym", 64, 64, 128, torch.float16)
    with pytest.raises(PtxError, match="unsupported: (wgmma|fence)"):
        product(weight, x, bias, Config("gemm", 64, 64, 64, 0, 8, 3))
