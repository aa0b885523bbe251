"""Whole models: prefill and decode in tokens a second, time to first token, memory predicted and measured.

    python -m benchmarks.models.sweep --size 1b --modes eager compile
    python -m benchmarks.models.sweep --size 8b --device cuda:0 --modes eager compile graph

The model is Llama-shaped with random weights (`llama.py`), so any size can be built where it fits, without a download. Numbers on
CUDA are unmeasured so far. Rows go to a file as they come; rows of the same commit that are there already stay, so that variants
may be measured one process each. Decoding reads every weight once a token: its share of the memory's rate is taken beside it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels.scheme import QuantScheme
from qkernels.text import table as markdown_table

from ..kernels import roofs
from ..method import envelope, environment
from ..method.statistics import median_interval
from .llama import SIZES, Llama, predicted_memory

VARIANTS: dict[str, str | None] = {"bf16": None, "int8": "w8a16_g128", "int4": "w4a16_g128"}
MODES = ("eager", "compile", "graph")
KIND = "models"


@dataclass(frozen=True)
class ModelRow:
    """One variant in one mode. Times in seconds are medians; bytes are of this process (CPU) or of torch's allocator (CUDA).

    `first_token_s` is that of the prompt and the choice of its token; `read_percent` the median of the bytes that decoding reads
    (weights without the embedding table) in units of what the memory gave right before and after, in the same repeat.
    """

    size: str
    variant: str
    mode: str
    device: str
    prompt: int
    new_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    predicted_bytes: int
    weight_bytes: int
    peak_bytes: int | None
    read_percent: float | None = None
    date: str = ""


def measure(
    size: str, variant: str, mode: str, device: torch.device, prompt: int = 128, new_tokens: int = 32, repeats: int = 5
) -> ModelRow:
    """Build one model, run a prompt through it and decode."""
    g = SIZES[size]
    scheme = QuantScheme.parse(VARIANTS[variant]) if VARIANTS[variant] else None  # type: ignore[arg-type]
    # Pages of libraries and their one-time tables (about 20 MiB unquantized, 90 MiB with packing) belong to the process, not to
    # the model: a tiny one brings them in before the baseline is read.
    with torch.inference_mode():
        tiny = Llama(SIZES["tiny"], scheme, prompt, torch.bfloat16, device)
        tiny(torch.zeros(1, prompt, dtype=torch.long, device=device), torch.arange(prompt, device=device))
        del tiny
    memory = roofs.read_sampler(device, environment.cache_bytes(device))
    positions = prompt + new_tokens
    gc.collect()
    before = _reset_peak(device)
    predicted = predicted_memory(g, scheme, positions, prompt).total
    with torch.inference_mode():
        model = Llama(g, scheme, positions, torch.bfloat16, device)
        weight_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        read_bytes = weight_bytes - model.table.numel() * model.table.element_size()
        # Making random codes takes memory that serving does not: one byte a weight of the layer being made.
        before = _reset_peak(device, before)
        tokens = torch.randint(0, g.vocabulary, (1, prompt), device=device)
        places = torch.arange(positions, device=device)
        step = decode_step(model, mode, tokens[:, :1], places[prompt : prompt + 1])
        prefills, decodes, shares = [], [], []
        for _ in range(repeats):
            start = _now(device)
            last = model(tokens, places[:prompt]).argmax(-1, keepdim=True)
            prefills.append(_now(device) - start)
            rate = memory()
            start = _now(device)
            for i in range(prompt, positions):
                last = step(last, places[i : i + 1]).argmax(-1, keepdim=True)
            decodes.append((_now(device) - start) / new_tokens)
            shares.append(100 * read_bytes * (rate + memory()) / 2 / decodes[-1])
    peak = _peak(device)
    first = median_interval(prefills).median
    return ModelRow(
        size, variant, mode, str(device), prompt, new_tokens, prompt / first, 1 / median_interval(decodes).median, first,
        predicted, weight_bytes, None if peak is None or before is None else peak - before, median_interval(shares).median,
        environment.now(),
    )  # fmt: skip


def decode_step(model: Llama, mode: str, token: Tensor, at: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """One token's forward pass: as it is, compiled, or as a replayed CUDA graph."""
    if mode == "eager":
        return model
    if mode == "compile":
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(model, fullgraph=True, dynamic=False)
        compiled(token, at)
        return compiled
    fixed_token, fixed_at = token.clone(), at.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(fixed_token, fixed_at)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits: Tensor = model(fixed_token, fixed_at)

    def replay(token: Tensor, at: Tensor) -> Tensor:
        fixed_token.copy_(token)
        fixed_at.copy_(at)
        graph.replay()
        return logits

    return replay


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _status(field: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


def _reset_peak(device: torch.device, before: int | None = None) -> int | None:
    """Forget the highest memory use so far; returns the present one unless `before` is given."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return before if before is not None else torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    except OSError:
        return None
    return before if before is not None else _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def to_markdown(rows: Sequence[ModelRow]) -> str:
    header = [
        "model", "weights", "mode", "prefill tok/s", "decode tok/s", "% of memory read", "first token ms", "weights MiB",
        "predicted MiB", "peak MiB",
    ]  # fmt: skip
    mib = 1 / 2**20
    lines = [
        [
            r.size, r.variant, r.mode, f"{r.prefill_tokens_per_s:.1f}", f"{r.decode_tokens_per_s:.1f}",
            "–" if r.read_percent is None else f"{r.read_percent:.0f}", f"{r.first_token_s * 1e3:.0f}",
            f"{r.weight_bytes * mib:.0f}", f"{r.predicted_bytes * mib:.0f}",
            "–" if r.peak_bytes is None else f"{r.peak_bytes * mib:.0f}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header, lines)


def rows_of(path: Path, commit: str) -> list[ModelRow]:
    """Rows that an earlier process wrote there at the same commit."""
    return [ModelRow(**row) for row in envelope.rows_so_far(path, KIND, commit)]


def write(rows: Sequence[ModelRow], where: Mapping[str, Any], out: Path) -> None:
    """A result file at `out`, and a page of the same name for people."""
    envelope.write(envelope.sealed(KIND, where, [asdict(row) for row in rows]), out)
    quiet = where["quiet"]
    place = where.get("gpu", {}).get("name") or f"{where['cpu']}, {where['threads']} threads, {where['isa']}"
    lines = [
        to_markdown(rows),
        f"One sequence, {rows[0].prompt} tokens of prompt and {rows[0].new_tokens} more; memory is that beyond the"
        " process's before the model was built.",
        f"{place}; torch {where['torch']}, qkernels {where['commit']}, {where['date']}; "
        f"jitter {quiet['jitter']:.0%}, load {quiet['load']}{'' if quiet['quiet'] else ': not a quiet machine'}",
    ]
    out.with_suffix(".md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _key(row: ModelRow) -> tuple[Any, ...]:
    return (row.size, row.variant, row.mode, row.device, row.prompt, row.new_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.sweep", description="Time whole models of random weights."
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/models-SIZE.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type != "cuda" and "graph" in args.modes:
        parser.error("--modes graph needs a CUDA device")
    where = environment.describe(device)
    out = args.out or environment.RESULTS / where["machine"] / f"models-{args.size}.json"
    rows = rows_of(out, where["commit"])
    for variant in args.variants:
        for mode in args.modes:
            row = measure(args.size, variant, mode, device, args.prompt, args.new_tokens)
            rows = [r for r in rows if _key(r) != _key(row)] + [row]
            rows.sort(key=lambda r: (list(VARIANTS).index(r.variant), MODES.index(r.mode)))
            write(rows, where, out)
    print(to_markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
