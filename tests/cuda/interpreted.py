"""Runs a call's launches as compiled PTX, in numpy: the kernels and configurations are those that the launcher itself chooses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .emulator import Call, Launch, raw, record
from .ptx.interpreter import Outcome, launch
from .ptx.memory import Traffic
from .ptx.program import Program, parse
from .units import ptx_with


@dataclass(frozen=True)
class Interpreted:
    launch: Launch
    outcome: Outcome

    def shared(self, *opcodes: str) -> Traffic:
        """Wavefronts of the instructions whose opcode begins with one of these."""
        return total(self.outcome.counters.shared, opcodes)

    def sectors(self, *opcodes: str) -> Traffic:
        return total(self.outcome.counters.glob, opcodes)


def total(traffic: dict[str, Traffic], opcodes: tuple[str, ...]) -> Traffic:
    result = Traffic()
    for text, one in traffic.items():
        opcode = text.split()[1] if text.startswith("@") else text.split()[0]
        if opcode.startswith(opcodes):
            result += one
    return result


@functools.cache
def program(unit: str, kernel: str, arch: str, bug: str | None) -> Program:
    return parse(ptx_with(unit, kernel, arch, bug), kernel)


def interpret(unit: str, call: Call, arch: str = "80", bug: str | None = None) -> list[Interpreted]:
    """All launches of the call, in order, in place on its buffers. Raises PtxError for what a kernel must not do."""
    buffers = [raw(buffer).numpy() for buffer in call.given().values() if buffer.numel()]
    result = []
    for one in record(unit, call):
        code = program(unit, one.kernel, arch, bug)
        outcome = launch(code, one.grid, one.block, one.shared_bytes, one.parameters, buffers)
        result.append(Interpreted(one, outcome))
    return result
