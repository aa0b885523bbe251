"""What machine this is: how many cores this process may use, and whether torch runs more threads than that.

torch counts the cores that the scheduler may use (`sched_getaffinity`) when it is imported, and knows nothing of a container's
time quota: with two cores' worth of time on a machine of 64 it runs 64 threads (measured with one of two: `docs/cpu-decode.md`).
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import ArgumentError

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Cores:
    """What bounds the processor time of this process.

    Args:
        affinity: cores that its threads may be scheduled on.
        quota: seconds of processor time in a second, the smallest quota of its cgroups; None: no quota.
        unread: quotas that could not be read, and why.
    """

    affinity: int
    quota: float | None = None
    unread: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """Threads that can all run at once: of a quota the whole cores, since the last thread would wait for the rest of one."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, math.floor(self.quota)))

    def __str__(self) -> str:
        quota = "none" if self.quota is None else f"{self.quota:g}"
        return f"{self.usable} core{'s' * (self.usable > 1)} (affinity: {self.affinity}, cgroup quota: {quota})"


def find_cores(proc: Path = PROC) -> Cores:
    """Look at the affinity of all threads and at the quotas of this process's cgroups and of those around them, v1 and v2."""
    quotas, unread = [], []
    try:
        places = _cgroups(proc)
    except FileNotFoundError:  # no Linux, or one without cgroups
        places = []
    except (OSError, ValueError) as error:
        places, unread = [], [f"{proc}: {error}"]
    for directory, names in places:
        try:
            quotas += _quota(*((directory / name).read_text() for name in names))
        except FileNotFoundError:  # the outermost cgroup, or one whose time nobody divides: no quota there
            continue
        except (OSError, ValueError) as error:
            unread.append(f"{directory / names[0]}: {error}")
    return Cores(_affinity(proc), min(quotas, default=None), tuple(unread))


def oversubscribed(cores: Cores, threads: int) -> str | None:
    """What is to be said where torch runs `threads` threads on these cores; None where they are not too many."""
    if threads <= cores.usable:
        return None
    return (
        f"torch runs {threads} threads, this process may use {cores}. Then a call of most linear layers takes 30 to 60 µs longer "
        "(4 and 8 threads on 2 cores), and beyond a quota everything stops for up to 50 ms at a time (docs/cpu-decode.md). "
        f"Set OMP_NUM_THREADS={cores.usable}, or call torch.set_num_threads({cores.usable})"
    )


def _affinity(proc: Path) -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    import torch

    # With OMP_PROC_BIND the main thread is tied to one core from `import torch` on, and each thread of the pool to its
    # own: all of them say where the process may run, once a parallel region has made them.
    torch.zeros(1 << 17).exp_()
    allowed = set(os.sched_getaffinity(0))
    for task in (proc / "task").glob("[0-9]*"):
        try:
            allowed |= os.sched_getaffinity(int(task.name))
        except ProcessLookupError:  # it ended meanwhile
            continue
    return len(allowed)


def _cgroups(proc: Path) -> list[tuple[Path, list[str]]]:
    """Directories that may hold a quota for this process, and the names of the files it is in.

    Membership: cgroups(7); what is mounted where: proc_pid_mountinfo(5); why a path may not be there: cgroup_namespaces(7).
    """
    mounts = [_mount(line) for line in (proc / "mountinfo").read_text().splitlines()]
    places: list[tuple[Path, list[str]]] = []
    for line in (proc / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            kind, names = "cgroup2", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            kind, names = "cgroup", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        for root, point, found, options in mounts:
            if found == kind and (kind == "cgroup2" or "cpu" in options):
                # A container may be told the host's path, and see only its own part of the tree: at the mount point.
                known = Path(path).is_relative_to(root) and ".." not in Path(path).parts
                directory = point / Path(path).relative_to(root) if known else point
                places += [(each, names) for each in (directory, *directory.parents) if each.is_relative_to(point)]
    return places


def _mount(line: str) -> tuple[Path, Path, str, list[str]]:
    """Root, mount point, kind and options of the file system (not of the mount) from a line of mountinfo."""
    mount, _, system = line.partition(" - ")
    _, _, _, root, point, *_ = (
        re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word) for word in mount.split(" ")
    )
    kind, _, options = system.split(" ", 2)
    return Path(root), Path(point), kind, options.split(",")


def _quota(limit: str, period: str = "") -> list[float]:
    """Cores' worth of time from `cpu.max` ("200000 100000", "max 100000") or from v1's two files (-1: no quota); empty: none."""
    words = f"{limit} {period}".split()
    if words[:1] in (["max"], ["-1"]):
        return []
    time, each = map(int, words)
    if time <= 0 or each <= 0:
        raise ValueError(f"expected a time and a period above 0, got {time} and {each}")
    return [time / each]


def memory_available(proc: Path = PROC) -> int:
    """Bytes that this process may still take without swapping: what the system has free, at most what its cgroups (v2) leave.

    Raises:
        ArgumentError: the system does not say (no Linux).
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        places = _cgroups(proc)
    except (OSError, ValueError, StopIteration) as error:
        raise ArgumentError(f"this system does not say how much memory is free ({error!r}); name an amount") from error
    for directory, names in places:
        if names == ["cpu.max"]:
            with suppress(OSError, ValueError):  # "max", or no such controller
                limit = int((directory / "memory.max").read_text())
                free = min(free, limit - int((directory / "memory.current").read_text()))
    return max(free, 0)
