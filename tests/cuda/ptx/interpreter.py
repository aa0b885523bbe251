"""Executes the PTX of one kernel launch, block by block, with all threads of a block in numpy arrays.

The threads with the lowest program counter run next, so warps advance together; which of them could have been ahead is the
business of the race check: two warps, one byte of shared memory, one of them writing, no barrier between.

Not covered: races inside a warp and between blocks (TSan has those), wgmma, TMA, named barriers, rounding inside tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import arithmetic, warp
from .memory import LANES, POISON, Counters, GlobalMemory, SharedMemory, count_sectors, count_wavefronts
from .program import (
    Address,
    Constant,
    Instruction,
    Operand,
    Pair,
    Program,
    PtxError,
    Register,
    Special,
    Vector,
    width_of,
)
from .values import UNSIGNED, Array, dtype_of, pairs


@dataclass
class Copy:
    """A cp.async under way: its destination holds poison until the thread waits for its group."""

    to: Array
    places: Array  # in global memory
    size: int
    valid: Array  # bytes that are read; the rest becomes zero
    pending: Array  # threads that have not waited for it yet
    group: Array  # the number of each thread's group
    text: str


@dataclass
class Block:
    program: Program
    memory: GlobalMemory
    shared: SharedMemory
    parameters: GlobalMemory  # of its own address space
    specials: dict[str, Array]
    threads: int
    counters: Counters
    registers: dict[str, Array] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    text: str = ""  # of the instruction that runs

    def __post_init__(self) -> None:
        self.everyone = np.ones(self.threads, bool)
        self.groups = np.zeros(self.threads, np.int64)  # committed by each thread
        for name, width in self.program.widths.items():
            self.registers[name] = np.zeros(self.threads, bool if width == 1 else UNSIGNED[width])

    # ---- operands ----

    def read(self, operand: Operand, kind: str) -> Array:
        """[threads], as the type says."""
        width = width_of(kind)
        if isinstance(operand, Register):
            bits = self.registers[operand.name]
        elif isinstance(operand, Special):
            bits = self.specials[operand.name]
        elif isinstance(operand, Constant):
            if width == 1:
                return np.full(self.threads, bool(operand.bits))
            bits = np.full(self.threads, operand.bits & ((1 << width) - 1), UNSIGNED[width])
        else:
            raise PtxError(f"operand not understood in: {self.text}")
        if width == 1:
            return bits
        if bits.dtype.itemsize * 8 != width:
            bits = bits.astype(UNSIGNED[width])
        return bits.view(dtype_of(kind))

    def write(self, operand: Operand, values: Array, active: Array) -> None:
        """Signed values are extended into wider registers."""
        if not isinstance(operand, Register):
            raise PtxError(f"cannot write the operand in: {self.text}")
        if operand.name == "_":
            return
        width = self.program.widths[operand.name]
        values = np.broadcast_to(values, (self.threads,))
        if width > 1:
            if values.dtype.kind == "f":
                values = np.ascontiguousarray(values).view(UNSIGNED[values.dtype.itemsize * 8])
            values = values.astype(UNSIGNED[width])
        self.registers[operand.name] = np.where(active, values, self.registers[operand.name])

    def read_words(self, operand: Operand, size: int) -> list[Array]:
        """The registers of a vector (or one), as unsigned integers of `size` bytes."""
        parts = operand.parts if isinstance(operand, Vector) else (operand,)
        return [self.read(part, f"b{8 * size}") for part in parts]

    def write_words(self, operand: Operand, values: list[Array], active: Array) -> None:
        parts = operand.parts if isinstance(operand, Vector) else (operand,)
        for part, value in zip(parts, values, strict=True):
            self.write(part, value, active)

    def addresses(self, operand: Operand) -> Array:
        if not isinstance(operand, Address):
            raise PtxError(f"not an address in: {self.text}")
        if isinstance(operand.base, Constant):
            return np.full(self.threads, operand.base.bits + operand.offset, np.int64)
        return self.registers[operand.base.name].astype(np.int64) + operand.offset

    # ---- memory ----

    def global_places(self, addresses: Array, size: int, active: Array) -> Array:
        count_sectors(self.counters.glob[self.text], addresses, size, active)
        return self.memory.places_of(addresses, size, active, self.text)

    def shared_places(
        self, addresses: Array, size: int, active: Array, writes: bool, values: Array | None = None
    ) -> Array:
        count_wavefronts(self.counters.shared[self.text], addresses, size, active)
        return self.shared.places_of(addresses, size, active, writes, self.text, values)

    def load(self, op: Instruction, active: Array) -> None:
        kind, size = op.opcode[-1], width_of(op.opcode[-1]) // 8
        target, source = op.operands
        assert not isinstance(target, str)
        count = len(target.parts) if isinstance(target, Vector) else 1
        assert not isinstance(source, str)
        if "param" in op.opcode:
            data = self.parameters.bytes
            places = self.parameters.places_of(self.addresses(source), size * count, active, self.text)
        elif "shared" in op.opcode:
            data, places = self.shared.bytes, self.shared_places(self.addresses(source), size * count, active, False)
        elif "global" in op.opcode:
            data, places = self.memory.bytes, self.global_places(self.addresses(source), size * count, active)
        else:
            raise PtxError(f"unsupported: {op.text}")
        bytes_ = np.where(active[:, None], data[places[:, None] + np.arange(size * count)], 0)
        words = np.ascontiguousarray(bytes_, np.uint8).view(dtype_of(kind))
        self.write_words(target, [words[:, i] for i in range(count)], active)

    def store(self, op: Instruction, active: Array) -> None:
        size = width_of(op.opcode[-1]) // 8
        target, source = op.operands
        assert not isinstance(target, str)
        assert not isinstance(source, str)
        words = self.read_words(source, size)
        bytes_ = np.ascontiguousarray(np.stack(words, axis=1)).view(np.uint8)
        if "shared" in op.opcode:
            self.shared_places(self.addresses(target), size * len(words), active, True, bytes_)
        elif "global" in op.opcode:
            places = self.global_places(self.addresses(target), size * len(words), active)
            self.memory.bytes[(places[:, None] + np.arange(size * len(words)))[active]] = bytes_[active]
        else:
            raise PtxError(f"unsupported: {op.text}")

    # ---- cp.async ----

    def copy(self, op: Instruction, active: Array) -> None:
        if op.opcode[:2] != ("cp", "async") or "mbarrier" in op.opcode:
            raise PtxError(f"unsupported: {op.text}")
        if "commit_group" in op.opcode:
            self.groups += active
            return
        if "wait_group" in op.opcode:
            (left,) = op.operands
            assert isinstance(left, Constant)
            self.finish_copies(self.groups - left.bits, active)
            return
        if "shared" not in op.opcode or "global" not in op.opcode:
            raise PtxError(f"unsupported: {op.text}")
        target, source, size_, *more = op.operands
        assert isinstance(size_, Constant)
        size = size_.bits
        if "cache_hint" in " ".join(op.opcode):  # the last operand is the policy
            more = more[:-1]
        valid = np.full(self.threads, size)
        if more:
            assert not isinstance(more[0], str)
            valid = self.read(more[0], "b32").astype(np.int64)
        assert not isinstance(target, str)
        assert not isinstance(source, str)
        to = self.shared_places(self.addresses(target), size, active, True)
        self.shared.bytes[(to[:, None] + np.arange(size))[active]] = POISON
        places = self.global_places(self.addresses(source), size, active & (valid > 0))
        self.copies.append(Copy(to, places, size, valid, active.copy(), self.groups.copy(), op.text))

    def finish_copies(self, before: Array, active: Array) -> None:
        """All of each thread's groups with a number below `before`."""
        for copy in self.copies:
            done = copy.pending & active & (copy.group < before)
            if not done.any():
                continue
            offsets = np.arange(copy.size)
            data = self.memory.bytes[np.where(copy.valid > 0, copy.places, 0)[:, None] + offsets]
            data = np.where(offsets < copy.valid[:, None], data, 0).astype(np.uint8)
            self.shared.touch(copy.to, copy.size, done, True, copy.text)
            self.shared.bytes[(copy.to[:, None] + offsets)[done]] = data[done]
            copy.pending &= ~done
        self.copies = [copy for copy in self.copies if copy.pending.any()]

    # ---- warp instructions ----

    def whole_warps(self, active: Array) -> None:
        lanes = active.reshape(-1, LANES)
        if (lanes.any(axis=1) != lanes.all(axis=1)).any():
            raise PtxError(f"divergent warp in: {self.text}")

    def load_matrix(self, op: Instruction, active: Array) -> None:
        self.whole_warps(active)
        target, source = op.operands
        assert isinstance(target, Vector)
        assert not isinstance(source, str)
        count = len(target.parts)
        if "m8n8" not in op.opcode or "b16" not in op.opcode:
            raise PtxError(f"unsupported: {op.text}")
        reads = active & (np.arange(self.threads) % LANES < 8 * count)  # the other lanes' addresses are ignored
        places = self.shared_places(self.addresses(source), 16, reads, False)
        rows = self.shared.bytes[places[:, None] + np.arange(16)].reshape(-1, LANES, 16)
        words = warp.load_matrix(rows, count, "trans" in op.opcode)
        self.write_words(target, [w.reshape(-1) for w in words], active)

    def store_matrix(self, op: Instruction, active: Array) -> None:
        self.whole_warps(active)
        target, source = op.operands
        assert isinstance(source, Vector)
        assert not isinstance(target, str)
        if "m8n8" not in op.opcode or "b16" not in op.opcode or "trans" in op.opcode:
            raise PtxError(f"unsupported: {op.text}")
        count = len(source.parts)
        rows = warp.rows_of_matrices([w.reshape(-1, LANES) for w in self.read_words(source, 4)])
        values = np.zeros((self.threads // LANES, LANES, 16), np.uint8)
        values[:, : 8 * count] = rows
        writes = active & (np.arange(self.threads) % LANES < 8 * count)  # the other lanes' addresses are ignored
        self.shared_places(self.addresses(target), 16, writes, True, values.reshape(-1, 16))

    def mma(self, op: Instruction, active: Array) -> None:
        self.whole_warps(active)
        fragments = []
        for operand in op.operands[1:]:
            assert not isinstance(operand, str)
            fragments.append([w.reshape(-1, LANES) for w in self.read_words(operand, 4)])
        assert not isinstance(op.operands[0], str)
        words = warp.mma(op.opcode, *fragments)
        self.write_words(op.operands[0], [w.reshape(-1) for w in words], active)

    def shuffle(self, op: Instruction, active: Array) -> None:
        self.whole_warps(active)
        target, value, by, clamp, members = (o for o in op.operands if not isinstance(o, str))
        whole = 0 if op.opcode[2] == "up" else 31  # the last lane that a lane may take from, on its way there
        if (self.read(clamp, "b32") != whole).any() or (self.read(members, "b32") != 0xFFFFFFFF).any():
            raise PtxError(f"only shuffles of whole warps are supported: {op.text}")
        result = warp.shuffle(op.opcode[2], *(self.read(o, "b32").reshape(-1, LANES) for o in (value, by)))
        self.write(target.first if isinstance(target, Pair) else target, result.reshape(-1), active)

    def vote(self, op: Instruction, active: Array) -> None:
        self.whole_warps(active)
        target, value, members = (o for o in op.operands if not isinstance(o, str))
        if op.opcode[2:] != ("any", "pred") or (self.read(members, "b32")[active] != 0xFFFFFFFF).any():
            raise PtxError(f"only vote.any of whole warps is supported: {op.text}")
        lanes = self.read(value, "pred").reshape(-1, LANES)
        self.write(target, np.repeat(lanes.any(axis=1), LANES), active)

    def reduce_warp(self, op: Instruction, active: Array) -> None:
        self.whole_warps(active)
        target, value, members = (o for o in op.operands if not isinstance(o, str))
        if op.opcode[2:] != ("add", "s32") or (self.read(members, "b32")[active] != 0xFFFFFFFF).any():
            raise PtxError(f"only redux.sync.add.s32 of whole warps is supported: {op.text}")
        sums = self.read(value, "s32").reshape(-1, LANES).sum(axis=1, dtype=np.int32)
        self.write(target, np.repeat(sums, LANES), active)

    # ---- the rest ----

    def compare(self, op: Instruction, active: Array) -> None:
        kind = op.opcode[-1]
        target, a, b, *more = op.operands
        assert not isinstance(a, str)
        assert not isinstance(b, str)
        result = arithmetic.COMPARISONS[op.opcode[1]](self.read(a, kind), self.read(b, kind))
        if more:
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[op.opcode[2]]
            assert not isinstance(more[0], str)
            result = combine(result, self.read(more[0], "pred"))
        if isinstance(target, Pair):
            raise PtxError(f"unsupported: {op.text}")
        assert not isinstance(target, str)
        self.write(target, result, active)

    def move(self, op: Instruction, active: Array) -> None:
        """mov of a vector to a register or back: joins or cuts."""
        target, source = op.operands
        assert not isinstance(target, str)
        assert not isinstance(source, str)
        size = width_of(op.opcode[-1]) // 8
        if isinstance(source, Vector):
            words = np.stack(self.read_words(source, size // len(source.parts)), axis=1)
            self.write(target, np.ascontiguousarray(words).view(UNSIGNED[8 * size]).reshape(-1), active)
        else:
            assert isinstance(target, Vector)
            whole = np.ascontiguousarray(self.read(source, f"b{8 * size}"))
            parts = whole.view(UNSIGNED[8 * size // len(target.parts)]).reshape(self.threads, -1)
            self.write_words(target, list(parts.T), active)

    def compute(self, op: Instruction, active: Array) -> None:
        opcode = op.opcode
        operands = [o for o in op.operands if not isinstance(o, str)]
        if opcode[0] == "createpolicy":
            return
        if not operands or opcode[0] in ("wgmma", "fence"):
            raise PtxError(f"unsupported: {op.text}")
        if opcode[0] == "setp":
            self.compare(op, active)
        elif opcode[0] == "mov" and any(isinstance(o, Vector) for o in operands):
            self.move(op, active)
        elif opcode[0] == "cvt" and len(operands) == 3:  # two floats to a pair, the upper half first
            high, low = (self.read(o, "f32").astype(np.float64) for o in operands[1:])
            self.write(operands[0], pairs(opcode[2], np.stack([low, high], axis=1)), active)
        elif opcode[0] == "cvt":
            _, origin = arithmetic.types_of(opcode)
            self.write(operands[0], arithmetic.convert(opcode, self.read(operands[1], origin)), active)
        else:
            types = arithmetic.operand_types(opcode, len(operands) - 1)
            values = [self.read(o, kind) for o, kind in zip(operands[1:], types, strict=True)]
            if opcode[0] == "lop3":
                values[3] = values[3][0]
            self.write(operands[0], arithmetic.compute(opcode, values), active)


def run_block(block: Block) -> None:
    program = block.program
    handlers = {
        "ld": block.load, "st": block.store, "cp": block.copy, "ldmatrix": block.load_matrix,
        "stmatrix": block.store_matrix, "mma": block.mma, "shfl": block.shuffle,
        "vote": block.vote, "redux": block.reduce_warp,
    }  # fmt: skip
    counter = np.zeros(block.threads, np.int64)
    alive = block.everyone.copy()
    waiting = np.zeros(block.threads, bool)
    gathering = np.zeros(block.threads, bool)  # at a bar.warp.sync, until the lanes that took another way are there
    while alive.any():
        if gathering.any():
            gathering &= ~np.repeat((gathering | ~alive).reshape(-1, LANES).all(axis=1), LANES)
        ready = alive & ~waiting & ~gathering
        if not ready.any():
            if gathering.any():
                raise PtxError("lanes wait at bar.warp.sync for others of their warp, which wait elsewhere")
            waiting[:] = False
            block.shared.epoch += 1
            continue
        at = int(counter[ready].min())
        if at >= len(program.code):
            raise PtxError("the code ends without ret")
        here = ready & (counter == at)
        op = program.code[at]
        block.text = op.text
        active = here
        if op.guard is not None:
            active = here & (block.registers[op.guard[0]] == op.guard[1])
        block.counters.instructions += int(active.sum())
        counter[here] = at + 1
        name = op.opcode[0]
        if name == "bra":
            counter[active] = program.labels[str(op.operands[0])]
        elif name in ("ret", "exit"):
            alive &= ~active
        elif not active.any():
            pass
        elif name in ("bar", "barrier"):
            wait_at_barrier(block, op, alive, active)
            if "warp" in op.opcode:
                gathering |= active
            else:
                waiting |= active
        else:
            handlers.get(name, block.compute)(op, active)


def wait_at_barrier(block: Block, op: Instruction, alive: Array, active: Array) -> None:
    if op.opcode[:2] == ("bar", "warp"):
        (members,) = op.operands
        if not isinstance(members, Constant) or members.bits & 0xFFFFFFFF != 0xFFFFFFFF:
            raise PtxError(f"only whole warps: {op.text}")
        return
    if "sync" not in op.opcode or op.operands != (Constant(0),):
        raise PtxError(f"unsupported: {op.text}")
    warps = active.reshape(-1, LANES).any(axis=1)
    if (alive.reshape(-1, LANES)[warps] != active.reshape(-1, LANES)[warps]).any():
        raise PtxError(f"divergent barrier: {op.text}")


@dataclass(frozen=True)
class Outcome:
    races: set[str]
    counters: Counters


def launch(
    program: Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    parameters: Sequence[bytes],
    buffers: Sequence[Array],
) -> Outcome:
    """Runs all blocks of a grid, one after the other.

    Args:
        parameters: the bytes of each; pointers are addresses inside `buffers`.
        buffers: uint8 views of all the memory that the kernel may touch; written in place.
    """
    sizes = [size for _, size in program.parameters.values()]
    if [len(p) for p in parameters] != sizes:
        raise PtxError(f"parameters must have {sizes} bytes, got {[len(p) for p in parameters]}")
    threads = block[0] * block[1] * block[2]
    if threads % LANES:
        raise PtxError(f"blocks must be whole warps, got {threads} threads")
    memory = GlobalMemory([(b.ctypes.data, b) for b in buffers if len(b)])
    places = [place for place, _ in program.parameters.values()]
    space = GlobalMemory([(place, np.frombuffer(data, np.uint8)) for place, data in zip(places, parameters)])
    outcome = Outcome(set(), Counters())
    index = np.arange(threads, dtype=np.uint32)
    specials = {
        "%tid.x": index % block[0],
        "%tid.y": index // block[0] % block[1],
        "%tid.z": index // (block[0] * block[1]),
    }
    specials["%laneid"] = index % LANES
    for place in np.ndindex(grid[2], grid[1], grid[0]):
        for axis, at, total, size in zip("zyx", place, reversed(grid), reversed(block)):
            for name, value in (("ctaid", at), ("nctaid", total), ("ntid", size)):
                specials[f"%{name}.{axis}"] = np.full(threads, value, np.uint32)
        shared = SharedMemory(shared_bytes)
        with np.errstate(all="ignore"):
            run_block(Block(program, memory, shared, space, specials, threads, outcome.counters))
        outcome.races.update(shared.races)
    memory.copy_back()
    return outcome
