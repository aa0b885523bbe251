"""`qkernels generate`: continue a prompt, to see with one's own eyes that a checkpoint still speaks."""

from __future__ import annotations

import argparse
import sys
import time

from ..errors import ArgumentError
from .common import (
    Subparsers,
    add_activations,
    add_device,
    add_dtype,
    add_on_unsupported,
    command_parser,
    dtype_of,
    positive,
    seed,
    temperature,
    warn_of_threads,
)

NAME, SUMMARY = "generate", "continue a prompt with a checkpoint"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        '  qkernels generate out/ --prompt "It was a dark night"\n'
        '  qkernels generate out/ --prompt "It was" --tokens 100 --temperature 0.8 --seed 1\n'
        '  qkernels generate model-Q4_K_M.gguf --prompt "It was"',
    )
    parser.add_argument("checkpoint", help="a checkpoint directory or GGUF file, quantized or not")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--tokens", type=positive, default=60, help="how many tokens to add (default: 60)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default: 0)")
    add_device(parser)
    add_dtype(parser)
    add_activations(parser)
    add_on_unsupported(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    import torch

    from ..checkpoint import load
    from ..texts import load_tokenizer

    tokenizer = load_tokenizer(args.checkpoint)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(args.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ArgumentError(f"--prompt must have at least one token, got {args.prompt!r}")
    dtype = dtype_of(args)
    model = load(
        args.checkpoint, device=args.device, dtype=dtype, on_unsupported=args.on_unsupported,
        activations=args.activations,
    )  # fmt: skip
    warn_of_threads(args.device)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=args.tokens, pad_token_id=tokenizer.eos_token_id or 0, **sampling
        )
    seconds = time.perf_counter() - start
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    made = output.shape[1] - inputs["input_ids"].shape[1]
    print(f"{made} tokens in {seconds:.2f} s, {made / seconds:.1f} tokens/s", file=sys.stderr)
    return 0
