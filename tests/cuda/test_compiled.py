"""What nvcc says of the kernels for every architecture, and the instructions that it chose."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from tools.guard_cuda import inner_loop, kernel_texts
from tools.nvcc import (
    ARCHITECTURES,
    KERNELS,
    NVCC,
    REGISTERS,
    SHARED_LIMITS,
    compiled_usages,
    find_nvdisasm,
    sass,
    usages,
)

from .calls import PATHS, TYPES
from .emulator import WHY_NOT, Call, Launch, record, run
from .kernel_log import LOG
from .units import device_sources, needs_nvcc

pytestmark = needs_nvcc
needs_nvdisasm = pytest.mark.skipif(NVCC is not None and find_nvdisasm() is None, reason="no nvdisasm")
recorded = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)

MULTIPROCESSORS = {"80": 108, "86": 82, "89": 128, "90a": 132, "120": 170}  # A100, RTX 3090, 4090, H200, RTX 5090


@every_architecture
def test_no_kernel_spills(arch: str) -> None:
    """Of all instances, as the extension has them; without such a build nvcc runs here, a minute and a half of processor time."""
    kernels = compiled_usages(KERNELS, arch)
    assert 40 < len(kernels) <= 202  # 42 of which are more than traps on sm_90a alone
    assert f"**{len(kernels)} kernel instances**" in LOG.read_text()
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
        "groups_per_step": 1,
        "steps_per_group": 2,
        "groups": -(-K // 128),
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
@pytest.mark.parametrize("arch", SHARED_LIMITS)
def test_what_the_heuristics_choose_fits_the_card(arch: str) -> None:
    """Shared memory and, where the kernels are compiled for it, registers of a block, for the shapes of language models from
    0.1 to 70 B parameters."""
    usages = compiled_usages(KERNELS, arch) if arch in ARCHITECTURES else {}
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
            if usages:
                assert -(-usages[one.kernel].registers // 8) * 8 * threads <= REGISTERS, one
    assert len(seen) >= 10


LDGSTS = r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128"  # 16 bytes from global to shared memory, asynchronous, past L1
LDSM = r"LDSM\.16\.M88\.4"  # ldmatrix.x4: x
LDS = r"LDS\.128"  # codes
STORE = r"STG\.E\.128"
# What every instance of a family must hold. Partial sums are pairs (8 bytes a lane);
# dequantize reads a word of each of four lanes and writes four (eight) times as many bytes.
FAMILIES: dict[str, tuple[str, ...]] = {
    "decode": (r"HMMA\.16816", LDGSTS, LDSM, LDS),
    "gemm": (r"HMMA\.16816", LDGSTS, LDSM, LDS),
    "gemm_a8": (r"IMMA\.16832\.S8\.S8", LDGSTS, LDSM, LDS),
    "quantize_tokens": (r"LDG\.E\.128", STORE),
    "quantize_as": (r"LDG\.E\.128", STORE),
    "mark_columns": (r"LDG\.E\.128",),
    "list_marked": (r"LDG\.E\.U16",),
    "finish_a8": (r"LDG\.E\.64", r"LDS\.64", r"LDS\.128"),
    "stage": (STORE,),
    "reduce": (r"LDG\.E\.64",),
    "dequantize_tiles": (STORE,),
    "dequantize_planes": (STORE,),
    # Of stacked experts (experts.cuh).
    "route": (STORE,),
    "align": (STORE, r"LDG\.E\.64"),
    "gather": (STORE, r"LDG\.E\.128"),
    "activate": (r"MUFU\.EX2",),
    "finish": (r"STG\.E",),
    "combine": (r"STG\.E",),
}
ON_HOPPER = {"gemm_wgmma", "gemm_a8_wgmma"}  # test_hopper_has_wgmma_and_tma, test_compiled_a8_sm90.py


def family_of(kernel: str) -> str:
    """`decode` of `_ZN8qkernels4cuda6decodeINS0_…`."""
    found = re.match(r"_ZN8qkernels4cuda(\d+)(\w+)", kernel)
    assert found, kernel
    return found[2][: int(found[1])]


def missing_instructions(family: str, body: list[str]) -> list[str]:
    return [meant for meant in FAMILIES[family] if not any(re.match(meant, line) for line in body)]


@needs_nvdisasm
@every_architecture
def test_every_kernel_uses_the_instructions_meant(arch: str) -> None:
    kernels = {name: body for source in device_sources("mma_tile") for name, body in sass(source, arch).items()}
    assert {family_of(name) for name in kernels} == FAMILIES.keys() | ON_HOPPER  # no kernel goes unseen
    for name, body in kernels.items():
        if (family := family_of(name)) in FAMILIES:
            assert missing_instructions(family, body) == [], name
            assert not any(line.startswith(("LDL", "STL")) for line in body), name


@needs_nvdisasm
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_decode_asks_for_weights_before_x(arch: str) -> None:
    """A copy of x may write zeros instead, which a predicate behind it says; those of the weight have none."""
    seen = 0
    for source in device_sources("mma_tile"):
        if source.stem.startswith("decode"):
            for name, body in sass(source, arch).items():
                copies = [line for line in body if line.startswith("LDGSTS")]
                of_x = [bool(re.search(r", !?P\d$", line)) for line in copies]
                assert any(of_x), name
                wide = "Li8E" in name or "CodingE3" in name  # of BFloat16ELi8ELb0E, and 8-bit floats
                assert of_x.index(True) >= (8 if wide else 4), name
                seen += 1
    assert seen == 82


def order(loop: list[str]) -> str:
    """H: a product, X: x fragments, |: the barrier, c: a copy into shared memory; in the order of a loop's opcodes."""
    letters = {"HMMA": "H", "LDSM": "X", "BAR": "|", "LDGSTS": "c"}
    return "".join(letters[opcode] for opcode in loop if opcode in letters)


