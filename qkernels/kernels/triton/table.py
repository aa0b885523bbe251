"""Which tile runs which shape: a table per card and shape class, nearest neighbour in log space. No Triton here.

Nothing is measured at run time. `configurations.json` ships with the package; its numbers are predictions (the file says so).
`qkernels bench --tune` measures and writes a table of the user's own, whose entries stand before the shipped ones.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import ArgumentError

TABLE = Path(__file__).parent / "configurations.json"
USER_TABLE = "QKERNELS_TRITON_TABLE"  # the environment variable that says where the user's table is
ANY_CARD = "default"
MOST_ROWS_OF_STACKS = 64
MOST_TILE = 1024  # rows or columns of a tile: beyond what any card holds


Cards = Mapping[str, tuple["Entry", ...]]


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Args:
        kernel: "gemv" (one row of x a program), "gemm" (tensor cores) or "dequantize" (then the card's own product).
        block_m, block_n, block_k: rows of x, rows of the weight and columns of a step at 4 bits (`block_bytes` says how many of
            which widths). block_m is 1 for "gemv" and "dequantize".
        programs_per_sm: K is split until there are about so many programs per multiprocessor; 0: K is never split.
        num_warps, num_stages: Triton's; a loop has num_stages - 1 steps under way. "dequantize" has no loop.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    programs_per_sm: int
    num_warps: int
    num_stages: int

    def block_bytes(self, widths: tuple[int, ...]) -> int:
        """Bytes of each line (layout `kpack`) that a step reads, of codes in planes of these widths.

        At 8 bits as many as at 4, so half the columns; at other widths half as many, and 16 at least: a thread's load, and the
        depth of a tensor core's product. One row of x takes more of 2 bits, since what it converts of x serves few rows, but no
        more than 512 columns. (3 bits need 8.5 instructions a weight with 512 columns, 10.8 with 256; with 1024 some codes spill:
        16 rows, sm_80.) 128 rows take as many columns as at 4 bits, or x outgrows the shared memory of sm_90 at 3 and 5.
        """
        fields = 8 // widths[-1]
        if fields <= 2:
            return self.block_k // 2
        part = fields if self.block_m > 64 else 4 if len(widths) > 1 or self.kernel != "gemv" else 2
        return max(min(self.block_k // part, 512 // fields), 16)

    def bytes_per_split(self, M: int, N: int, line_bytes: int, block_bytes: int, multiprocessors: int) -> int:
        """How many bytes of each line a program multiplies, a multiple of block_bytes."""
        tiles = -(-M // self.block_m) * -(-N // self.block_n)
        steps = max(1, -(-line_bytes // block_bytes))
        splits = min(steps, max(1, multiprocessors * self.programs_per_sm // tiles))
        return -(-steps // splits) * block_bytes


def run_bytes(group: int, fields: int, run: int, block_bytes: int) -> int:
    """So many bytes in a row share their group's scale, from every multiple of it on: a power of two, block_bytes at most.

    Columns of a byte lie `run` apart, in one group or in several (layout `kpack`). A group of 0 holds all columns.
    """
    if group == 0:
        return block_bytes
    power = group & -group
    return min(power // fields if power >= fields * run else min(power, run), block_bytes)


def shared_fields(group: int, fields: int, run: int) -> int:
    """So many columns of a byte in a row lie in one group, from every multiple of it on."""
    power = group & -group
    return fields if group == 0 or power >= fields * run else max(power // run, 1)


def tiles_in(slice_bytes: int, K: int) -> int:
    """How many tiles of 64 rows of K 16-bit weights a slice holds; one at least."""
    return max(1, slice_bytes // (2 * max(K, 1) * 64))


@dataclass(frozen=True)
class Entry:
    """A configuration and the shape that it is for."""

    M: int
    N: int
    K: int
    config: Config


def user_table() -> Path:
    """Where the user's table is: `QKERNELS_TRITON_TABLE`, or `qkernels/triton.json` in the platform's folder for settings."""
    if named := os.environ.get(USER_TABLE):
        return Path(named)
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, Path.home() raises where there is no home
    if sys.platform == "win32":
        base = Path(os.environ.get("APPDATA") or home / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return base / "qkernels" / "triton.json"


@lru_cache(maxsize=8)
def read(path: Path = TABLE) -> Cards:
    """Entries by card: "sm80", …, and "default" for every other one. Read once a process; a file that is not there is empty.

    Raises:
        ArgumentError: the file is no such table; it names what is wrong.
    """
    try:
        cards = json.loads(path.read_text(encoding="utf-8"))["cards"]
        return {card: tuple(_entry(row) for row in rows) for card, rows in cards.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except KeyError as error:
        raise _unusable(path, f"{error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:  # no JSON, no UTF-8, or not the types that a table has
        raise _unusable(path, str(error)) from error


def write(path: Path, cards: Cards) -> None:
    """Replace a table as a whole: a reader finds the old one or the new one.

    Raises:
        ArgumentError: the file cannot be written.
    """
    rows = {card: [_row(entry) for entry in entries] for card, entries in cards.items()}
    about = "Launch configurations of the Triton kernels on layout kpack, measured here by `qkernels bench --tune`."
    text = json.dumps({"about": about, "cards": rows}, indent=1) + "\n"
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise ArgumentError(
            f"the table of Triton configurations cannot be written to {path}: {error.strerror}; name another file in "
            f"{USER_TABLE}"
        ) from error
    read.cache_clear()
    _nearest.cache_clear()


def with_entries(cards: Cards, card: str, new: Iterable[Entry]) -> Cards:
    """`cards` with new entries for one card; those for the same shapes are replaced."""
    by_shape = {(e.M, e.N, e.K): e for e in (*cards.get(card, ()), *new)}
    return {**cards, card: tuple(by_shape[shape] for shape in sorted(by_shape))}


def choose(card: str, M: int, N: int, K: int) -> Config:
    """The entry nearest to the shape: distances of log2, those of M counted double; of two at one distance the user's.

    M, N and K are positive. A card in neither table takes the default entries.

    Raises:
        ArgumentError: the user's table is no table.
    """
    return _nearest(os.environ.get(USER_TABLE), card, M, N, K)


def choose_tile(card: str, M: int, N: int, K: int) -> Config:
    """The same among tiles of tensor cores alone ("gemm"): what sorted rows of stacked experts take, M of them an expert.

    Of at most 64 rows: with 128 the experts' kernel spills on sm80 to sm89 (8 bytes), and an expert seldom has so many.

    Raises:
        ArgumentError: the user's table is no table.
    """
    return _nearest(os.environ.get(USER_TABLE), card, M, N, K, True)


@lru_cache(maxsize=4096)
def _nearest(_named: str | None, card: str, M: int, N: int, K: int, tiles: bool = False) -> Config:
    """Called at every launch: the variable is part of what is cached by, the file is looked for once."""
    shipped, own = read(), read(user_table())

    def distance(entry: Entry) -> float:
        m, n, k = (math.log2(a / b) for a, b in ((M, entry.M), (N, entry.N), (K, entry.K)))
        return 2 * abs(m) + abs(n) + abs(k)

    entries = (*own.get(card, ()), *shipped.get(card, shipped[ANY_CARD]))
    return min((e for e in entries if not tiles or for_stacks(e.config)), key=distance).config


def for_stacks(config: Config) -> bool:
    """Whether sorted rows of stacked experts take it."""
    return config.kernel == "gemm" and config.block_m <= MOST_ROWS_OF_STACKS


def _entry(row: dict[str, Any]) -> Entry:
    """Raises ValueError, TypeError or KeyError for anything that is no entry: a wrong number would fail inside a launch."""
    M, N, K = (_whole(row, name, 1, 2**40) for name in ("M", "N", "K"))
    kernel = row["kernel"]
    if kernel not in ("gemv", "gemm", "dequantize"):
        raise ValueError(f'kernel must be "gemv", "gemm" or "dequantize", got {kernel!r}')
    least, most = (8, MOST_TILE) if kernel == "gemm" else (1, 1)
    return Entry(
        M,
        N,
        K,
        Config(
            kernel,
            block_m=_power(row, "block_m", least, most),
            block_n=_power(row, "block_n", 16, MOST_TILE),
            block_k=_power(row, "block_k", 64, MOST_TILE),
            programs_per_sm=_whole(row, "programs_per_sm", 0, 1024),
            num_warps=_power(row, "num_warps", 1, 32),
            num_stages=_whole(row, "num_stages", 1, 16),
        ),
    )


def _row(entry: Entry) -> dict[str, int | str]:
    return {"M": entry.M, "N": entry.N, "K": entry.K, **asdict(entry.config)}


def _whole(row: dict[str, Any], name: str, least: int, most: int) -> int:
    value = row[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    return value


def _power(row: dict[str, Any], name: str, least: int, most: int) -> int:
    value = _whole(row, name, least, most)
    if value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")
    return value


def _unusable(path: Path, why: str) -> ArgumentError:
    return ArgumentError(
        f"{path} must be a table of Triton configurations, as `qkernels bench --tune` writes it: {why}; write it anew, remove "
        f"it, or name another file in {USER_TABLE}"
    )
