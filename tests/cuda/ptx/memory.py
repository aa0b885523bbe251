"""Global and shared memory of a launch: bounds, alignment, races between warps, bank conflicts, sectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .program import PtxError
from .values import Array

POISON = 0xCD  # shared memory that nobody has written, or that a copy has not reached yet
LANES = 32


def check(bad: Array, addresses: Array, what: str, text: str) -> None:
    if bad.any():
        thread = int(np.flatnonzero(bad)[0])
        raise PtxError(f"{what}: thread {thread}, address {int(addresses[thread]):#x}, in: {text}")


class GlobalMemory:
    """Buffers at addresses. They are copied in, and `copy_back` brings them home."""

    def __init__(self, buffers: Sequence[tuple[int, Array]]) -> None:
        """`buffers`: (address, uint8 array that is not empty)."""
        self.buffers = [buffer for _, buffer in sorted(buffers, key=lambda b: b[0])]
        lengths = [len(b) for b in self.buffers]
        self.starts = np.array(sorted(address for address, _ in buffers), np.int64)
        self.ends = self.starts + np.array(lengths, np.int64)
        self.places = np.cumsum([0, *lengths])[:-1]
        self.bytes = np.concatenate(self.buffers) if self.buffers else np.zeros(0, np.uint8)

    def copy_back(self) -> None:
        for buffer, place in zip(self.buffers, self.places):
            buffer[:] = self.bytes[place : place + len(buffer)]

    def places_of(self, addresses: Array, size: int, active: Array, text: str) -> Array:
        """Indices into `bytes`; 0 for threads that are not active."""
        if not len(self.starts):
            check(active, addresses, "global access out of bounds", text)
        which = np.maximum(np.searchsorted(self.starts, addresses, side="right") - 1, 0)
        outside = (addresses < self.starts[which]) | (addresses + size > self.ends[which])
        check(active & outside, addresses, "global access out of bounds", text)
        check(active & (addresses % size != 0), addresses, "misaligned global access", text)
        return np.where(active, addresses - self.starts[which] + self.places[which], 0)


class SharedMemory:
    """Shared memory of a block. Between two barriers no byte may be touched by two warps if one of them writes it."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, POISON, np.uint8)
        self.epoch = 0  # grows at every barrier of the block
        self.written_in = np.full(size, -1, np.int32)
        self.written_by = np.zeros(size, np.int32)
        self.read_in = np.full(size, -1, np.int32)
        self.read_by = np.zeros(size, np.int32)  # -1: several warps
        self.races: set[str] = set()

    def places_of(
        self, addresses: Array, size: int, active: Array, writes: bool, text: str, values: Array | None = None
    ) -> Array:
        outside = (addresses < 0) | (addresses + size > len(self.bytes))
        check(active & outside, addresses, "shared access out of bounds", text)
        check(active & (addresses % size != 0), addresses, "misaligned shared access", text)
        if active.any():
            self.touch(addresses, size, active, writes, text, values)
        return np.where(active, addresses, 0)

    def touch(
        self, addresses: Array, size: int, active: Array, writes: bool, text: str, values: Array | None = None
    ) -> None:
        """`values`: uint8 [threads, size] that a store puts; races between equal ones are told apart ("repeated write")."""
        warps = (np.arange(len(addresses)) // LANES)[active]
        at = addresses[active][:, None] + np.arange(size)
        by = np.broadcast_to(warps[:, None], at.shape)
        race = (self.written_in[at] == self.epoch) & (self.written_by[at] != by)
        repeated = np.zeros_like(race)
        if writes:
            if values is not None:
                repeated = race & (self.bytes[at] == values[active])
                self.bytes[at] = values[active]
            race |= (self.read_in[at] == self.epoch) & (self.read_by[at] != by)
            self.written_in[at] = self.epoch
            self.written_by[at] = by
            together = self.written_by[at] != by  # two warps in this very instruction
            if values is not None:
                repeated |= together & (self.bytes[at] == values[active])
            race |= together
        else:
            several = (self.read_in[at] == self.epoch) & (self.read_by[at] != by)
            self.read_in[at] = self.epoch
            self.read_by[at] = by
            several |= self.read_by[at] != by
            self.read_by[at[several]] = -1
        if race.any():
            kind = "read" if not writes else "write" if (race & ~repeated).any() else "repeated write"
            self.races.add(f"{kind}: {text}")


@dataclass
class Traffic:
    """Of one instruction: requests by warps, wavefronts (sectors) that they took, and the least that the bytes need."""

    requests: int = 0
    used: int = 0
    least: int = 0

    def __iadd__(self, other: Traffic) -> Traffic:
        self.requests += other.requests
        self.used += other.used
        self.least += other.least
        return self


@dataclass
class Counters:
    instructions: int = 0  # times threads
    shared: defaultdict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))  # by the instruction's text
    glob: defaultdict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))


def count_wavefronts(traffic: Traffic, addresses: Array, size: int, active: Array) -> None:
    """Shared memory moves 128 bytes a wavefront, one word from each of 32 banks; 8- and 16-byte accesses go by half and
    quarter warps. Lanes that read the same word share it."""
    group = LANES if size <= 4 else LANES * 4 // size
    for start in range(0, len(addresses), LANES):
        traffic.requests += bool(active[start : start + LANES].any())
        for part in range(start, start + LANES, group):
            lanes = addresses[part : part + group][active[part : part + group]]
            if len(lanes):
                words = np.unique((lanes[:, None] + np.arange(0, max(size, 4), 4)) // 4)
                traffic.used += int(np.bincount(words % 32).max())
                traffic.least += -(-len(words) // 32)


def count_sectors(traffic: Traffic, addresses: Array, size: int, active: Array) -> None:
    """Global memory moves sectors of 32 bytes."""
    for start in range(0, len(addresses), LANES):
        lanes = addresses[start : start + LANES][active[start : start + LANES]]
        if len(lanes):
            touched = np.unique((lanes[:, None] + np.arange(size)).reshape(-1))
            traffic.requests += 1
            traffic.used += len(np.unique(touched // 32))
            traffic.least += -(-len(touched) // 32)
