"""The CPU kernels of aarch64: cross-compiled, without torch, and executed under qemu's user emulation.

Requests go to `products.cpp` in a file and results come back in one. What they are compared with is the scalar code of this
machine's extension: int8 activations give its bits on every instruction set (but where an outer factor waits for a row's end,
NVFP4: there with inputs that nothing rounds), 16-bit ones stay within the bound of `numerics` of the exact product, and the
scalar code gives the same bits on both machines. Each instruction set runs on a CPU that has no more than it asks for, so that
an instruction from beyond it stops the program.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from qkernels import QuantTensor, extension
from qkernels.scheme import FACTORS
from tests.ops.helpers import arguments, integers
from tests.ops.numerics import bound, random
from tests.strategies import random_weight

CSRC = Path(__file__).parent.parent.parent / "csrc"
NEON = ["neon", "neon_bf16", "neon_dotprod", "neon_i8mm", "neon_int8"]
PRODUCTS = ["dispatch", "gemm", "scalar", "scalar_int8", *NEON]
# As setup.py has it there. Without optimization where the machine code is not what is tested: a fifth of the time.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-maybe-uninitialized"]
CXX, QEMU, SYSTEM = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64"), "/usr/aarch64-linux-gnu"
# One of qemu's CPUs that has an instruction set, and of those above it none.
CPUS = {
    "scalar": "cortex-a72", "neon": "cortex-a72", "neon_dotprod": "neoverse-n1", "neon_i8mm": "max", "neon_bf16": "max",
}  # fmt: skip
TOKENS = (0, 1, 4, 16, 33)
SHAPES = ((70, 200), (33, 75), (96, 264), (1, 1), (40, 520))
ROUNDED = ("nf4", "fp4")  # no values of bf16: rounded to it once where products are of bf16
TYPES = {
    torch.uint8: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4, torch.int8: 5, torch.float8_e8m0fnu: 6,
    torch.float8_e4m3fn: 7, torch.int32: -1,
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 (Debian: qemu-user)"),
    pytest.mark.skipif(not extension.status().isas, reason=f"no compiled extension: {extension.status().error}"),
]


def build(folder: Path, sources: list[Path], *flags: str) -> list[Path]:
    """Their objects, compiled two at a time."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    left = iter(zip(sources, objects, strict=True))
    for pairs in iter(lambda: list(itertools.islice(left, 2)), []):
        command = [str(CXX), *FLAGS, f"-I{CSRC / 'cpu'}", *flags, "-c"]
        jobs = [subprocess.Popen([*command, str(source), "-o", str(out)]) for source, out in pairs]
        assert [job.wait() for job in jobs] == [0] * len(jobs)
    return objects


def link(objects: list[Path], program: Path) -> Path:
    subprocess.run([str(CXX), *map(str, objects), "-pthread", "-o", str(program)], check=True)
    return program


