"""The guard's figures of the CUDA kernels, from nvcc and nvdisasm alone: registers, spills, and what the inner loop is made of.

The inner loop of a kernel is the shortest of those that hold the most tensor-core instructions. Figures are the worst of all
instances of a template, so that a renamed or added instance is no change by itself. Bank conflicts of shared memory need no value
here: tests/cuda/test_interpreted_kernels.py holds every hot access at exactly none.

Of the loops that limit a kernel (ROUNDS) a warp's executed path of one round is counted as well (`sass_paths.py`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import nvcc, sass_paths

Figures = dict[str, dict[str, float]]

ARCHITECTURES = ("80", "90a")
# What the mix counts; everything else is "other".
CLASSES = {
    "HMMA": "tensor core", "HGMMA": "tensor core", "IMMA": "tensor core",
    "IGMMA": "tensor core",
    "LDGSTS": "global to shared", "UTMALDG": "global to shared", "LDSM": "shared", "LDS": "shared", "STS": "shared",
    "LDG": "global", "STG": "global", "LDL": "local", "STL": "local", "LOP3": "logic", "PRMT": "logic", "SHF": "logic",
    "I2F": "conversion", "F2F": "conversion", "F2FP": "conversion", "HFMA2": "half arithmetic", "HADD2": "half arithmetic",
    "HMUL2": "half arithmetic", "FFMA": "float arithmetic", "FADD": "float arithmetic", "FMUL": "float arithmetic",
}  # fmt: skip


BIASED = "12BiasedFormatINS0_8BFloat16ELi{bits}ELi{groups}ELNS0_9GroupKindE{kind}EEELi1EEE"
CODED = "11CodedFormatINS0_8BFloat16ELNS0_6CodingE{coding}ELb{short}EEELi1EEE"
PLANES = "12PlanesFormatINS0_8BFloat16ELNS0_6PlanesE{planes}ELi{groups}EEELi1EEE"
WGMMA_64 = "11WgmmaFormatINS0_8BFloat16ELi4ELb0EEELi64EEE"
A8_128 = "gemm_a8_wgmmaILi4ELb0ELi128EEE"


@dataclass(frozen=True)
class RoundOf:
    """A round of a loop: the shortest path in the kernel whose mangled name has `kernel`, with so many instructions of each."""

    source: str
    kernel: str
    needs: dict[str, int]


# On sm_90a, bf16, symmetric unless it says so. decode: a step of 64 x 64 weights for up to 8 tokens, with its copies. gemm_sm90:
# 64 columns of 64 tokens, of a producer thread or of a consumer warp (two on each scheduler), which loads its codes and, where a
# group begins or ends, scales too; of two steps of g128 one is of each kind.
ROUNDS = {
    "decode w4 g128": RoundOf("decode_bf16", BIASED.format(bits=4, groups=1, kind=0), {"HMMA": 20, "LDGSTS": 5}),
    "decode w4 g128, integer zeros": RoundOf(
        "decode_bf16", BIASED.format(bits=4, groups=1, kind=1), {"HMMA": 20, "LDGSTS": 5}
    ),
    "decode w4 g128, float zeros": RoundOf(
        "decode_bf16", BIASED.format(bits=4, groups=1, kind=2), {"HMMA": 20, "LDGSTS": 5, "FFMA": 32}
    ),
    "decode w4 g32": RoundOf("decode_bf16", BIASED.format(bits=4, groups=2, kind=0), {"HMMA": 20, "LDGSTS": 5}),
    "decode w4 g128, 16 tokens": RoundOf(
        "decode_bf16", BIASED.format(bits=4, groups=1, kind=0).replace("ELi1EEE", "ELi2EEE"), {"HMMA": 40, "LDGSTS": 5}
    ),
    "decode w4 g128, 32 tokens": RoundOf(
        "decode_bf16", "6FormatINS0_8BFloat16ELi4ELb0EEELi4EEE", {"HMMA": 64, "LDGSTS": 5}
    ),
    "decode w4 g16": RoundOf("decode_bf16", BIASED.format(bits=4, groups=4, kind=2), {"HMMA": 20, "LDGSTS": 5}),
    "decode w8 g128": RoundOf("decode_bf16", BIASED.format(bits=8, groups=1, kind=0), {"HMMA": 20, "LDGSTS": 9}),
    "decode nf4 g64": RoundOf("decode_bf16", CODED.format(coding=1, short=0), {"HMMA": 16, "LDGSTS": 5}),
    "decode mxfp4 g32": RoundOf("decode_bf16", CODED.format(coding=2, short=1), {"HMMA": 16, "LDGSTS": 5}),
    "decode fp8 channel": RoundOf("decode_bf16", CODED.format(coding=3, short=0), {"HMMA": 16, "LDGSTS": 9}),
    "decode w3 g64": RoundOf("decode_bf16", PLANES.format(planes=0, groups=1), {"HMMA": 20, "LDGSTS": 4}),
    "decode w3 g16": RoundOf("decode_bf16", PLANES.format(planes=0, groups=4), {"HMMA": 20, "LDGSTS": 4}),
    "decode q4_k": RoundOf("decode_bf16", PLANES.format(planes=1, groups=2), {"HMMA": 20, "LDGSTS": 5, "FFMA": 64}),
    "decode w6 g64": RoundOf("decode_bf16", PLANES.format(planes=2, groups=1), {"HMMA": 20, "LDGSTS": 7}),
    "decode w6 g16": RoundOf("decode_bf16", PLANES.format(planes=2, groups=4), {"HMMA": 20, "LDGSTS": 7}),
    "gemm_sm90 producer of x": RoundOf("gemm_sm90", WGMMA_64, {"UTMALDG": 1}),
    "gemm_sm90 producer of a strip": RoundOf("gemm_sm90", WGMMA_64, {"UBLKCP": 1}),
    "gemm_sm90 producer of a strip and its group": RoundOf("gemm_sm90", WGMMA_64, {"UBLKCP": 2}),
    "gemm_sm90 consumer": RoundOf("gemm_sm90", WGMMA_64, {"HGMMA": 4, "LDS": 1}),
    "gemm_sm90 consumer, a group ends": RoundOf("gemm_sm90", WGMMA_64, {"HGMMA": 4, "LDS": 2, "FFMA": 32}),
    "stage, eight columns through an order": RoundOf("multiply", "5stage", {"LDG": 16, "STG": 1}),
    "gemm_a8_sm90 producer of x": RoundOf("gemm_a8_sm90", A8_128, {"UTMALDG": 1}),
    "gemm_a8_sm90 producer of a strip and its group": RoundOf("gemm_a8_sm90", A8_128, {"UBLKCP": 2}),
}


def missing() -> list[str]:
    """Tools that measuring needs and that are not here."""
    found = {"nvcc": nvcc.NVCC, "nvdisasm": nvcc.find_nvdisasm(), "c++filt": shutil.which("c++filt")}
    return [tool for tool, where in found.items() if where is None]


def compiler() -> str:
    """nvcc's version."""
    done = subprocess.run([str(nvcc.NVCC), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release \S+, (V\S+)", done.stdout)
    return f"nvcc {found[1] if found else 'unknown'}"


def loops(lines: list[str]) -> list[tuple[int, int]]:
    """[first, last] instruction of every backward branch's loop in nvdisasm's lines; labels stand on lines of their own."""
    labels: dict[str, int] = {}
    found, count = [], 0
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            branch = re.search(r"\bBRA\b[^`;]*`\((\.L_x_\d+)\)", line)
            if branch and branch[1] in labels:
                found.append((labels[branch[1]], count))
            count += 1
    return found


def opcodes(lines: list[str]) -> list[str]:
    """The first part of each instruction: `HMMA` of `@P0 HMMA.16816.F32 …`."""
    found = [re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", line) for line in lines]
    return [match[1] for match in found if match]


def inner_loop(lines: list[str]) -> list[str]:
    """Opcodes of the shortest of those loops that hold the most tensor-core instructions; [] without loops."""
    names = opcodes(lines)
    bodies = [names[first : last + 1] for first, last in loops(lines)]
    return max(bodies, key=lambda body: (_tensor(body), -len(body)), default=[])


def _tensor(body: list[str]) -> int:
    return sum(CLASSES.get(name) == "tensor core" for name in body)


def mix(body: list[str]) -> dict[str, int]:
    """Instructions by class."""
    return dict(sorted(Counter(CLASSES.get(name, "other") for name in body).items()))


def families(names: list[str]) -> dict[str, str]:
    """Mangled name -> name of the template or function, without namespaces and arguments; instances for codebooks apart."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {
        name: re.sub(r"[<(].*", "", plain.removeprefix("void ")).split("::")[-1]
        + (" of planes" if re.search(r"PlanesFormat", name) else "")
        + (" of codebooks" if re.search(r"CodedFormat|dequantize_tilesILi\dELb1E", name) else "")
        for name, plain in zip(names, done)
    }


def kernel_texts(source: Path, arch: str) -> dict[str, list[str]]:
    """nvdisasm's lines of each kernel of a file, by mangled name."""
    text = nvcc.disassembled(nvcc.compile_source(source, arch, "cubin")[0])
    sections = re.split(r"\.section\s+\.text\.([\w$]+)", text)
    return {name: body.splitlines() for name, body in zip(sections[1::2], sections[2::2])}


def measured_rounds() -> Figures:
    """Instructions, those on the half-rate pipe, and ptxas' stall cycles, of each of ROUNDS; and of decode how many come before
    the first weight is asked for."""
    figures: dict[str, dict[str, float]] = defaultdict(dict)
    sources = {source.stem: source for source in nvcc.KERNELS}
    for stem in dict.fromkeys(wanted.source for wanted in ROUNDS.values()):
        rows = {name: wanted for name, wanted in ROUNDS.items() if wanted.source == stem}
        cubin = nvcc.compile_source(sources[stem], "90a", "cubin")[0]
        codes = sass_paths.kernels(cubin, tuple(wanted.kernel for wanted in rows.values()))
        for name, wanted in rows.items():
            (code,) = (code for kernel, code in codes.items() if wanted.kernel in kernel)
            found = sass_paths.shortest_round(code, wanted.needs)
            if found is None:
                raise RuntimeError(f"{name}: no loop of {wanted.kernel} has {wanted.needs}")
            figures["cuda instructions a round"][name] = float(found.instructions)
            figures["cuda half-rate instructions a round"][name] = float(found.half_rate)
            figures["cuda stall cycles a round"][name] = float(found.stalls)
            if wanted.source == "multiply":  # bound by latency: loads that wait for one another
                figures["cuda waits a round"][name] = float(found.waits)
            if wanted.source.startswith("decode"):  # how long until the weight is on its way
                first = sass_paths.way_to(code, "LDGSTS")
                assert first is not None
                figures["cuda instructions before the first copy"][name] = float(first.instructions)
    return dict(figures)


def measure() -> tuple[Figures, dict[str, Any]]:
    """(figures, instruction mix of the loop that was the worst of its family)."""
    figures: dict[str, dict[str, float]] = defaultdict(dict)
    mixes: dict[str, Any] = {}
    for arch in ARCHITECTURES:
        usages = nvcc.compiled_usages(nvcc.KERNELS, arch)
        texts = {name: t for s in nvcc.KERNELS for name, t in kernel_texts(s, arch).items()}
        family = families(list(texts))
        for name, lines in texts.items():
            key = f"{family[name]} sm_{arch}"
            usage, body = usages[name], inner_loop(lines)
            _worst(figures["cuda registers"], key, float(usage.registers))
            _worst(figures["cuda spill bytes"], key, float(usage.spill_stores + usage.spill_loads))
            if products := _tensor(body):
                dearest = figures["cuda loop instructions per product"]
                if _worst(dearest, key, round(len(body) / products, 3)):
                    mixes[key] = mix(body)
    return {**figures, **measured_rounds()}, mixes


def _worst(values: dict[str, float], key: str, value: float) -> bool:
    """Keep the larger; whether it is this one."""
    larger = value > values.get(key, -1.0)
    if larger:
        values[key] = value
    return larger
