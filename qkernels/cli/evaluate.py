"""`qkernels eval`: how much a checkpoint lost."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ..errors import ArgumentError
from .common import (
    Subparsers,
    add_activations,
    add_device,
    add_dtype,
    add_on_unsupported,
    add_revision,
    command_parser,
    dtype_of,
    local,
    positive,
    print_json,
    read_text,
)

NAME, SUMMARY = "eval", "perplexity, KL and answers beside those of the original"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels eval out/ --text held-out.txt\n"
        "  qkernels eval out/ --text held-out.txt --against my-llama/ --json\n"
        "  qkernels eval out/ --prompts prompts.txt --against my-llama/",
        "Perplexity of a checkpoint on a text: consecutive windows without overlap, mean over the next tokens of each "
        "window. With --against also the KL divergence per token from the original, which is far more sensitive. With --prompts "
        "the answers of both side by side, where they part, and what may be wrong.",
    )
    parser.add_argument("checkpoint", help="a checkpoint directory, GGUF file or Hub id, quantized or not")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text the model has not seen")
    parser.add_argument(
        "--prompts", metavar="FILE", help="UTF-8 text with a prompt on each line, to be answered by both"
    )
    parser.add_argument("--against", metavar="REFERENCE", help="the original checkpoint")
    parser.add_argument("--tokens", type=positive, default=60, help="of each answer, at most (default: 60)")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    parser.add_argument("--seq-len", type=positive, help="tokens in a window (default: 2048, capped to the model's)")
    add_device(parser)
    add_dtype(parser)
    add_activations(parser)
    add_on_unsupported(parser)
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import load
    from ..evaluate import compare, perplexity
    from ..generating import prompt_ids, side_by_side
    from ..texts import load_tokenizer, token_ids, window_length

    if args.text is None and args.prompts is None:
        raise ArgumentError("there is nothing to evaluate on: give --text FILE, --prompts FILE, or both")
    if args.prompts is not None and args.against is None:
        raise ArgumentError("--prompts compares answers with those of another model: add --against REFERENCE")
    dtype, path = dtype_of(args), local(args, args.checkpoint)
    tokenizer = load_tokenizer(path)
    ids = None if args.text is None else token_ids(tokenizer, read_text(args.text))
    lines = [line for line in read_text(args.prompts).splitlines() if line.strip()] if args.prompts is not None else []
    prompts = dict(zip(lines, prompt_ids(tokenizer, lines, args.chat), strict=True))
    model = load(
        path, device=args.device, dtype=dtype, on_unsupported=args.on_unsupported, activations=args.activations
    )
    original: Any = None
    if args.against:
        original = load(args.against, device=args.device, dtype=dtype, on_unsupported=args.on_unsupported)
    start = time.perf_counter()
    shown: list[str] = []
    values: dict[str, Any] = {}
    if ids is not None:
        seq_len = window_length(model, args.seq_len)
        results: list[Any] = [perplexity(model, ids, seq_len)]
        compared = [] if original is None else [compare(model, original, ids, seq_len)]
        for result in (*results, *compared):
            shown.append(str(result))
            values |= result.to_json()
        print(f"{len(ids)} tokens in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if prompts:
        found = side_by_side(model, original, tokenizer, prompts, args.tokens)
        shown.append(found.to_markdown())
        values["prompts"] = found.to_json()
    if args.json:
        print_json(values)
    else:
        print("\n".join(shown))
    return 0
