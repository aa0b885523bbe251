"""What nvcc makes of gemm_a8_sm90: integer wgmma from registers, TMA, and no wait but those that are written."""

from __future__ import annotations

import re

import pytest

from tools.nvcc import ARCHITECTURES, compile_source, complaints, find_nvdisasm, sass, usages

from .units import device_sources, needs_nvcc

pytestmark = [needs_nvcc, pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm")]
(SOURCE,) = (source for source in device_sources("mma_tile") if source.name == "gemm_a8_sm90.cu")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")
UNPACKED = re.compile(r"LOP3\.LUT.*0x(80808080|f0f0f0f0)")  # the last instruction of each register of a fragment


def tokens_of(name: str) -> int:
    return int(re.findall(r"ELi(\d+)EEEv", name)[0])


def test_integer_wgmma_and_tma() -> None:
    kernels = sass(SOURCE, "90a")
    assert len(kernels) == 10
    _, report = compile_source(SOURCE, "90a", "cubin")
    assert complaints(report) == []
    for usage in usages(report):
        assert (usage.stack, usage.spill_stores, usage.spill_loads) == (0, 0, 0), usage
    for name, body in kernels.items():
        text = "\n".join(body)
        assert re.search(rf"^IGMMA\.64x{tokens_of(name)}x32\.S8\.S8 R\d+, R\d+, gdesc", text, re.MULTILINE), name
        for instruction in (r"UTMALDG\.3D", "UBLKCP", r"SYNCS\.PHASECHK", r"USETMAXREG\.DEALLOC", "USETMAXREG"):
            assert re.search(rf"^{instruction}", text, re.MULTILINE), (name, instruction)
        assert not re.search(r"^(LDL|STL)", text, re.MULTILINE), name


def test_codes_are_unpacked_while_a_wgmma_is_in_flight() -> None:
    """Groups of 64 and more: of the loop's two wgmma one stays in flight at each wait, and fragments are finished after them.
    Groups of 32 wait for each wgmma, since each is a group."""
    for name, body in sass(SOURCE, "90a").items():
        first = next(i for i, line in enumerate(body) if line.startswith("IGMMA"))
        end = next(i for i, line in enumerate(body) if i > first and (wait := WAIT.match(line)) and wait[1] == "0")
        loop, groups32 = body[first:end], "ELb1E" in name
        waits = [wait[1] for line in loop if (wait := WAIT.match(line))]
        assert waits == ([] if groups32 else ["1", "1"]), name
        assert sum(line.startswith("IGMMA") for line in loop) == (1 if groups32 else 2), name
        assert groups32 or sum(bool(UNPACKED.match(line)) for line in loop) >= 8, name  # a register each


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "90a"])
def test_other_architectures_trap_instead(arch: str) -> None:
    for name, body in sass(SOURCE, arch).items():
        assert any(line.startswith("BPT.TRAP") for line in body), name
