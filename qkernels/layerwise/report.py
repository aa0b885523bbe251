"""What a quantization run says about itself, before (`QuantPlan`) and after (`QuantReport`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..markdown import table

MIB = 1 / 2**20


@dataclass(frozen=True)
class ModuleReport:
    """One quantized linear layer.

    `error` is relative: of the layer's output over the calibration tokens where `error_of` is "output" (root of the squared
    error over the squared output), of the weight itself where it is "weight".
    """

    name: str
    scheme: str
    method: str
    error: float
    error_of: str
    seconds: float
    bytes_before: int
    bytes_after: int
    fallback: str | None = None


@dataclass(frozen=True)
class QuantReport:
    """The outcome of `quantize`. Every linear layer is in `modules`, or in `skipped` with the reason.

    Bytes are those of the whole model's tensors; after quantization with codes at their true width.
    """

    method: str
    scheme: str
    modules: tuple[ModuleReport, ...]
    skipped: Mapping[str, str]
    calibration_windows: int
    seq_len: int
    bytes_before: int
    bytes_after: int
    seconds: float

    @property
    def fallbacks(self) -> dict[str, str]:
        """Modules that were rounded to nearest although another method was asked for, and why."""
        return {module.name: module.fallback for module in self.modules if module.fallback is not None}

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {**asdict(self), "modules": [asdict(module) for module in self.modules], "skipped": dict(self.skipped)}

    def to_markdown(self) -> str:
        """A summary line, then a table with a row per module."""
        lines = [self.summary(), "", table(["module", "scheme", "method", "error", "of", "seconds"], self._rows())]
        lines += [f"- {name} was rounded to nearest: {reason}" for name, reason in self.fallbacks.items()]
        lines += [f"- {name} was skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def summary(self) -> str:
        """One line."""
        calibrated = f" on {self.calibration_windows} x {self.seq_len} tokens" if self.calibration_windows else ""
        return (
            f"{self.method} {self.scheme}: {len(self.modules)} layers quantized{calibrated} in {self.seconds:.1f} s, "
            f"{len(self.fallbacks)} fell back, {len(self.skipped)} skipped; "
            f"{self.bytes_before * MIB:.1f} -> {self.bytes_after * MIB:.1f} MiB"
        )

    def _rows(self) -> list[list[str]]:
        return [[m.name, m.scheme, m.method, f"{m.error:.2%}", m.error_of, f"{m.seconds:.2f}"] for m in self.modules]


@dataclass(frozen=True)
class PlannedModule:
    """One linear layer that would be quantized."""

    name: str
    shape: tuple[int, int]
    scheme: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantPlan:
    """What `quantize` would do with a checkpoint, and what it needs.

    Args:
        host_bytes: activations of the calibration windows (on the host).
        device_bytes: the largest decoder layer in fp32 and the statistics of its widest input (on the compute device).
    """

    method: str
    modules: tuple[PlannedModule, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    host_bytes: int
    device_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {**asdict(self), "modules": [asdict(module) for module in self.modules], "skipped": dict(self.skipped)}

    def to_markdown(self) -> str:
        """Sizes, then a table with a row per module."""
        rows = [
            [
                m.name,
                f"{m.shape[0]} x {m.shape[1]}",
                m.scheme,
                f"{m.bytes_before * MIB:.2f}",
                f"{m.bytes_after * MIB:.2f}",
            ]
            for m in self.modules
        ]
        return "\n".join(
            [
                f"{self.method} would quantize {len(self.modules)} linear layers and leave {len(self.skipped)}",
                f"- checkpoint: {self.bytes_before * MIB:.1f} -> {self.bytes_after * MIB:.1f} MiB on disk",
                f"- memory: {self.device_bytes * MIB:.1f} MiB to compute a layer, "
                f"{self.host_bytes * MIB:.1f} MiB for activations",
                "",
                table(["module", "N x K", "scheme", "MiB before", "MiB after"], rows),
                *(f"- {name} is skipped: {reason}" for name, reason in self.skipped.items()),
            ]
        )
