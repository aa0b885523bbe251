"""Seconds to quantize a whole model to Q4_K_M: ours beside llama-quantize, the same file in, files compared.

    python -m benchmarks.models.gguf_quantizing --folder DIR --make [--size 1b]          a random model in BF16, a GGUF file
    python -m benchmarks.models.gguf_quantizing --folder DIR --llama-quantize PROGRAM [--threads 2] [--rounds 1]

Both read DIR/whole.gguf and write a file beside it. Every tensor has to be the same, bit for bit, before a time is told. Ours
checks its header with transformers' tokenizer and config before the work, theirs does not; both are whole runs, ours within a
process that has imported torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qkernels.checkpoint import to_gguf
from qkernels.models.building import empty_model
from qkernels.storage import CONFIG, ShardWriter, copy_side_files, write_json
from qkernels.storage.gguf import GgufSource
from qkernels.text import table

from ..method import envelope, environment
from .llama import SIZES

KIND = "gguf-quantizing"
MIX = "Q4_K_M"
DEMO = Path(__file__).parents[2] / "examples" / "demo_model"  # its tokenizer: a smaller vocabulary is filled up
VOCABULARY = 32000


def make(folder: Path, size: str) -> None:
    """A Llama with random weights, a tensor in memory at a time."""
    from transformers import LlamaConfig

    g = dataclasses.replace(SIZES[size], vocabulary=VOCABULARY)
    config = LlamaConfig(
        vocab_size=g.vocabulary, hidden_size=g.hidden, intermediate_size=g.intermediate, num_hidden_layers=g.layers,
        num_attention_heads=g.heads, num_key_value_heads=g.kv_heads, head_dim=g.head_dim, max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    source = folder / "source"
    source.mkdir(parents=True)
    settings = config.to_dict()
    copy_side_files(DEMO, source)
    write_json(source / CONFIG, settings)
    writer = ShardWriter(source, 2 * 10**9)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in empty_model(settings, torch.bfloat16, source).named_parameters():
        matrix = parameter.dim() == 2
        values = torch.randn(parameter.shape, generator=generator) * 0.02 if matrix else torch.ones(parameter.shape)
        writer.add(name, values.bfloat16())
    writer.close()
    to_gguf(source, folder / "whole.gguf", "BF16")


def differing(a: Path, b: Path) -> tuple[int, int]:
    """Tensors that differ in type or bytes, and how many there are."""
    first, second = GgufSource.open(a), GgufSource.open(b)
    names = first.entries.keys() | second.entries.keys()
    unlike = 0
    for name in names:
        same = name in first.entries and name in second.entries and first.entry(name).type == second.entry(name).type
        unlike += not (same and torch.equal(first.blocks(name), second.blocks(name)))
    return unlike, len(names)


def measure(folder: Path, program: Sequence[str], threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each, ours first.

    Raises:
        RuntimeError: the files differ.
    """
    source, ours, theirs = (folder / name for name in ("whole.gguf", "ours.gguf", "theirs.gguf"))
    torch.set_num_threads(threads)
    command = [*program, str(source), str(theirs), MIX, str(threads)]
    runs: dict[str, Callable[[], object]] = {
        "qkernels, plain": lambda: to_gguf(source, ours, MIX, overwrite=True),
        "llama-quantize": lambda: subprocess.run(command, check=True, capture_output=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    unlike, count = differing(ours, theirs)
    if unlike:
        raise RuntimeError(f"no match, no number: {unlike} of {count} tensors differ")
    base = min(seconds["llama-quantize"])
    return [
        {"candidate": name, "seconds": min(taken), "every": taken, "ratio": base / min(taken), "tensors": count}
        for name, taken in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.gguf_quantizing", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--llama-quantize", nargs="+", metavar="PROGRAM", help="the program, with what goes before it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the rows as JSON, and the table beside them")
    args = parser.parse_args(argv)
    if args.make:
        make(args.folder, args.size)
        return 0
    if not args.llama_quantize:
        parser.error("name the program to compare with: --llama-quantize PROGRAM")
    where = environment.describe(torch.device("cpu"))
    rows = measure(args.folder, args.llama_quantize, args.threads, args.rounds)
    cells = [[row["candidate"], f"{row['seconds']:.1f}", f"{row['ratio']:.2f}"] for row in rows]
    text = table([MIX, "seconds", "llama-quantize's time over it"], cells)
    if args.out:
        conditions = {
            "threads": args.threads,
            "size": args.size,
            "vocabulary": VOCABULARY,
            "bytes": (args.folder / "whole.gguf").stat().st_size,
        }
        envelope.write_with_table(envelope.sealed(KIND, where, rows, conditions), args.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
