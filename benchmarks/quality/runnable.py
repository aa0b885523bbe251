"""The table method x bits -> perplexity, KL, bytes, quantization time, for any checkpoint directory, run by our kernels.

python -m benchmarks.quality.runnable MODEL --text held-out.txt --calibration text.txt [--out quality.json]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qkernels import evaluate
from qkernels.calibrate import quantize
from qkernels.checkpoint import load
from qkernels.cli.common import read_text
from qkernels.quantizers import QUANTIZERS
from qkernels.text import table as markdown_table
from qkernels.texts import load_tokenizer, token_ids, window_length

from ..method import envelope, environment

KIND = "quality"


def measure(
    model: Path, text: str, calibration: str, methods: Sequence[str], bits: Sequence[int], seq_len: int, samples: int,
    out: Path | None, device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a method and width, the original first; `out` gets the rows as they come, in a result file."""
    where = environment.describe(device)
    tokenizer = load_tokenizer(model)
    ids = token_ids(tokenizer, text)
    original = load(model, device=device)
    length = window_length(original, seq_len)
    base = evaluate.perplexity(original, ids, length)
    conditions = {"model": model.resolve().name, "tokens": len(ids), "seq_len": length, "calibration_windows": samples}
    rows = [_row("original", "16 bit", _nbytes(original), base.perplexity, 0.0, 0.0)]
    for method in methods:
        for width in bits:
            quantizer = QUANTIZERS[method](bits=width)
            with TemporaryDirectory() as directory:
                target = Path(directory) / "out"
                start = time.perf_counter()
                texts = None if quantizer.needs == "weight" else [calibration]
                quantize(
                    model, quantizer, calibration=texts, tokenizer=tokenizer if texts else None, save_to=target, samples=samples,
                    seq_len=length, device=device, progress=False,
                )  # fmt: skip
                seconds = time.perf_counter() - start
                small = load(target, device=device)
            kl = evaluate.compare(small, original, ids, length).kl
            perplexity = evaluate.perplexity(small, ids, length).perplexity
            rows.append(_row(method, f"{width} bit", _nbytes(small), perplexity, kl, seconds))
            if out:
                envelope.write(envelope.sealed(KIND, where, rows, conditions), out)
    return rows


def _row(method: str, label: str, nbytes: int, perplexity: float, kl: float, seconds: float) -> dict[str, Any]:
    return {"method": method, "label": label, "bytes": nbytes, "perplexity": perplexity, "kl": kl, "seconds": seconds}


def _nbytes(model: Any) -> int:
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(seen.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.runnable", description="Method x bits for a checkpoint."
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, help="held-out UTF-8 text")
    parser.add_argument("--calibration", required=True, help="UTF-8 text for gptq and awq")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"], choices=QUANTIZERS)
    parser.add_argument("--bits", nargs="+", type=int, default=[3, 4, 8])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = measure(
        args.model, read_text(args.text), read_text(args.calibration), args.methods, args.bits, args.seq_len,
        args.samples, args.out, torch.device(args.device),
    )  # fmt: skip
    table = [
        [
            r["method"],
            r["label"],
            f"{r['bytes'] / 2**20:.1f}",
            f"{r['perplexity']:.4f}",
            f"{r['kl']:.3e}",
            f"{r['seconds']:.1f}",
        ]
        for r in rows
    ]
    print(markdown_table(["method", "weights", "MiB", "perplexity", "KL", "seconds"], table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
