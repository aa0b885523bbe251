"""Registers that something touches while a wgmma reads or writes them, found in the SASS along every path, back edges too.

A wgmma is in flight from its instruction (each is a group of its own: gsb0) until a `WARPGROUP.DEPBAR.LE gsb0, n` leaves it
among no more than the last n. Until then nobody may write its A fragment, or touch its sums except another wgmma that adds to
the same ones. The compiler keeps this order by itself only where it sees the wait; where it does not, it says so and adds one,
or, if it proves that a path is never taken, says nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9._]*)\s*([^;]*);")
WGMMA = re.compile(r"^[HIQB]GMMA\.64x(\d+)x\d+")
# The first operand that is a register is not written by these.
WRITES_NONE = re.compile(
    r"^(ST|RED|ATOMS\.POPC|BAR|BRA|BSSY|BSYNC|EXIT|[A-Z]*SETP|PLOP3|VOTE|R2UR|R2P|SYNCS|UBLK|UTMA|WARP|FENCE|MEMBAR|ERRBAR|CCTL|"
    r"NOP|DEPBAR|LDGSTS|LDGDEPBAR|USETMAXREG|UCGABAR|BPT|YIELD|ELECT|CALL|RET|PRMT\.X|ACQ|PREEXIT|NANOSLEEP)"
)


@dataclass(frozen=True)
class Instruction:
    address: str
    predicate: str
    opcode: str
    operands: str

    def registers(self) -> set[int]:
        """All that are named, the further ones of a wide operand aside."""
        return {int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)}

    def written(self) -> range:
        first = re.match(r"\s*(?:!?U?P\w+\s*,\s*)*R(\d+)\b", self.operands)
        if first is None or WRITES_NONE.match(self.opcode):
            return range(0)
        start = int(first[1])
        wide = re.search(r"\.(128|64)\b", self.opcode)
        width = (
            4 if re.search(r"\.128\b|LDSM.*\.4\b|^HMMA|^IMMA", self.opcode)
            else 2 if wide or re.search(r"WIDE|^CS2R$|^D[A-Z]+|\.F64\b|LDSM.*\.2\b", self.opcode)
            else 1
        )  # fmt: skip
        return range(start, start + width)


@dataclass(frozen=True)
class Wgmma:
    """Its registers: D of a lane is tokens / 2 values, A four."""

    sums: range
    fragment: range


def wgmma_of(instruction: Instruction) -> Wgmma | None:
    shape = WGMMA.match(instruction.opcode)
    if shape is None:
        return None
    sums, fragment = (int(n) for n in re.findall(r"\bR(\d+)\b", instruction.operands)[:2])
    assert instruction.operands.rstrip().endswith("gsb0"), f"{instruction}: not a group of its own"
    return Wgmma(range(sums, sums + int(shape[1]) // 2), range(fragment, fragment + 4))


def parse(lines: list[str]) -> tuple[list[Instruction], dict[str, int]]:
    """nvdisasm's lines of one kernel: its instructions, and the index that each label stands before."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(Instruction(found[1], found[2] or "", found[3], found[4]))
    return instructions, labels


def successors(instructions: list[Instruction], labels: dict[str, int]) -> list[set[int]]:
    """Where each may go on: a barrier of convergence goes to where one of its name was set up, or on."""
    meets: dict[str, set[int]] = {}
    for i in instructions:
        if i.opcode.startswith("BSSY"):
            name, label = re.findall(r"\b(B\d+)\b.*?`\((\.L\w+)\)", i.operands)[0]
            meets.setdefault(name, set()).add(labels[label])
    result = []
    for index, i in enumerate(instructions):
        on = {index + 1}
        target = re.search(r"`\((\.L\w+)\)", i.operands)
        conditional = bool(i.predicate) or re.search(r"\bU?P\d", i.operands)
        if i.opcode.startswith("BRA") and target:
            on = {labels[target[1]]} | (on if conditional or ".DIV" in i.opcode or ".ANY" in i.opcode else set())
        elif i.opcode.startswith("BSYNC"):
            on |= meets.get(i.operands.split()[-1], set())
        elif i.opcode.startswith(("EXIT", "RET")) and not i.predicate:
            on = set()
        result.append({n for n in on if n < len(instructions)})
    return result


def hazards(lines: list[str]) -> tuple[list[str], int]:
    """(what is wrong, one sentence each; how many wgmma were looked at with one or more before them in flight)."""
    instructions, labels = parse(lines)
    goes = successors(instructions, labels)
    products = {index: w for index, i in enumerate(instructions) if (w := wgmma_of(i)) is not None}
    written = [set(i.written()) for i in instructions]
    named = [i.registers() | set(i.written()) for i in instructions]
    wrong: dict[str, None] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    overlapped: set[int] = set()
    open_states: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    while open_states:
        state = open_states.pop()
        if state in seen:
            continue
        seen.add(state)
        index, flying = state
        instruction, product = instructions[index], products.get(index)
        for other in flying:
            before = products[other]
            if product is not None:
                overlapped.add(index)
                same = product.sums == before.sums
                if (not same and set(product.sums) & set(before.sums)) or set(product.fragment) & set(before.sums):
                    wrong[f"{instruction} meets the sums of {instructions[other]}"] = None
            elif written[index] & set(before.fragment):
                wrong[f"{instruction} writes the fragment of {instructions[other]}"] = None
            elif named[index] & set(before.sums):
                wrong[f"{instruction} touches the sums of {instructions[other]}"] = None
        if product is not None:
            flying = (*flying, index)
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            left = re.match(r"\s*gsb0,\s*0x(\w+)", instruction.operands)
            assert left is not None, instruction
            flying = flying[max(0, len(flying) - int(left[1], 16)) :]
        assert len(flying) <= 8, f"{instruction}: more and more wgmma in flight"
        open_states += [(n, flying) for n in goes[index]]
    return list(wrong), len(overlapped)
