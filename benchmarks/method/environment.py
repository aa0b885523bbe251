"""What a number depends on: CPU or GPU, driver, clocks, versions, commit, date, and how quiet the machine was."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import qkernels
from qkernels import extension

from ..peers import PEER_PACKAGES, version_of
from .statistics import median_interval

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# A machine is called quiet if a fixed piece of work takes within this of its median in 9 of 10 repeats, and nothing else wants
# more than a quarter of a core.
QUIET_JITTER, QUIET_LOAD = 0.05, 0.25
_GPU_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu",
    "persistence_mode", "clocks_throttle_reasons.active",
)  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """Everything about the place and the time of a run, as JSON types."""
    status = extension.status()
    found: dict[str, Any] = {
        "machine": machine_name(device),
        "device": str(device),
        "date": now(),
        "commit": commit(),
        "qkernels": qkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in PEER_PACKAGES if (version := version_of(name)) is not None},
        "isa": status.isa,
        "extension": status.error or "loaded",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": cpu_caches(),
        "cpu_mhz": cpu_mhz(),
        "memory_bytes": memory_bytes(),
        "quiet": quietness(),
    }
    if device.type == "cuda":
        found["gpu"] = gpu(device)
    return found


def now() -> str:
    """Date and time, ISO 8601, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def machine_name(device: torch.device) -> str:
    """A directory name for results: the GPU's name, or the CPU's with its cores."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of the source tree, "+changes" where files other than results differ; outside a repository what
    QKERNELS_COMMIT says (a copy that was taken elsewhere), or "unknown"."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}+changes" if _git(*_CHANGES) else head
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("QKERNELS_COMMIT", "unknown")


_CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def cpu_name() -> str:
    """The CPU's name with family and model: virtual machines often hide the generation in the name."""
    fields = _cpuinfo()
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else name


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}


def cpu_mhz() -> float | None:
    """The clock that the kernel reports now; virtual machines report a constant."""
    value = _cpuinfo().get("cpu MHz")
    return float(value) if value else None


def cpu_caches(system: Path = Path("/sys/devices/system/cpu")) -> dict[str, int]:
    """Bytes of data caches by level, {"L1d": …, "L2": …, "L3": …}: one instance of each, and all instances of the last level.

    A machine of several chiplets or sockets has a last-level cache in each. A virtual machine may show fewer than it has.
    """
    found: dict[str, dict[str, int]] = {}
    for index in sorted(system.glob("cpu[0-9]*/cache/index*")):
        names = ("level", "type", "size", "shared_cpu_list")
        level, kind, size, shared = ((index / name).read_text().strip() for name in names)
        if kind != "Instruction":
            name = f"L{level}{'d' if level == '1' else ''}"
            found.setdefault(name, {})[shared] = int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
    last = max(found, default="")
    return {name: sum(same.values()) if name == last else max(same.values()) for name, same in sorted(found.items())}


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cache_bytes(device: torch.device) -> int:
    """The last-level cache that rotation has to exceed: L2 of a GPU, the largest cache of a CPU (32 MiB if unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(cpu_caches().values(), default=32 << 20)


def memory_bytes() -> int | None:
    """Memory of the machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    path = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(match[1]) * 1024 if match else 4 << 30


def quietness(repeats: int = 60) -> dict[str, Any]:
    """How steady this machine is now: the spread of a fixed piece of single-threaded work, and the load average."""
    data = torch.arange(1 << 14, dtype=torch.float32)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(40):
            torch.sin(data)
        times.append(time.perf_counter() - start)
    ordered, load = sorted(times), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    jitter = ordered[int(0.9 * len(ordered))] / median_interval(times).median - 1
    return {"jitter": round(jitter, 4), "load": round(load, 2), "quiet": jitter < QUIET_JITTER and load < QUIET_LOAD}


def gpu(device: torch.device) -> dict[str, Any]:
    """The GPU as torch and nvidia-smi see it; what nvidia-smi does not answer is left out."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "arch": f"sm{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        found |= dict(zip(_GPU_FIELDS, (value.strip() for value in answer.split(",")), strict=False))
    except (OSError, subprocess.SubprocessError) as error:
        found["nvidia-smi"] = f"no answer: {error}"
    return found
