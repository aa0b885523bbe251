"""What a quantization run says about itself, before (`QuantPreview`) and after (`QuantReport`), and that report as
files beside a checkpoint: `quantize` writes them, `inspect` reads a line of them, `convert` hands them on."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from ._version import __version__
from .errors import CheckpointError
from .storage import read_json, write_json
from .storage.files import write_error
from .text import table

REPORT_JSON: Final = "qkernels_report.json"
REPORT_MARKDOWN: Final = "qkernels_report.md"
REWRITTEN: Final = "rewritten"

MIB: Final = 1 / 2**20  # times bytes
NOT_EVALUATED = "not evaluated: no evaluation text was given (--eval-text, evaluation=)"


@dataclass(frozen=True)
class ModuleReport:
    """One quantized linear layer.

    `error` is relative: of the layer's output over the calibration tokens where `error_of` is "output" (root of the squared
    error over the squared output), of the weight itself where it is "weight". `unscaled` says why its inputs are not scaled where
    the method scales them (AWQ, SmoothQuant), `few` which experts got few tokens and are calibrated with all.
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
    unscaled: str | None = None
    few: str | None = None


@dataclass(frozen=True)
class QuantReport:
    """The outcome of `quantize`. Every linear layer is in `modules`, or in `skipped` with the reason.

    Bytes are those of the whole model's tensors; after quantization with codes at their true width.

    Args:
        options: the method with all its options.
        perplexity, comparison: what `evaluate.perplexity` and `evaluate.compare` (with the original) say, as JSON types with
            their protocol; None without an evaluation text.
        versions: of the software, and the device.

    >>> import torch
    >>> from qkernels import RTN, quantize
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    >>> report = quantize(model, RTN(bits=4, group_size=32), progress=False)  # a QuantReport
    >>> [(module.name, module.scheme, round(module.error, 1)) for module in report.modules]
    [('0', 'w4a16_g32', 0.1)]
    >>> report.fallbacks
    {}
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
    options: str = ""
    perplexity: Mapping[str, Any] | None = None
    comparison: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def fallbacks(self) -> dict[str, str]:
        """Modules that were rounded to nearest although another method was asked for, and why."""
        return {module.name: module.fallback for module in self.modules if module.fallback is not None}

    @property
    def unscaled(self) -> dict[str, str]:
        """Modules whose inputs were not scaled although the method scales them, and why."""
        return {module.name: module.unscaled for module in self.modules if module.unscaled is not None}

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {**asdict(self), "modules": [asdict(module) for module in self.modules]}

    def to_markdown(self) -> str:
        """A summary line, then a table with a row per module."""
        lines = [self.summary(), "", table(["module", "scheme", "method", "error", "of", "seconds"], self._rows())]
        lines += [f"- {name} was rounded to nearest: {reason}" for name, reason in self.fallbacks.items()]
        lines += [f"- {module.name}: {module.few}" for module in self.modules if module.few is not None]
        alike = Counter((re.sub(r"\.\d+\.", ".*.", name), reason) for name, reason in self.unscaled.items())
        lines += [f"- {name} ({count}): its inputs are not scaled: {reason}" for (name, reason), count in alike.items()]
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

    def quality(self) -> str:
        """One line: the mean error, and how the model does on the evaluation text."""
        errors = [module.error for module in self.modules]
        lost = f"mean layer error {sum(errors) / len(errors):.2%}, largest {max(errors):.2%}"
        if self.perplexity is None or self.comparison is None:
            return f"{lost}; {NOT_EVALUATED}"
        return (
            f"{lost}; perplexity {self.perplexity['perplexity']:.4f} "
            f"(original {self.comparison['reference_perplexity']:.4f}), KL {self.comparison['kl']:.3e} nats per token, "
            f"top-1 agreement {self.comparison['top1_agreement']:.2%}"
        )

    def _rows(self) -> list[list[str]]:
        return [[m.name, m.scheme, m.method, f"{m.error:.2%}", m.error_of, f"{m.seconds:.2f}"] for m in self.modules]


def write_report(directory: Path, report: QuantReport) -> None:
    """The report beside a checkpoint, as JSON and as Markdown."""
    line = f"{report.method} {report.scheme}: {report.quality()}"
    write_json(directory / REPORT_JSON, {"quality": line, **report.to_json()})
    protocol = [] if report.perplexity is None else [f"- protocol: {report.perplexity['protocol']}"]
    text = [
        "# How this checkpoint was quantized",
        "",
        f"- {report.quality()}",
        *protocol,
        f"- method: `{report.options}`",
        f"- versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        "",
        report.to_markdown(),
        "",
    ]
    (directory / REPORT_MARKDOWN).write_text("\n".join(text), encoding="utf-8")


def quality_line(directory: Path) -> str | None:
    """The line of quality in a checkpoint's report; None where there is no report.

    Raises:
        CheckpointError: there is one that cannot be read, or it has no such line.
    """
    path = directory / REPORT_JSON
    if not path.is_file():
        return None
    line = read_json(path).get("quality")
    if not isinstance(line, str) or not line.isprintable() or len(line) > 500:
        raise CheckpointError(
            f"{path} needs quality to be one line of text, got {line!r:.60}; remove the file if it is not yours"
        )
    return line


def carry_report(source: Path, target: Path, format: str) -> None:
    """Copy the report of a checkpoint that was rewritten in `format`, and say so in it: with the weights, what it says of their
    quality stays true. Without a report there is nothing to do.

    Raises:
        CheckpointError: there is a report that cannot be read or written.
    """
    path = source / REPORT_JSON
    if not path.is_file():
        return
    report = read_json(path)
    steps = report.get(REWRITTEN, [])
    if not isinstance(steps, list):
        raise CheckpointError(
            f"{path} needs {REWRITTEN} to be a list, got {steps!r:.60}; remove the file if it is not yours"
        )
    steps = [*steps, {"format": format, "qkernels": __version__}]
    try:
        write_json(target / REPORT_JSON, report | {REWRITTEN: steps})
        if (source / REPORT_MARKDOWN).is_file():
            shutil.copyfile(source / REPORT_MARKDOWN, target / REPORT_MARKDOWN)
            with (target / REPORT_MARKDOWN).open("a", encoding="utf-8") as file:
                file.write(
                    f"- rewritten as {format} by qkernels {__version__}; the weights are the same, bit for bit\n"
                )
    except OSError as error:
        raise write_error(error, target) from error


@dataclass(frozen=True)
class ModulePreview:
    """One linear layer that would be quantized."""

    name: str
    shape: tuple[int, int]
    scheme: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantPreview:
    """What `quantize` would do with a checkpoint, and what it needs.

    Args:
        host_bytes: activations of the calibration windows (on the host).
        device_bytes: the largest decoder layer in fp32, the statistics of its widest input, and what is held of all calibration
            tokens between its steps, up to 2 GiB (on the compute device).
        disk_bytes: the most that is on the disk at a time, besides the source.
        scales: for methods that scale inputs, what is known of where the scales go; None for others.
        moments_bytes: of `device_bytes`, the second moments of inputs (Hessians) and their factors: of one expert at a time, and
            of all tokens.
    """

    method: str
    modules: tuple[ModulePreview, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    scales: str | None = None
    moments_bytes: int = 0

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
                f"- disk: {self.disk_bytes * MIB:.1f} MiB while it is made: the result, finished layers beside it, activations",
                f"- memory: {self.device_bytes * MIB:.1f} MiB to compute a layer"
                + (f" ({self.moments_bytes * MIB:.1f} of them for Hessians)" if self.moments_bytes else "")
                + f", {self.host_bytes * MIB:.1f} MiB for activations",
                *([f"- scales: {self.scales}"] if self.scales is not None else []),
                "",
                table(["module", "N x K", "scheme", "MiB before", "MiB after"], rows),
                *(f"- {name} is skipped: {reason}" for name, reason in self.skipped.items()),
            ]
        )


def readable_size(nbytes: int) -> str:
    """Bytes in the largest unit of which there is one at least: "1.50 MiB"."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 2**shift:
            return f"{nbytes / 2**shift:.2f} {unit}"
    return f"{nbytes} B"
