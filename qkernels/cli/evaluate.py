"""`qkernels eval`: how much a checkpoint lost."""

from __future__ import annotations

import argparse
import sys
import time

from .common import (
    Subparsers,
    add_activations,
    add_device,
    add_dtype,
    add_on_unsupported,
    command_parser,
    dtype_of,
    positive,
    print_json,
    read_text,
)

NAME, SUMMARY = "eval", "perplexity, and KL and top-1 agreement with the original"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels eval out/ --text held-out.txt\n  qkernels eval out/ --text held-out.txt --against my-llama/ --json",
        "Perplexity of a checkpoint on a text: consecutive windows without overlap, mean over the next tokens of each "
        "window. With --against also the KL divergence per token from the original, which is far more sensitive.",
    )
    parser.add_argument("checkpoint", help="a checkpoint directory or GGUF file, quantized or not")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text the model has not seen")
    parser.add_argument("--against", metavar="REFERENCE", help="the original checkpoint")
    parser.add_argument("--seq-len", type=positive, help="tokens in a window (default: 2048, capped to the model's)")
    add_device(parser)
    add_dtype(parser)
    add_activations(parser)
    add_on_unsupported(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import load
    from ..evaluate import Comparison, Perplexity, compare, perplexity
    from ..texts import load_tokenizer, token_ids, window_length

    dtype = dtype_of(args)
    ids = token_ids(load_tokenizer(args.checkpoint), read_text(args.text))
    model = load(
        args.checkpoint, device=args.device, dtype=dtype, on_unsupported=args.on_unsupported,
        activations=args.activations,
    )  # fmt: skip
    seq_len = window_length(model, args.seq_len)
    start = time.perf_counter()
    results: list[Perplexity | Comparison] = [perplexity(model, ids, seq_len)]
    if args.against:
        original = load(args.against, device=args.device, dtype=dtype, on_unsupported=args.on_unsupported)
        results.append(compare(model, original, ids, seq_len))
    print(f"{len(ids)} tokens in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if args.json:
        print_json({key: value for result in results for key, value in result.to_json().items()})
    else:
        print("\n".join(str(result) for result in results))
    return 0
