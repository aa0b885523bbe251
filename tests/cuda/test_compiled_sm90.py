"""The order of wgmma, waits and conversions that ptxas made of gemm_sm90: conversions run while products are in flight."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.nvcc import BUILDS, compile_source, complaints, find_nvdisasm, sass

from .emulator import CUDA
from .mutants import MUTANTS, write_mutant
from .units import device_sources, needs_nvcc

pytestmark = [needs_nvcc, pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm")]
(HOPPER,) = (source for source in device_sources("mma_tile") if source.name == "gemm_sm90.cu")

# The arithmetic of dequantize.cuh in pairs, which nothing else in the loop uses.
CONVERSION = re.compile(r"(HADD2|HFMA2|HMUL2|FFMA|F2FP)")
ONE_INSTANCE = """#include "gemm_sm90.cuh"
template __global__ void qkernels::cuda::gemm_wgmma<qkernels::cuda::WgmmaFormat<qkernels::cuda::BFloat16, 4, false>, 128>(
    const __grid_constant__ qkernels::cuda::WgmmaArguments);
"""


@functools.cache
def mutant(bug: str) -> Path:
    """One instance (bf16, 4 bit, 128 tokens) with a planted change."""
    folder = BUILDS / "mutants" / bug
    write_mutant(CUDA, MUTANTS[bug], folder)
    source = folder / "one_instance.cu"
    if not source.exists() or source.read_text() != ONE_INSTANCE:
        source.write_text(ONE_INSTANCE)
    return source


def test_ptxas_adds_no_waits() -> None:
    assert complaints(compile_source(HOPPER, "90a", "cubin")[1]) == []


def test_a_wait_that_ptxas_adds_would_be_seen() -> None:
    """Sums that are read without a wait: ptxas says that it puts one in."""
    assert complaints(compile_source(mutant("WGMMA_NO_WAIT"), "90a", "cubin", "WGMMA_NO_WAIT")[1])


@dataclass(frozen=True)
class Overlap:
    """Of the loop over the steps of a group, in the order of the instructions."""

    waits: list[int]  # the most wgmma that each wait between two wgmma of the loop leaves in flight
    conversions: int
    in_flight: int  # of these, with at least one wgmma committed and not waited for


def overlap(body: list[str]) -> Overlap:
    """The loop is the four wgmma that lie next to each other, up to the wait for all of them at a group's end."""
    first = next(i for i, line in enumerate(body) if line.startswith("HGMMA"))
    end = next(i for i, line in enumerate(body) if i > first and re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", line))
    while sum(line.startswith("HGMMA") for line in body[first:end]) < 4:  # a wait for all in the loop itself
        end = next(i for i in range(end + 1, len(body)) if re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", body[i]))
    pending, waits, conversions, in_flight = 0, [], 0, 0
    for line in body[first:end]:
        if line.startswith("HGMMA"):
            assert line.endswith("gsb0"), line  # a group of its own
            pending += 1
        elif depbar := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", line):
            waits.append(int(depbar[1], 16))
            pending = min(pending, waits[-1])
        elif CONVERSION.match(line):
            conversions += 1
            in_flight += pending > 0
    return Overlap(waits, conversions, in_flight)


def test_fragments_are_converted_while_wgmma_are_in_flight() -> None:
    """Every instance: no wait in the loop empties the tensor cores, and no conversion follows one."""
    kernels = sass(HOPPER, "90a")
    assert len(kernels) == 32
    for name, body in kernels.items():
        loop = overlap(body)
        assert loop.waits == [2, 2, 2, 2], (name, loop)
        assert loop.conversions >= 16, (name, loop)  # one a register at least: 4 fragments of 4
        assert loop.in_flight == loop.conversions, (name, loop)


def test_a_loop_that_waits_before_it_converts_would_be_seen() -> None:
    (body,) = sass(mutant("WGMMA_SERIAL"), "90a", "WGMMA_SERIAL").values()
    loop = overlap(body)
    assert 0 in loop.waits
    assert loop.in_flight < loop.conversions
