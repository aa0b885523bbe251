"""Compiles the Triton kernels for GPUs that are not there: registers, spills, shared memory, PTX and SASS of the result.

Never in a process with TRITON_INTERPRET=1: Triton reads that when a kernel is decorated.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkernels import QuantScheme
from qkernels.kernels.triton import grouped_jit, jit
from qkernels.kernels.triton.launch import constants_of
from qkernels.kernels.triton.table import Config
from qkernels.scheme import FACTORS

# The most shared memory one block may have, bytes: CUDA C++ Programming Guide, table "Technical specifications per compute
# capability", less the 1 KB that the system keeps where it is counted in.
SHARED_MEMORY = {"sm80": 166912, "sm86": 101376, "sm89": 101376, "sm90": 232448, "sm120": 101376}
# Arguments that the launcher passes with a value or an address divisible by 16, in shapes that models have.
DIVISIBLE = (
    "x", "qweight", "scales", "zeros", "outer_scales", "outer_zeros", "k_order", "bias", "out", "parts", "N", "K", "x_stride",
    "line_bytes", "bytes_per_split", "ids", "blocks", "sources", "targets", "y", "weights", "offsets",
)  # fmt: skip
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Floats of one byte are passed as bytes.
_POINTERS = {torch.uint8: "*u8", torch.int8: "*i8", torch.float8_e4m3fn: "*u8", torch.float8_e8m0fnu: "*u8"}


@dataclass(frozen=True)
class Machine:
    """What one compiled kernel needs."""

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str
    sass: str
    seconds: float  # processor time of the compilation, ptxas included: wall time says more about what else runs here


def variant(scheme: QuantScheme, K: int, dtype: str, config: Config, *, ordered: bool, bias: bool, split: bool) -> Any:
    """Kernel, signature and constants of one call, as `launch.gemm` makes them."""
    kernel = getattr(jit, config.kernel)
    types = pointers(scheme, dtype, ordered=ordered)
    types |= {"bias": f"*{dtype}" if bias else None, "out": "*fp32" if split else f"*{dtype}"}
    constants = constants_of(scheme, K, scale_dtype(scheme, dtype), ordered, config) | {
        "BIAS": bias,
        "SPLIT": split,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    if config.kernel == "gemm":
        constants["BLOCK_M"] = config.block_m
    return kernel, types, constants


def grouped_variant(
    scheme: QuantScheme, K: int, dtype: str, config: Config, *, act: int, bias: bool, first: bool
) -> Any:
    """The same of stacked experts, as `grouped_launch.experts` makes it. first: of its first product, else of the second."""
    kernel = grouped_jit.gemv_pairs if config.kernel == "gemv" else grouped_jit.gemm_blocks
    types = pointers(scheme, dtype, ordered=False) | {
        "bias": f"*{dtype}" if bias else None,
        "ids": "*i64",
        "blocks": "*i32",
    }
    types |= {
        "sources": "*i64" if first else None,
        "targets": None if first else "*i64",
        "out": f"*{dtype}" if first else "*fp32",
    }
    constants = constants_of(scheme, K, scale_dtype(scheme, dtype), False, config) | {
        "BIAS": bias,
        "SOURCES": first,
        "TARGETS": not first,
        "ACT": act if first else int(grouped_jit.PLAIN.value),
        "ALPHA": 1.702,
        "LIMIT": 7.0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
    }
    return kernel, types, constants


def pointers(scheme: QuantScheme, dtype: str, *, ordered: bool) -> dict[str, str | None]:
    """Types of the buffers."""
    zeros = {"none": None, "int": "*u8"}.get(scheme.zeros, f"*{dtype}")
    small = _POINTERS.get(scale_dtype(scheme, dtype), f"*{dtype}")
    products = scheme.factors is not None
    return {
        "x": f"*{dtype}",
        "qweight": "*u8",
        "scales": small,
        "zeros": "*fp32" if scheme.codebook else small if products and zeros else zeros,
        "outer_scales": f"*{dtype}" if products else None,
        "outer_zeros": f"*{dtype}" if products and zeros else None,
        "k_order": "*i32" if ordered else None,
    }


def scale_dtype(scheme: QuantScheme, dtype: str) -> torch.dtype:
    """That of the small factors; of MXFP4 e8m0, as its files have it; else that of x."""
    if scheme.factors is not None:
        small: torch.dtype = getattr(torch, FACTORS[scheme.factors].small)
        return small
    if scheme.codebook == "e2m1":
        return torch.float8_e8m0fnu
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def compile_for(
    sm: str, kernel: Any, types: dict[str, str | None], constants: dict[str, Any], **options: Any
) -> Machine:
    """Compile for "sm80" …; absent pointers (None) become constants, numbers are int32, constants that the kernel has not
    are left out."""
    names = list(kernel.arg_names)
    fixed = constants | {name: None for name, kind in types.items() if kind is None}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in fixed.items() if name in names},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in DIVISIBLE
            if name in names and signature[name] != "constexpr"
        },
    )
    begin = os.times()
    compiled = triton.compile(
        source, target=GPUTarget("cuda", int(sm[2:]), 32), options={"enable_fp_fusion": True} | options
    )
    seconds = sum(os.times()[:4]) - sum(begin[:4])  # of this process and of its children
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _said(["cuobjdump", "--dump-resource-usage", file.name])
        sass = _said(["nvdisasm", "-c", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return Machine(registers, stack, local, compiled.metadata.shared, compiled.asm["ptx"], sass, seconds)


def _said(command: list[str]) -> str:
    """What one of the tools that come with Triton prints."""
    run = [str(_TOOLS / command[0]), *command[1:]]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout
