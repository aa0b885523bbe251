"""The shipped configurations, compiled for every card they are for: no spills, and shared memory that the card has."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from qkernels import QuantScheme
from qkernels.kernels.triton import grouped_jit, jit
from qkernels.kernels.triton.table import Config, choose, for_stacks, read
from qkernels.ops.grouped import ACTIVATIONS
from tools.guard_triton import copies_ahead
from tools.triton_aot import SHARED_MEMORY, Machine, compile_for, grouped_variant, variant

# Cards of the table, and those that "default" may meet: the ones with the least shared memory and the oldest.
CARDS = [(card, sm) for card in read() for sm in ([card] if card in SHARED_MEMORY else ["sm80", "sm120"])]
SHIPPED = [
    pytest.param(sm, config, id=f"{sm}-{config.kernel}-{config.block_m}x{config.block_n}x{config.block_k}")
    for sm, config in dict.fromkeys((sm, entry.config) for card, sm in CARDS for entry in read()[card])
]
FULL = bool(os.environ.get("QKERNELS_TEST_FULL"))
# Experts take the tiles of tensor cores and those of one row (`grouped_launch`).
GROUPED_RUNS = [
    pytest.param(sm, config, id=f"{sm}-{config.kernel}-{config.block_m}x{config.block_n}x{config.block_k}")
    for sm in (SHARED_MEMORY if FULL else ["sm80"])
    for config in dict.fromkeys(
        entry.config for entry in read()[sm] if entry.config.kernel == "gemv" or for_stacks(entry.config)
    )
]
# `make test-full` compiles every format for every card; `make test` for the one with the oldest compiler rules.
FORMAT_RUNS = [
    pytest.param(sm, config, id=f"{sm}-{config.kernel}-{config.block_m}x{config.block_n}x{config.block_k}")
    for sm in (SHARED_MEMORY if FULL else ["sm80"])
    for config in dict.fromkeys(entry.config for entry in read()[sm])
]
FIRST_CALL_SECONDS = 2.0  # what a first call may take; 0.4 to 0.8 are used (README.md)
SCHEMES = [
    "w4a16_g32_asym",
    "w4a16_g128_fzero",
    "w4a16_g64_offset",
    "w8a16_g128",
    "w8a16_g32_asym",
    "nf4_g64",
    "q4_k",
    "q6_k",
    "nvfp4_g16",
]
SCHEMES += ["mxfp4_g32", "fp8_channel", "q2_k", "q3_k", "q5_k", "iq4_xs"] if FULL else []
# Of the widths that lie in planes, without an order of columns, where x is copied ahead and takes the most shared memory.
PLANES = ["w5a16_g128", *(["w2a16_g32_asym", "w3a16_g128", "w6a16_g64"] if FULL else [])]
K = 4096


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(sm: str, config: Config, scheme: str, dtype: str, *, ordered: bool = False) -> Machine:
    """One call of the launcher: split where the configuration splits, with bias where it does not."""
    split = config.programs_per_sm > 0
    call = variant(QuantScheme.parse(scheme), K, dtype, config, ordered=ordered, bias=not split, split=split)
    return compile_for(sm, *call, num_warps=config.num_warps, num_stages=config.num_stages)


def check(machine: Machine, sm: str) -> None:
    assert machine.stack == machine.local == 0, f"spills: {machine.registers} registers, {machine.stack} bytes of stack"
    assert machine.shared <= SHARED_MEMORY[sm]


@pytest.mark.parametrize(("sm", "config"), SHIPPED)
def test_shipped_configuration(sm: str, config: Config) -> None:
    machine = compiled(sm, config, "w4a16_g128", "fp16")
    check(machine, sm)
    assert machine.seconds < FIRST_CALL_SECONDS
    assert ("mma" in machine.ptx) == (config.kernel == "gemm"), "tensor cores where they are meant, and only there"
    assert not re.search(r"cvt\.rn\.\w+\.[us]\d", machine.ptx), "codes are not converted from integers"
    if config.kernel == "gemv":
        assert copies_ahead(machine.ptx) >= 12, "Triton pipelines a loop without tl.dot only where the loop says so"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("sm", "config"), FORMAT_RUNS)
def test_every_format(sm: str, config: Config, scheme: str) -> None:
    check(compiled(sm, config, scheme, "bf16", ordered=True), sm)


@pytest.mark.parametrize("scheme", PLANES)
@pytest.mark.parametrize(("sm", "config"), FORMAT_RUNS)
def test_every_width(sm: str, config: Config, scheme: str) -> None:
    machine = compiled(sm, config, scheme, "bf16")
    check(machine, sm)
    if config.kernel == "gemv":
        assert copies_ahead(machine.ptx) >= 3 * (config.num_stages - 1)


@pytest.mark.parametrize("sm", SHARED_MEMORY)
def test_reduction_and_dequantize(sm: str) -> None:
    check(
        compile_for(
            sm, jit.reduce_parts, {"parts": "*fp32", "bias": "*fp16", "out": "*fp16"}, {"BIAS": True, "BLOCK": 1024}
        ),
        sm,
    )
    tile = Config("dequantize", 1, 16, 128, 0, 4, 1)
    call = variant(QuantScheme.parse("w4a16_g128_asym"), K, "fp16", tile, ordered=True, bias=False, split=False)
    check(compile_for(sm, *call, enable_fp_fusion=False), sm)


@pytest.mark.parametrize("first", [True, False], ids=["up", "down"])
@pytest.mark.parametrize(("sm", "config"), GROUPED_RUNS)
def test_shipped_configuration_with_experts(sm: str, config: Config, first: bool) -> None:
    """The first product ends in a gate, which takes two halves of a tile together."""
    scheme, act = QuantScheme.parse("w4a16_g128"), ACTIVATIONS.index("silu")
    call = grouped_variant(scheme, K, "bf16", config, act=act, bias=False, first=first)
    machine = compile_for(sm, *call, num_warps=config.num_warps, num_stages=config.num_stages)
    check(machine, sm)
    assert machine.seconds < FIRST_CALL_SECONDS
    assert ("mma" in machine.ptx) == (config.kernel == "gemm")
    if config.kernel == "gemv":
        assert copies_ahead(machine.ptx) >= 12


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    for M in (1, 8) if FULL else (8,):
        config = choose("sm80", M, K, K)
        call = grouped_variant(
            QuantScheme.parse("mxfp4_g32"), K, "bf16", config, act=ACTIVATIONS.index(activation), bias=True, first=True
        )
        check(compile_for("sm80", *call, num_warps=config.num_warps, num_stages=config.num_stages), "sm80")


@pytest.mark.parametrize("sm", SHARED_MEMORY if FULL else ["sm80"])
def test_alignment_and_combination(sm: str) -> None:
    types: dict[str, str | None] = {"offsets": "*i64", "blocks": "*i32"}
    check(compile_for(sm, grouped_jit.align, types, {"SIZE": 64, "SEGMENTS": 512}), sm)
    types = {"y": "*fp32", "ids": "*i64", "weights": "*fp32", "out": "*bf16"}
    check(compile_for(sm, grouped_jit.combine, types, {"BLOCK": 1024}), sm)


def test_a_tile_that_no_card_holds_is_noticed() -> None:
    """Control: Triton compiles it without a word, and both checks see it."""
    config = next(entry.config for entry in read()["sm80"] if entry.M == 64)
    machine = compiled("sm80", replace(config, block_m=256, block_n=256, num_warps=4), "w4a16_g128", "fp16")
    with pytest.raises(AssertionError):
        check(machine, "sm80")
