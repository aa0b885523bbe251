"""What nvcc says of the kernels for every architecture, and the instructions that it chose."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from .calls import PATHS, TYPES
from .compiled import (
    ARCHITECTURES,
    NVCC,
    REGISTERS,
    SHARED_LIMITS,
    compile_source,
    compiled_usages,
    device_sources,
    find_nvdisasm,
    needs_nvcc,
    sass,
    usages,
)
from .emulator import WHY_NOT, Call, Launch, record, run

pytestmark = needs_nvcc
needs_nvdisasm = pytest.mark.skipif(NVCC is not None and find_nvdisasm() is None, reason="no nvdisasm")
recorded = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)

MULTIPROCESSORS = {"80": 108, "86": 82, "89": 128, "90a": 132, "120": 170}  # A100, RTX 3090, 4090, H200, RTX 5090


@every_architecture
def test_no_kernel_spills(arch: str) -> None:
    kernels = compiled_usages("mma_tile", arch)
    assert 40 < len(kernels) <= 96  # what a build of six minutes has room for
    for kernel in kernels.values():
        assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), kernel
        assert kernel.static_shared == 0, kernel


def chosen(arch: str, M: int, N: int, K: int, bits: int, half: bool) -> list[Launch]:
    """The launches of the configuration that heuristics.h chooses. They are recorded, so no such weight need exist."""
    shape = {"M": M, "N": N, "K": K, "bits": bits, "half_accumulate": 0, "decode_only": 0}
    config, ns, text = (
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(512, dtype=torch.int8),
    )
    card = {
        "group_bytes": 128,
        "short_groups": 0,
        "float_zeros": 0,
        "half": int(half),
        "aligned": 1,
        "sm": int(arch.rstrip("a")),
        "multiprocessors": MULTIPROCESSORS[arch],
    }
    run("mma_tile", Call("choose", {"config": config, "ns": ns, "text": text}, {**shape, **card}))
    names = ("path", "tokens", "warps_n", "warps_k", "splits", "half_accumulate")
    values = dict(zip(names, config.tolist()))
    if values["path"] == PATHS["dequantize"]:
        return []
    some = torch.zeros(64, dtype=torch.uint8)
    some = some[-some.data_ptr() % 16 :]
    buffers = dict.fromkeys(("codes", "scales", "x", "y", "workspace"), some)
    weight = {"group": 128, "scale_type": TYPES[torch.float16], "zero_type": 0, "zeros_are_offsets": 0}
    x = {"row_stride": K, "column_stride": 1, "x_offset": 0, "bias_type": 0}
    dtype = TYPES[torch.float16 if half else torch.bfloat16]
    return record("mma_tile", Call("multiply", buffers, {**shape, **weight, **x, **values, "type": dtype}))


@recorded
@every_architecture
def test_what_the_heuristics_choose_fits_the_card(arch: str) -> None:
    """Shared memory and registers of a block, for the shapes of language models from 0.1 to 70 B parameters."""
    seen = set()
    for (N, K), M, bits, half in product(
        [(768, 768), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672)],
        [1, 8, 9, 17, 32, 33, 100, 600],
        [4, 8],
        [True, False],
    ):
        for one in chosen(arch, M, N, K, bits, half):
            seen.add(one.kernel)
            threads = one.block[0] * one.block[1] * one.block[2]
            assert one.shared_bytes <= SHARED_LIMITS[arch], one
            assert -(-compiled_usages("mma_tile", arch)[one.kernel].registers // 8) * 8 * threads <= REGISTERS, one
    assert len(seen) >= 10


def instructions_of(family: str, arch: str) -> dict[str, list[str]]:
    """SASS of every kernel whose mangled name holds `family`."""
    found = {name: body for s in device_sources("mma_tile") for name, body in sass(s, arch).items() if family in name}
    assert found, family
    return found


@needs_nvdisasm
@every_architecture
@pytest.mark.parametrize("family", ["6decodeI", "4gemmI"])
def test_products_use_the_instructions_meant(family: str, arch: str) -> None:
    for name, body in instructions_of(family, arch).items():
        text = "\n".join(body)
        assert re.search(r"^HMMA\.16816", text, re.MULTILINE), name  # tensor cores
        assert re.search(r"^LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", text, re.MULTILINE), name  # asynchronous, past L1
        assert re.search(r"^LDSM\.16\.M88\.4", text, re.MULTILINE), name  # ldmatrix.x4
        assert re.search(r"^LDS\.128", text, re.MULTILINE), name  # codes
        assert not re.search(r"^(LDL|STL)", text, re.MULTILINE), name  # no local memory


@needs_nvdisasm
@every_architecture
def test_int8_products_use_the_instructions_meant(arch: str) -> None:
    (source,) = (source for source in device_sources("mma_tile") if source.name == "gemm_a8.cu")
    kernels = {name: body for name, body in sass(source, arch).items() if "7gemm_a8I" in name}
    assert len(kernels) == 12
    for usage in usages(compile_source(source, arch, "cubin")[1]):
        assert (usage.stack, usage.spill_stores, usage.spill_loads) == (0, 0, 0), usage
    for name, body in kernels.items():
        text = "\n".join(body)
        for instruction in (r"IMMA\.16832\.S8\.S8", r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128", r"LDSM\.16\.M88\.4"):
            assert re.search(rf"^{instruction}", text, re.MULTILINE), (name, instruction)
        assert not re.search(r"^(LDL|STL)", text, re.MULTILINE), name


(HOPPER,) = (source for source in device_sources("mma_tile") if source.name == "gemm_sm90.cu")


@needs_nvdisasm
def test_hopper_has_wgmma_and_tma() -> None:
    """A from registers and B through a descriptor; x by tiles, the weight by bulk copies (overlap: test_compiled_sm90.py)."""
    kernels = sass(HOPPER, "90a")
    assert len(kernels) == 36
    for name, body in kernels.items():
        text = "\n".join(body)
        assert re.search(
            rf"^HGMMA\.64x{name.split('EEELi')[1].split('EEE')[0]}x16\.F32.* R\d+, gdesc", text, re.MULTILINE
        ), name
        for instruction in (r"UTMALDG\.2D", "UBLKCP", r"SYNCS\.PHASECHK", r"USETMAXREG\.DEALLOC", "USETMAXREG"):
            assert re.search(rf"^{instruction}", text, re.MULTILINE), (name, instruction)
        assert not re.search(r"^(LDL|STL)", text, re.MULTILINE), name


@needs_nvdisasm
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "90a"])
def test_other_architectures_trap_instead(arch: str) -> None:
    for name, body in sass(HOPPER, arch).items():
        assert any(line.startswith("BPT.TRAP") for line in body), name


@needs_nvdisasm
@every_architecture
def test_dequantize_stores_16_bytes_at_a_time(arch: str) -> None:
    for name, body in instructions_of("dequantize_tiles", arch).items():
        assert any(line.startswith("STG.E.128") for line in body), name


# ---- negative controls ----


def test_spills_would_be_seen() -> None:
    report = (
        "ptxas info    : Compiling entry function 'f' for 'sm_80'\nptxas info    : Function properties for f\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 16 bytes stack, 1024 bytes smem, 560 bytes cmem[0]\n"
    )
    (usage,) = usages(report)
    assert (usage.registers, usage.stack, usage.spill_stores, usage.spill_loads, usage.static_shared) == (
        255,
        16,
        8,
        12,
        1024,
    )