# Three of four tiles, the barrier, the next step's x, copies of a later one, and the last tile meanwhile.
DOUBLE_BUFFERED = r"H{48,}\|X{8}c+H{16,}"
# Where codes are looked up, ptxas lets a few products of the third tile wait until the barrier is behind them.
OF_CODEBOOKS = r"H{40,}\|H{0,8}X{8}c+H{16,}"
# Of planes the last group of the last tile is left for afterwards: 16, 8 or 4 products.
OF_PLANES = r"H{48,}\|H{0,5}X{8}c+H{4,16}"


@needs_nvdisasm
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_gemm_loads_the_next_step_before_the_last_tile(arch: str) -> None:
    for source in device_sources("mma_tile"):
        if source.stem.startswith("gemm_sm80"):
            for name, lines in kernel_texts(source, arch).items():
                wanted = OF_CODEBOOKS if "CodedFormat" in name else DOUBLE_BUFFERED
                wanted = OF_PLANES if "PlanesFormat" in name else wanted
                assert re.fullmatch(wanted, order(inner_loop(lines))), name


def test_loads_at_the_start_of_a_step_would_be_seen() -> None:
    loop = ["BAR", *["LDSM"] * 8, *["LDGSTS"] * 39, *["HMMA"] * 80]
    assert order(loop[7:12]) == "XXccc"
    assert not re.fullmatch(DOUBLE_BUFFERED, order(loop))


(HOPPER,) = (source for source in device_sources("mma_tile") if source.name == "gemm_sm90.cu")


@needs_nvdisasm
def test_hopper_has_wgmma_and_tma() -> None:
    """A from registers and B through a descriptor; x by tiles, the weight by bulk copies (overlap: test_compiled_sm90.py)."""
    kernels = sass(HOPPER, "90a")
    assert len(kernels) == 32
    for name, body in kernels.items():
        text = "\n".join(body)
        assert re.search(
            rf"^HGMMA\.64x{name.split('EEELi')[1].split('EEE')[0]}x16\.F32.* R\d+, gdesc", text, re.MULTILINE
        ), name
        for instruction in (
            r"UTMALDG\.3D",
            "UBLKCP",
            r"SYNCS\.PHASECHK",
            r"USETMAXREG\.DEALLOC",
            "USETMAXREG",
            "UCGABAR_ARV",
        ):
            assert re.search(rf"^{instruction}", text, re.MULTILINE), (name, instruction)
        assert not re.search(r"^(LDL|STL)", text, re.MULTILINE), name


@needs_nvdisasm
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "90a"])
def test_other_architectures_trap_instead(arch: str) -> None:
    for name, body in sass(HOPPER, arch).items():
        assert any(line.startswith("BPT.TRAP") for line in body), name


# ---- negative controls ----


def test_a_missing_instruction_would_be_seen() -> None:
    body = [
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "LDGSTS.E.BYPASS.64 [R7], desc[UR4][R2.64]",
        "LDSM.16.M88.4 R4, [R6]",
        "LDS.64 R2, [R3]",
    ]
    assert missing_instructions("decode", body) == [LDGSTS, LDS]
    with pytest.raises(AssertionError):
        family_of("_Z6decodev")


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
