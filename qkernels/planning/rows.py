"""The rows of a plan: a model in one form on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..reports import readable_size

Verdict = Literal["fits", "tight", "short", "no kernel"]
HEADER = ("scheme", "by", "bits", "file", "weights", "KV", "total", "", "longest", "tokens/s", "KL", "kernel", "also")


@dataclass(frozen=True)
class PlanRow:
    """A model in one form on one device. Bytes; `tokens_per_s` is (least, most), the same twice for what is only a ceiling.

    Args:
        scheme: "as it is" or a scheme.
        bits: stored a weight, of the quantized matrices; None where nothing is quantized.
        layers_on: of the first device, where the rest of them goes to the second; None: all.
        short: bytes that are missing.
        longest: tokens of context that fit.
        kl: measured on the bundled model, None where it was not.
        kernels: how many matrices each runs.
        reasons: why no kernel takes some of them.
        engines: who serves the file besides us.
        command: what makes it, or runs it.
    """

    scheme: str
    method: str
    bits: float | None
    file: int
    weights: int
    cache: int
    activations: int
    total: int
    verdict: Verdict
    short: int
    longest: int
    tokens_per_s: tuple[float, float] | None
    kl: float | None
    kernels: dict[str, int]
    reasons: tuple[str, ...]
    engines: tuple[str, ...]
    command: str
    layers_on: int | None = None

    @property
    def fits(self) -> bool:
        return self.verdict in ("fits", "tight")


def cells(row: PlanRow) -> list[str]:
    """What a table shows of it, under `HEADER`."""
    verdict = f"short by {readable_size(row.short)}" if row.verdict == "short" else str(row.verdict)
    if row.layers_on is not None and row.fits:
        verdict += f", {row.layers_on} layers on it"
    rate = "–" if row.tokens_per_s is None else _rate(row.tokens_per_s)
    kl = "–" if row.kl is None else "0" if row.kl == 0 else f"{row.kl:.1e}"
    kernels = ", ".join(row.kernels) or "–"
    return [
        row.scheme, row.method or "–", "–" if row.bits is None else f"{row.bits:.2f}", readable_size(row.file),
        readable_size(row.weights), readable_size(row.cache), readable_size(row.total), verdict, str(row.longest), rate, kl,
        kernels, ", ".join(row.engines) or "–",
    ]  # fmt: skip


def _rate(bounds: tuple[float, float]) -> str:
    least, most = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in bounds)
    return f"<= {most}" if least == most else f"{least} to {most}"
