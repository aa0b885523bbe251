"""KL divergence of whole GGUF files in llama.cpp's mixes from the float model: llama.cpp's files beside ours.

    qkernels quantize MODEL whole.gguf --type BF16
    llama-imatrix -m whole.gguf -f MODEL/calibration.txt -o theirs/imatrix.gguf -c 256 --chunks 64
    llama-quantize whole.gguf theirs/Q4_K_M.gguf Q4_K_M                                                 (each mix)
    llama-quantize --imatrix theirs/imatrix.gguf whole.gguf theirs/Q4_K_M-imatrix.gguf Q4_K_M
    python -m benchmarks.quality.gguf_mixes MODEL --theirs theirs [--mixes Q4_K_M …] [--out gguf-mixes.json]

Every file is read by this package's reader and dequantized, and the model runs in fp32 over the beginning of eval.txt. Embedding
and head have the same types in all files of a mix (asserted, as are the types of every other tensor). Ours are calibrated on the
same number of tokens of the same text. Without --theirs there are no rows of llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qkernels import evaluate
from qkernels.calibrate_gguf import quantize_gguf
from qkernels.checkpoint import load, to_gguf
from qkernels.cli.common import read_text
from qkernels.formats.gguf import read_importance
from qkernels.nn import QuantLinear
from qkernels.nn.modules import set_module
from qkernels.sizing import importance_of
from qkernels.storage.gguf import GgufSource
from qkernels.text import table
from qkernels.texts import load_tokenizer, token_ids

from ..method import envelope, environment

KIND = "gguf-mixes"
MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K")
BASE = "llama.cpp, imatrix"  # what ratios are taken to


def dequantized(path: Path) -> Any:
    """The model of a file with plain linear layers in fp32; rows of a packed embedding are decoded in fp32 as it is."""
    model = load(path, dtype=torch.float32)
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if isinstance(module, QuantLinear) and not name.endswith(".table"):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.dequantize(torch.float32)
            plain.register_parameter("bias", module.bias)
            set_module(model, name, plain)
    return model


def types_of(path: Path) -> dict[str, str]:
    return {name: entry.type.name for name, entry in GgufSource.open(path).entries.items()}


def ways(
    model: Path, theirs: Path | None, mix: str, calibration: dict[str, Any], importance: Any
) -> dict[str, Callable[[Path], Path]]:
    """What makes a file of a mix, by name; each is given a path that it may write."""

    def searched(path: Path, **options: Any) -> Path:
        to_gguf(model, path, mix, **options)
        return path

    def calibrated(path: Path, method: Any) -> Path:
        quantize_gguf(model, path, mix, method=method, **calibration, progress=False)
        return path

    found: dict[str, Callable[[Path], Path]] = {}
    if theirs is not None:
        found["llama.cpp, plain"] = lambda path: theirs / f"{mix}.gguf"
        found[BASE] = lambda path: theirs / f"{mix}-imatrix.gguf"
        own = read_importance(theirs / "imatrix.gguf")
        found["plain, llama.cpp's imatrix"] = lambda path: searched(path, importance=own)
    return found | {
        "plain": searched,
        "best": lambda path: searched(path, search="best"),
        "plain, importance": lambda path: searched(path, importance=importance),
        "best, importance": lambda path: searched(path, importance=importance, search="best"),
        "AWQ": lambda path: calibrated(path, "awq"),
        "GPTQ": lambda path: calibrated(path, "gptq"),
        "AWQ, GPTQ": lambda path: calibrated(path, "awq+gptq"),
    }


def measure(
    path: Path, theirs: Path | None, mixes: Sequence[str], samples: int, seq_len: int, tokens: int
) -> list[dict[str, Any]]:
    ids = token_ids(load_tokenizer(path), read_text(str(path / "eval.txt")))[:tokens]
    original = load(path, dtype=torch.float32)
    calibration: dict[str, Any] = {
        "calibration": [read_text(str(path / "calibration.txt"))],
        "samples": samples,
        "seq_len": seq_len,
    }
    importance, rows = importance_of(path, **calibration), []
    for mix in mixes:
        expected: dict[bool, dict[str, str]] = {}
        for way, make in ways(path, theirs, mix, calibration, importance).items():
            with tempfile.TemporaryDirectory() as directory:
                began = time.perf_counter()
                file = make(Path(directory) / "m.gguf")
                seconds = time.perf_counter() - began
                knows = way not in ("llama.cpp, plain", "plain", "best")  # some rules ask for an importance
                types = types_of(file)
                assert expected.setdefault(knows, types) == types, f"{mix}, {way}: other types"
                found = evaluate.compare(dequantized(file), original, ids, seq_len, progress=False)
                nbytes = file.stat().st_size
            ours = None if way.startswith("llama.cpp") else seconds
            rows.append(
                {"mix": mix, "way": way, "kl": found.kl, "top1": found.top1_agreement, "bytes": nbytes, "seconds": ours}
            )
            print(mix, way, f"{found.kl:.3e}", file=sys.stderr, flush=True)
    return rows


def printed(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each way; KL and its ratio to llama.cpp's with an imatrix, for each mix."""
    mixes, names = (list(dict.fromkeys(row[field] for row in rows)) for field in ("mix", "way"))
    by = {(row["mix"], row["way"]): row["kl"] for row in rows}

    def cell(mix: str, way: str) -> str:
        base = by.get((mix, BASE))
        return f"{by[mix, way]:.3e}" + (f" ({by[mix, way] / base:.2f})" if base else "")

    return table(["way", *mixes], [[way, *(cell(mix, way) for mix in mixes)] for way in names])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.gguf_mixes", description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with eval.txt and calibration.txt beside the model")
    parser.add_argument("--theirs", type=Path, metavar="DIRECTORY", help="files of llama-quantize and llama-imatrix")
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=6144, help="of eval.txt, from its beginning")
    parser.add_argument("--out", type=Path, help="the rows as JSON, and the table beside them")
    args = parser.parse_args(argv)
    where = environment.describe(torch.device("cpu"))
    rows = measure(args.model, args.theirs, args.mixes, args.samples, args.seq_len, args.tokens)
    text = printed(rows)
    if args.out:
        conditions = {
            "model": args.model.resolve().name,
            "calibration_tokens": args.samples * args.seq_len,
            "tokens": args.tokens,
        }
        envelope.write_with_table(envelope.sealed(KIND, where, rows, conditions), args.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
