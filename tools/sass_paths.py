"""What a warp executes in one round of a loop, read from SASS: instructions, pipes, and the stalls that ptxas wrote into them.

A count of all instructions between a loop's ends has both sides of every branch in it. Here a round is a path: the shortest one
from the loop's head back to it that passes the instructions that the round is about, such as 20 products and 5 copies.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import nvcc

# Integers, logic, comparisons, moves and byte permutations: 16 lanes a cycle of each of the four schedulers' 32, so two
# cycles a warp. IMAD, FFMA, HFMA2 go to other pipes, uniform instructions (U...) to one of their own.
HALF_RATE = frozenset({
    "LOP3", "SHF", "ISETP", "SEL", "IADD3", "PRMT", "LEA", "IMNMX", "VIMNMX", "PLOP3", "FSETP", "FSEL", "FMNMX", "MOV", "I2FP",
    "VIADD", "VIADDMNMX", "F2FP", "IABS", "POPC", "FLO",
})  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with what follows the points: HMMA.16816.F32
    text: str
    stall: int  # cycles until the warp's next instruction, at least
    waits: int  # for results of variable latency, of the six scoreboards

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Code:
    """A kernel: instructions, and where each may go on."""

    instructions: list[Instruction]
    successors: list[list[int]]

    def loops(self) -> Iterator[tuple[int, int]]:
        """[head, last] of every backward branch."""
        for last, following in enumerate(self.successors):
            yield from ((head, last) for head in following if head <= last)


@dataclass(frozen=True)
class Round:
    path: list[Instruction]

    @property
    def instructions(self) -> int:
        return len(self.path)

    @property
    def half_rate(self) -> int:
        return sum(one.name in HALF_RATE for one in self.path)

    @property
    def stalls(self) -> int:
        """Cycles that a warp alone takes for it, but for what it waits for (scoreboards, memory, barriers)."""
        return sum(one.stall for one in self.path)

    @property
    def waits(self) -> int:
        """Instructions that wait for a result of variable latency: of memory, of the tensor core, of conversions."""
        return sum(one.waits != 0 for one in self.path)

    def names(self) -> Counter[str]:
        return Counter(one.name for one in self.path)


LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
UPPER = re.compile(r"\s+/\* 0x(?P<bits>[0-9a-f]{16}) \*/")


def parse(text: str) -> Code:
    """One kernel's part of `nvdisasm -c -hex`: an instruction's line has its lower 64 bits, the line below the upper ones."""
    labels: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    pending: str | None = None
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif pending is not None:
            upper = UPPER.match(line)
            assert upper, line
            found.append((pending, int(upper["bits"], 16)))
            pending = None
        elif match := LINE.match(line):
            pending = match["text"]
    instructions, successors = [], []
    for i, (words, bits) in enumerate(found):
        match = re.match(r"(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", words)
        assert match, words
        opcode, guarded = match[2], match[1] is not None
        instructions.append(Instruction(opcode, words, bits >> 41 & 15, bits >> 52 & 63))
        name = opcode.split(".")[0]
        target = re.search(r"`\((\.L_x_\d+)\)", words) if name == "BRA" else None
        # `BRA.U UP0, target` and `BRA P0, target` have their condition among the operands.
        conditional = guarded or re.search(r"BRA[.\w]*\s+!?U?P\d", words) is not None or "DIV" in opcode
        following = [labels[target[1]]] if target and target[1] in labels else []
        if not (name == "EXIT" and not guarded) and not (target and not conditional):
            following.append(i + 1)
        successors.append([place for place in following if place < len(found)])
    return Code(instructions, successors)


def kernels(cubin: Path, wanted: Sequence[str] = ("",)) -> dict[str, Code]:
    """By mangled name, of those kernels whose names have one of `wanted` in them."""
    sections = re.split(r"\.section\s+\.text\.([\w$]+)", nvcc.disassembled(cubin, "-hex"))
    bodies = zip(sections[1::2], sections[2::2])
    return {name: parse(body) for name, body in bodies if any(part in name for part in wanted)}


def round_of(code: Code, head: int, needs: Mapping[str, int]) -> Round | None:
    """The shortest path from `head` back to it with at least so many instructions of each name; None where there is none."""
    names = list(needs)
    index = {name: i for i, name in enumerate(names)}
    queue: list[tuple[int, int, tuple[int, ...], int]] = [(0, head, (0,) * len(names), -1)]
    seen: set[tuple[int, tuple[int, ...]]] = set()
    steps: list[tuple[int, int]] = []  # instruction, and the step before
    while queue:
        length, place, counts, before = heapq.heappop(queue)
        at = index.get(code.instructions[place].name)
        if at is not None and counts[at] < needs[names[at]]:
            counts = (*counts[:at], counts[at] + 1, *counts[at + 1 :])
        if (place, counts) in seen:
            continue
        seen.add((place, counts))
        steps.append((place, before))
        here = len(steps) - 1
        for following in code.successors[place]:
            if following == head:
                if all(counts[i] >= needs[n] for i, n in enumerate(names)):
                    path = []
                    while here >= 0:
                        path.append(code.instructions[steps[here][0]])
                        here = steps[here][1]
                    return Round(path[::-1])
            elif following > head:
                heapq.heappush(queue, (length + 1, following, counts, here))
    return None


def shortest_round(code: Code, needs: Mapping[str, int]) -> Round | None:
    """Of all loops."""
    rounds = [round_of(code, head, needs) for head in sorted({head for head, _ in code.loops()})]
    return min((r for r in rounds if r is not None), key=lambda r: r.instructions, default=None)


def way_to(code: Code, name: str) -> Round | None:
    """The shortest path from the kernel's entry to the first instruction of that name, which it ends with."""
    before: dict[int, int] = {0: -1}
    queue = deque([0])
    while queue:
        place = queue.popleft()
        if code.instructions[place].name == name:
            path = []
            while place >= 0:
                path.append(code.instructions[place])
                place = before[place]
            return Round(path[::-1])
        for following in code.successors[place]:
            if following not in before:
                before[following] = place
                queue.append(following)
    return None
