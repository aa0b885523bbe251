"""Where a model may run: this machine, a card of the table, or so much memory."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from ..errors import ArgumentError
from ..kernels.catalogue import arch_of
from ..machine import memory_available

GIB: Final = 2**30
# Memory that a device gives up before the first weight: a CUDA context with torch's and our modules (0.3 to 0.6 GiB are usual,
# unmeasured here), or an interpreter with torch and transformers imported (measured: 0.37 GiB resident, torch 2.13.0).
CUDA_CONTEXT: Final = int(0.6 * GIB)
PROCESS: Final = int(0.4 * GIB)


@dataclass(frozen=True)
class Device:
    """A place for a model.

    Args:
        name: as it was asked for.
        arch: "cpu", "sm90", …: what kernels are chosen for.
        memory: bytes.
        gbs: bandwidth of its memory, GB/s; None: not known.
        source: where these numbers are from.
        here: whether it is this machine, so that kernels must also be installed.
        overhead: bytes that are gone before the first weight.
    """

    name: str
    arch: str
    memory: int
    gbs: float | None
    source: str
    here: bool
    overhead: int

    @property
    def is_cpu(self) -> bool:
        return self.arch == "cpu"


@dataclass(frozen=True)
class Card:
    """What a maker's data sheet says: memory in units of 10^9 bytes as advertised (which drivers show as so many GiB, less what
    ECC and the driver keep), bandwidth in GB/s."""

    arch: str
    gigabytes: int
    gbs: float
    source: str


_NVIDIA: Final = "NVIDIA data sheet"
_GEFORCE: Final = "nvidia.com, GeForce specifications"
CARDS: Final[dict[str, Card]] = {
    "a100-40gb": Card("sm80", 40, 1555, f"{_NVIDIA}, A100"),
    "a100-80gb": Card("sm80", 80, 2039, f"{_NVIDIA}, A100 (SXM)"),
    "a10": Card("sm86", 24, 600, f"{_NVIDIA}, A10"),
    "a6000": Card("sm86", 48, 768, f"{_NVIDIA}, RTX A6000"),
    "rtx3060": Card("sm86", 12, 360, _GEFORCE),
    "rtx3090": Card("sm86", 24, 936, _GEFORCE),
    "l4": Card("sm89", 24, 300, f"{_NVIDIA}, L4"),
    "l40s": Card("sm89", 48, 864, f"{_NVIDIA}, L40S"),
    "rtx4060ti-16gb": Card("sm89", 16, 288, _GEFORCE),
    "rtx4070": Card("sm89", 12, 504, _GEFORCE),
    "rtx4080": Card("sm89", 16, 717, _GEFORCE),
    "rtx4090": Card("sm89", 24, 1008, _GEFORCE),
    "rtx6000ada": Card("sm89", 48, 960, f"{_NVIDIA}, RTX 6000 Ada"),
    "h100": Card("sm90", 80, 3350, f"{_NVIDIA}, H100 (SXM)"),
    "h100-pcie": Card("sm90", 80, 2000, f"{_NVIDIA}, H100 (PCIe)"),
    "h200": Card("sm90", 141, 4800, f"{_NVIDIA}, H200"),
    "rtx5080": Card("sm120", 16, 960, _GEFORCE),
    "rtx5090": Card("sm120", 32, 1792, _GEFORCE),
    "rtxpro6000": Card("sm120", 96, 1792, f"{_NVIDIA}, RTX PRO 6000 Blackwell"),
}
# Cards of consumer names have so many GiB; those of data centres so many 10^9 bytes.
_IN_GIB: Final = ("rtx", "a6000")
_AMOUNT: Final = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>gib|gb|mib|mb)")
_UNITS: Final = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
_A_CARD: Final = "sm86"  # kernels that a plain amount of GPU memory is planned with; newer cards have them, too


def device_of(text: str) -> Device:
    """A device as the command line spells it: "cpu", "cuda:0", a key of `CARDS`, or an amount of GPU memory ("24GiB").

    Raises:
        ArgumentError: none of these, or a GPU that is not there.
    """
    word = text.lower().replace(" ", "").replace("_", "-")
    amount = _AMOUNT.fullmatch(word)
    if amount is not None:
        memory = int(float(amount["number"]) * _UNITS[amount["unit"]])
        return Device(text, _A_CARD, memory, None, f"an amount; kernels as on {_A_CARD}", False, CUDA_CONTEXT)
    if word in CARDS or word.replace("-", "") in CARDS:
        card = CARDS[word if word in CARDS else word.replace("-", "")]
        unit = GIB if word.startswith(_IN_GIB) else 10**9
        return Device(text, card.arch, card.gigabytes * unit, card.gbs, card.source, False, CUDA_CONTEXT)
    if word == "cpu":
        return Device("cpu", "cpu", memory_available(), None, "what this machine has free", True, PROCESS)
    if re.fullmatch(r"cuda(:\d+)?", word):
        return _gpu(word)
    raise ArgumentError(
        f"a device is cpu, cuda:0, an amount of GPU memory such as 24GiB, or one of {', '.join(CARDS)}; got {text!r:.40}"
    )


def _gpu(word: str) -> Device:
    index = int(word.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ArgumentError(
            f"this torch sees {count or 'no'} GPU{'s' * (count > 1)}, got {word}; to plan for a card that is elsewhere, name it "
            f"(rtx4090, h200, …) or its memory (24GiB)"
        )
    free, _ = torch.cuda.mem_get_info(index)  # makes the context, which `free` then lacks
    name = torch.cuda.get_device_name(index)
    known = next((card.gbs for key, card in CARDS.items() if key in name.lower().replace(" ", "")), None)
    return Device(word, arch_of(word), free, known, f"{name}: what is free now", True, 0)


def with_bandwidth(device: Device, bench: str | None) -> Device:
    """The device with the rate at which this machine reads memory: that of a result of `qkernels bench --json`; else, of a CPU,
    measured now (a tenth of a second). Cards that are elsewhere keep their sheet's.

    Raises:
        ArgumentError: the file is no such result, or of another kind of device.
    """
    if bench is not None:
        if not device.here:
            raise ArgumentError(f"a benchmark of this machine says nothing about {device.name}; leave --bench out")
        return replace(device, gbs=_read_rate(bench, device), source=f"{device.source}; bandwidth: {bench}")
    if device.is_cpu and device.here:
        return replace(device, gbs=_probe(), source=f"{device.source}; bandwidth measured now")
    return device


def _read_rate(bench: str, device: Device) -> float:
    try:
        result: Any = json.loads(Path(bench).read_text(encoding="utf-8"))
        rate, where = result["conditions"]["roofs"]["read_gbs"], result["conditions"]["environment"]["device"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{bench} is no result of qkernels bench --json: {error!r}") from error
    if not isinstance(rate, (int, float)) or not 0 < rate < 1e6 or str(where).startswith("cpu") != device.is_cpu:
        raise ArgumentError(f"{bench} has a read rate of {rate!r:.40} GB/s on {where!r:.40}, planned is {device.name}")
    return float(rate)


def _probe() -> float:
    """GB/s of the best of five sums over 256 MiB."""
    values = torch.ones(2**26, dtype=torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best / 1e9
