"""No register of a wgmma in flight is touched, in any instance of the Hopper kernels; and a hazard that is planted is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.guard_cuda import kernel_texts
from tools.nvcc import BUILDS, NVCC, find_nvdisasm

from .emulator import CUDA
from .hazards import hazards
from .mutants import MUTANTS, write_mutant
from .units import device_sources

needs_tools = pytest.mark.skipif(NVCC is None or find_nvdisasm() is None, reason="no nvcc, or no nvdisasm")
HOPPER = {s.name: s for s in device_sources("mma_tile") if s.name in ("gemm_sm90.cu", "gemm_a8_sm90.cu")}
GROUPS_OF_32 = """#include "gemm_a8_sm90.cuh"
template __global__ void qkernels::cuda::gemm_a8_wgmma<4, true, 64>(
    const __grid_constant__ qkernels::cuda::WgmmaA8Arguments);
"""


@needs_tools
@pytest.mark.parametrize(("name", "instances"), [("gemm_sm90.cu", 32), ("gemm_a8_sm90.cu", 10)])
def test_nothing_touches_the_registers_of_a_wgmma_in_flight(name: str, instances: int) -> None:
    kernels = kernel_texts(HOPPER[name], "90a")
    assert len(kernels) == instances
    for kernel, lines in kernels.items():
        wrong, overlapped = hazards(lines)
        assert wrong == [], (kernel, wrong)
        assert overlapped >= (0 if "ELb1E" in kernel and "a8" in kernel else 2), kernel  # which wait for each group


@needs_tools
def test_a_loop_that_would_go_round_is_a_hazard() -> None:
    """Groups of 32 without the end of their loop: its second round writes a fragment that is in flight."""
    folder: Path = BUILDS / "mutants" / "IGMMA_GROUPS_GO_ROUND"
    write_mutant(CUDA, MUTANTS["IGMMA_GROUPS_GO_ROUND"], folder)
    source = folder / "one_instance.cu"
    if not source.exists() or source.read_text() != GROUPS_OF_32:
        source.write_text(GROUPS_OF_32)
    (lines,) = kernel_texts(source, "90a").values()
    wrong, _ = hazards(lines)
    assert any("writes the fragment" in sentence for sentence in wrong), wrong


LOOP = [
    "        /*0000*/                   MOV R4, R1 ;",
    ".L_x_1:",
    "        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;",
    "        /*0020*/                   LDS.128 R8, [R2] ;",
    "        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;",
    "        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
    "        /*0050*/                   LOP3.LUT R5, R3, 0xf, RZ, 0xc0, !PT ;",
    "        /*0060*/               @P0 BRA `(.L_x_1) ;",
    "        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
    "        /*0080*/                   FADD R24, R24, R25 ;",
    "        /*0090*/                   EXIT ;",
]


def test_the_back_edge_is_followed() -> None:
    """The load of R8 is right in the first round and wrong in the second, when the wgmma of the first still reads it."""
    wrong, overlapped = hazards(LOOP)
    assert len(wrong) == 1
    assert "0020" in wrong[0]
    assert "writes the fragment" in wrong[0]
    assert overlapped == 2
    healthy = [line.replace("gsb0, 0x1", "gsb0, 0x0") for line in LOOP]
    assert hazards(healthy)[0] == []
    early = [line for line in LOOP if "gsb0, 0x0" not in line]
    assert any("touches the sums" in sentence for sentence in hazards(early)[0])