def emulate(cpu: str, program: Path, *arguments: str, given: bytes = b"", **environment: str) -> bytes:
    done = subprocess.run(
        [str(QEMU), "-L", SYSTEM, "-cpu", cpu, str(program), *arguments],
        input=given, capture_output=True, timeout=600, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, (arguments, cpu, done.returncode, done.stderr.decode())
    return done.stdout


@dataclass(frozen=True)
class Case:
    """One product, what this machine's scalar code makes of it, and the request for it."""

    weight: QuantTensor
    x: Tensor
    bias: Tensor
    scalar: Tensor
    request: bytes

    @property
    def int8(self) -> bool:
        return self.weight.scheme.act is not None

    def __str__(self) -> str:
        return f"{self.weight.scheme} N={self.weight.N} K={self.weight.K} M={len(self.x)} {self.x.dtype}"


def as_bytes(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return struct.pack("5q", -2, 0, 0, 0, 0)
    sizes = (*tensor.shape, *[0] * (3 - tensor.dim()))
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return struct.pack("5q", TYPES[tensor.dtype], tensor.dim(), *sizes) + data


def case_of(weight: QuantTensor, buffers: tuple[object, ...], layout: str, x: Tensor, bias: Tensor) -> Case:
    """`buffers`: what `arguments` puts behind x, the bias included."""
    scalar = getattr(torch.ops.qkernels, f"gemm_{layout}")(x, *buffers)
    if layout == "cpu_tile_a8":  # the static scale of x stands before the bias, and no case has one
        assert buffers[6] is None
        buffers = (*buffers[:6], *buffers[7:])
    tensors, numbers = (x, *buffers[:7]), buffers[7:]
    ints = [layout == "cpu_tile_a8", *numbers, *[0] * (7 - len(numbers))]
    request = struct.pack("8q", *map(int, ints)) + b"".join(map(as_bytes, tensors))  # type: ignore[arg-type]
    return Case(weight, x, bias, scalar, request)


def cases_of(weight: QuantTensor, dtypes: tuple[torch.dtype, ...], kind: str = "random") -> Iterator[Case]:
    """Every number of tokens. `kind` of x: "random", with "outliers" in a column, "whole" numbers, which int8 holds as they are,
    or the "most" that it holds."""
    layout = "cpu_tile_a16" if weight.scheme.act is None else "cpu_tile_a8"
    M, K = TOKENS[-1], weight.K
    bias = integers(weight.N) if kind == "whole" else random(weight.N, dtype=torch.float32, seed=4)
    for dtype in dtypes:
        x = integers(M, K, dtype=dtype) if kind == "whole" else random(M, K, dtype=dtype, seed=1)
        if kind in ("whole", "outliers"):
            x[:, K // 2] = 127 if kind == "whole" else 9.5
        if kind == "most":
            x = torch.tensor([-127.5, 127.5]).to(dtype).repeat(M)[:M, None].expand(M, K)
        _, *buffers = arguments(weight, x, bias, layout)
        for tokens in TOKENS:
            yield case_of(weight, tuple(buffers), layout, x[:tokens], bias)


def weights() -> Iterator[tuple[QuantTensor, str]]:
    """A weight of every kind, in shapes in turn; and the kind of its x."""
    shapes = itertools.cycle(SHAPES)
    groups = itertools.cycle(("g8", "g32", "channel", "g128", "g24"))
    kinds = itertools.product((16, 8), range(2, 9), ("", "_asym", "_fzero", "_offset"))
    for i, (act, bits, zeros) in enumerate(kinds):
        N, K = next(shapes)
        scheme = f"w{bits}a{act}_{next(groups)}{zeros}"
        dtype = (torch.float16, torch.float32)[i % 2]
        yield random_weight(scheme, N, K, seed=i, act_order=i % 3 == 0, dtype=dtype), "random"
    for rounding in ("8w", "8z", "8o6"):
        for scheme in (f"w8a{rounding}_channel", f"w4a{rounding}_g32_asym", f"w6a{rounding}_g32"):
            yield random_weight(scheme, *next(shapes), act_order=True), "outliers" if rounding == "8o6" else "random"
    for scheme in ("nf4_g64", "fp4_g32", "mxfp4_g32", "iq4nl_g32", "fp8_channel", "e5m2_g64", "fp8_block128"):
        scales = torch.float8_e8m0fnu if scheme.startswith("mx") else torch.bfloat16
        yield random_weight(scheme, *next(shapes), dtype=scales, act_order=scheme == "nf4_g64"), "random"
    for scheme in ("iq4nl_g32_a8", "mxfp4_g32_a8"):
        yield random_weight(scheme, *next(shapes), dtype=torch.float8_e4m3fn), "random"
    for scheme in ("w4a8_channel", "w6a8w_channel", "w8a8_channel", "w8a8w_channel", "iq4nl_g32_a8", "iq4nl_g32_a8w"):
        weight = random_weight(scheme, 33, 264)
        for code in (0, weight.scheme.max_code):
            yield replace(weight, codes=torch.full_like(weight.codes, code)), "most"
    for scheme in [spelling for factors in FACTORS.values() for spelling in factors.spelling]:
        for K in (75, 520):
            yield random_weight(scheme, 70, K, seed=K, act_order=K == 520), "random"
            kind = "whole" if scheme.startswith("nv") else "random"
            yield random_weight(f"{scheme}_a8", 70, K, seed=K, act_order=K == 520, exact=kind == "whole"), kind


def all_cases() -> list[Case]:
    cases: list[Case] = []
    for i, (weight, kind) in enumerate(weights()):
        other = (torch.float32, torch.float16)[i % 2]
        dtypes = (torch.bfloat16, other) if weight.scheme.act is None else ((torch.bfloat16, other)[i % 3 > 0],)
        cases += cases_of(weight, dtypes, kind)
    return cases


def cases_for(isa: str, cases: list[Case]) -> list[Case]:
    """Those that it has a code of its own for, and a few of the others; all of a weight and dtype, or none."""

    def own(case: Case) -> bool:
        if isa == "neon_bf16":
            return not case.int8 and case.x.dtype == torch.bfloat16
        return isa == "neon" or (case.int8 and isa != "scalar")

    return [case for i, case in enumerate(cases) if own(case) or i // len(TOKENS) % 7 == 0]


def results(program: Path, isa: str, cases: list[Case]) -> list[Tensor]:
    out = emulate(CPUS[isa], program, isa, given=b"".join(case.request for case in cases))
    found = []
    for case in cases:
        size = case.scalar.numel() * case.scalar.element_size()
        y = torch.frombuffer(bytearray(out[:size]), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        found.append(y.view(case.scalar.dtype).reshape(case.scalar.shape))
        out = out[size:]
    assert not out
    return found


def wrong(case: Case, y: Tensor, isa: str) -> str | None:
    """What is wrong with a result, or None."""
    if isa == "scalar" or case.int8:
        same = torch.equal(y.view(torch.uint8), case.scalar.view(torch.uint8)) if y.numel() else True
        return None if same else f"{case} on {isa}: not the bits of the scalar code"
    exact = case.x.double() @ case.weight.dequantize().double().T + case.bias.double()
    allowed = bound(case.weight, case.x, case.bias)
    if isa == "neon_bf16" and case.x.dtype == torch.bfloat16 and case.weight.scheme.codebook in ROUNDED:
        allowed = allowed + 2**-9 * (case.x.double().abs() @ case.weight.dequantize().double().abs().T)
    if (over := (y.double() - exact).abs() > allowed).any():
        return f"{case} on {isa}: {int(over.sum())} of {y.numel()} beyond the bound"
    return None


def check_products(program: Path) -> None:
    before = extension.status().isa
    assert before is not None
    extension.use_isa("scalar")
    try:
        cases = all_cases()
    finally:
        extension.use_isa(before)
    for isa in CPUS:
        chosen = cases_for(isa, cases)
        found = list(zip(chosen, results(program, isa, chosen), strict=True))
        assert not (faults := [fault for case, y in found if (fault := wrong(case, y, isa))]), faults
        for i in range(0, len(found), len(TOKENS)):  # a row depends on nothing but itself
            for case, y in found[i : i + len(TOKENS)]:
                if case.weight.scheme.act != "int8_outliers":  # where a column depends on all rows
                    assert torch.equal(y, found[i + len(TOKENS) - 1][1][: len(y)]), (str(case), isa)
    # Negative control, of the last one's: one code of each row is another.
    controls = [(case, y) for case, y in found if len(case.x) == 4 and case.weight.K > 1 and not case.int8]
    assert len(controls) > 20
    for case, y in controls:
        codes = case.weight.codes.clone()
        codes[:, 5] ^= 1
        assert wrong(replace(case, weight=replace(case.weight, codes=codes)), y, isa) is not None, str(case)


def check_dispatch(program: Path) -> None:
    """Each CPU gets the best that it has, by name; QKERNELS_ISA takes less, and names what it cannot have."""
    names = list(CPUS)
    for cpu, best in (("cortex-a72", "neon"), ("a64fx", "neon"), ("neoverse-n1", "neon_dotprod"), ("max", "neon_bf16")):
        there = names[: names.index(best) + 1]
        assert emulate(cpu, program).decode().split("\n")[:2] == [best, " ".join(there)], cpu
    assert emulate("max", program, QKERNELS_ISA="neon_dotprod").decode().startswith("neon_dotprod\n")
    refused = emulate("cortex-a72", program, QKERNELS_ISA="neon_bf16").decode()
    assert refused.startswith('QKERNELS_ISA must be one of "scalar neon" on this CPU, got "neon_bf16"')


def check_symbols(objects: list[Path]) -> None:
    """As test_sanitizers' test of the same: nothing inline that was compiled for more than Armv8.0 leaves its file."""
    nm = shutil.which("aarch64-linux-gnu-nm")
    for out in objects:
        symbols = subprocess.run([str(nm), "-C", out], capture_output=True, text=True, check=True).stdout.splitlines()
        shared = [line[17:] for line in symbols if line[17] in "TWVuBDR" and "gxx_personality" not in line]
        assert shared, out
        assert all("qkernels::cpu::kNeon" in name for name in shared), shared


def test_products(tmp_path: Path) -> None:
    """One test, so that parallel workers build the program once."""
    sources = [CSRC / "cpu" / f"{name}.cpp" for name in PRODUCTS]
    objects = build(tmp_path, [*sources, Path(__file__).parent / "products.cpp"], "-O0", "-Werror")
    program = link(objects, tmp_path / "products")
    check_symbols([out for out in objects if out.stem in NEON])
    check_dispatch(program)
    check_products(program)


def test_what_runs_on_torch_compiles(tmp_path: Path) -> None:
    """The rest of what setup.py compiles there: bindings, as far as a compiler checks them, and GGUF's searches and GPTQ's
    loops, which are plain code."""

    includes = [f"-I{path}" for path in (CSRC, *cpp_extension.include_paths())]
    bindings = [CSRC / "exports.cpp", *sorted((CSRC / "cpu").glob("bindings*.cpp"))]
    build(tmp_path, bindings, "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes)
    plain = ("experts", "gguf", "gguf_scalar", "rounding", "rounding_scalar")
    objects = build(tmp_path, [CSRC / "cpu" / f"{name}.cpp" for name in plain], "-O0", "-Werror")
    assert all(out.exists() for out in objects)


@pytest.mark.large
def test_as_shipped(tmp_path: Path) -> None:
    """With the optimization of setup.py: the same comparisons, and test_sanitizers' edge shapes (three minutes of one core)."""
    sources = [CSRC / "cpu" / f"{name}.cpp" for name in (*PRODUCTS, "experts")]
    drivers = [Path(__file__).parent / f"{name}.cpp" for name in ("products", "edge_shapes")]
    objects = build(tmp_path, [*sources, *drivers], "-O3", "-fwrapv", "-fPIC", "-Werror")
    check_symbols([out for out in objects if out.stem in NEON])
    check_products(link(objects[:-1], tmp_path / "products"))
    edge_shapes = link([*objects[:-2], objects[-1]], tmp_path / "edge_shapes")
    for isa, cpu in CPUS.items():
        assert ", 0 wrong" in emulate(cpu, edge_shapes, isa).decode(), isa
