"""Which tile runs which shape: `configurations.json`, per card and shape class, nearest neighbour in log space. No Triton here.

Nothing is measured at run time. The shipped numbers are predictions (the file says so).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).parent / "configurations.json"
ANY_CARD = "default"


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Args:
        kernel: "gemv" (one row of x a program) or "gemm" (tensor cores).
        block_m, block_n, block_k: rows of x, rows of the weight and columns of a step; block_m is 1 for "gemv".
        programs_per_sm: K is split until there are about so many programs per multiprocessor; 0: K is never split.
        num_warps, num_stages: Triton's.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    programs_per_sm: int
    num_warps: int
    num_stages: int

    def block_bytes(self, columns_per_byte: int, groups: int, group_size: int) -> int:
        """Bytes of a row that a step reads: fewer than block_k says if that keeps a step inside one group; 32 at least."""
        length = self.block_k // columns_per_byte
        while length > 32 and groups > 1 and group_size % (length * columns_per_byte):
            length //= 2
        return length

    def bytes_per_split(self, M: int, N: int, row_bytes: int, block_bytes: int, multiprocessors: int) -> int:
        """How many bytes of each row a program multiplies, a multiple of block_bytes."""
        tiles = -(-M // self.block_m) * -(-N // self.block_n)
        steps = max(1, -(-row_bytes // block_bytes))
        splits = min(steps, max(1, multiprocessors * self.programs_per_sm // tiles))
        return -(-steps // splits) * block_bytes


@dataclass(frozen=True)
class Entry:
    """A configuration and the shape that it is for."""

    M: int
    N: int
    K: int
    config: Config


@lru_cache(maxsize=4)
def read(path: Path = TABLE) -> dict[str, tuple[Entry, ...]]:
    """Entries by card: "sm80", …, and "default" for every other one."""
    cards = json.loads(path.read_text(encoding="utf-8"))["cards"]
    return {card: tuple(_entry(row) for row in rows) for card, rows in cards.items()}


@lru_cache(maxsize=4096)
def choose(card: str, M: int, N: int, K: int) -> Config:
    """The entry nearest to the shape: distances of log2, those of M counted double. M, N and K are positive."""
    cards = read()

    def distance(entry: Entry) -> float:
        m, n, k = (math.log2(a / b) for a, b in ((M, entry.M), (N, entry.N), (K, entry.K)))
        return 2 * abs(m) + abs(n) + abs(k)

    return min(cards.get(card, cards[ANY_CARD]), key=distance).config


def _entry(row: dict[str, int | str]) -> Entry:
    M, N, K = (int(row[name]) for name in ("M", "N", "K"))
    numbers = [int(row[n]) for n in ("block_m", "block_n", "block_k", "programs_per_sm", "num_warps", "num_stages")]
    return Entry(M, N, K, Config(str(row["kernel"]), *numbers))
