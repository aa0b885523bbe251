"""The guard's figures of the Triton kernels, from Triton's own compiler and nvdisasm: no GPU, no nvcc.

A case is the configuration that the shipped table has for a number of tokens on a card, with w4a16_g128 in bf16 on 4096 columns.
Two kinds must not fall, rather than rise: what is under way while a program waits.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from qkernels.ops.backends import missing_triton

from . import guard_cuda

Figures = dict[str, dict[str, float]]

COPIES, BYTES = "triton cp.async in flight", "triton KiB of codes in flight"  # of a thread, of a multiprocessor
AT_LEAST = (COPIES, BYTES)
CARDS = ("sm80", "sm90")
TOKENS = (1, 8, 64)
SCHEME, K = "w4a16_g128", 4096
REGISTERS, MOST_PROGRAMS = 65536, 32  # of a multiprocessor


def missing() -> list[str]:
    """Tools that measuring needs and that are not here."""
    return ["triton"] if missing_triton() else []


def compiler() -> str:
    """Triton's version."""
    return f"triton {version('triton')}"


def copies_ahead(ptx: str) -> int:
    """How many cp.async of a thread stand before the loop that waits for them."""
    lines = ptx.splitlines()
    waits = [i for i, line in enumerate(lines) if "cp.async.wait_group" in line]
    return sum("cp.async.c" in line and ".commit" not in line for line in lines[: waits[0]]) if waits else 0


def longest_loop(sass: str) -> list[str]:
    """Opcodes of the longest loop: the one over K; the others are inside of it, or there are none."""
    lines = sass.splitlines()
    names = guard_cuda.opcodes(lines)
    return max((names[first : last + 1] for first, last in guard_cuda.loops(lines)), key=len, default=[])


def resident_programs(registers: int, threads: int, shared: int, shared_of_all: int) -> int:
    """How many programs a multiprocessor holds at once."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, shared_of_all // (shared + 1024), MOST_PROGRAMS)  # the system keeps 1 KB a program


def measure() -> tuple[Figures, dict[str, Any]]:
    """(figures, instruction mix of each loop)."""
    from qkernels import QuantScheme
    from qkernels.kernels.triton.table import choose

    from . import triton_aot

    figures: Figures = {}
    mixes: dict[str, Any] = {}
    for card in CARDS:
        for tokens in TOKENS:
            config = choose(card, tokens, K, K)
            call = triton_aot.variant(
                QuantScheme.parse(SCHEME), K, "bf16", config, ordered=False, bias=False, split=True
            )
            machine = triton_aot.compile_for(card, *call, num_warps=config.num_warps, num_stages=config.num_stages)
            name, loop, threads = (
                f"{config.kernel} M={tokens} {card}",
                longest_loop(machine.sass),
                32 * config.num_warps,
            )
            programs = resident_programs(machine.registers, threads, machine.shared, triton_aot.SHARED_MEMORY[card])
            ahead = (
                (config.num_stages - 1) * config.block_n * config.block_bytes((4,)) if copies_ahead(machine.ptx) else 0
            )
            for kind, value in {
                "triton registers": machine.registers,
                "triton spill bytes": machine.stack + machine.local,
                "triton loop instructions per weight": round(
                    len(loop) * threads / (config.block_n * config.block_k), 3
                ),
                COPIES: copies_ahead(machine.ptx),
                BYTES: programs * ahead / 1024,
            }.items():
                figures.setdefault(kind, {})[name] = float(value)
            mixes[name] = guard_cuda.mix(loop)
    return figures, mixes
