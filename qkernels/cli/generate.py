"""`qkernels generate`: continue prompts, to see with one's own eyes that a checkpoint still speaks."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal

from ..errors import ArgumentError
from .common import (
    Subparsers,
    add_activations,
    add_dtype,
    add_on_unsupported,
    add_revision,
    command_parser,
    device,
    dtype_of,
    local,
    positive,
    read_text,
    seed,
    share,
    some_text,
    temperature,
    unsigned,
    warn_of_threads,
)

NAME, SUMMARY = "generate", "continue prompts with a checkpoint"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        '  qkernels generate out/ --prompt "It was a dark night"\n'
        '  qkernels generate out/ --prompt "It was" --tokens 100 --temperature 0.8 --top-p 0.95 --seed 1\n'
        '  qkernels generate out/ --chat --system "Be brief." --prompt "Why is the sky blue?"\n'
        '  qkernels generate model-Q4_K_M.gguf --prompt "It was" --stop "."\n'
        '  qkernels generate out/ --prompt "It was" --prompt "Once upon"      # a batch\n'
        "  qkernels generate out/ --file letter.txt\n"
        "  cat letter.txt | qkernels generate out/\n"
        '  qkernels generate Qwen/Qwen3-0.6B --chat --prompt "Hello" --device auto',
        "Continue prompts. One is streamed as it comes; several are a batch, printed when it is done.",
    )
    parser.add_argument("checkpoint", help="a checkpoint directory, GGUF file or Hub id, quantized or not")
    parser.add_argument("--prompt", action="append", default=[], help="the text to continue; may be repeated")
    parser.add_argument(
        "--file", action="append", default=[], metavar="FILE", help="a prompt from a file; may be repeated"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put each prompt into the model's chat template, as the user's"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the system says first, in a chat")
    parser.add_argument(
        "--tokens", "--max-new-tokens", type=positive, default=60, help="how many tokens to add, at most (default: 60)"
    )
    parser.add_argument(
        "--stop",
        action="append",
        type=some_text,
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top-p", type=share, help="sample from the likeliest tokens that make up this share")
    parser.add_argument("--top-k", type=positive, help="sample from so many likeliest tokens")
    parser.add_argument("--min-p", type=share, help="sample from tokens of at least this share of the likeliest one's")
    parser.add_argument(
        "--repetition-penalty", type=temperature, help="above 1: tokens that were there become less likely"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile first; pays off after some thousand tokens"
    )
    parser.add_argument(
        "--device",
        type=lambda text: text if text == "auto" else device(text),
        default="cpu",
        help="cpu, cuda:0, or auto: GPUs are filled with layers, the rest stays on the CPU (default: cpu)",
    )
    parser.add_argument(
        "--gpu-layers",
        type=unsigned,
        metavar="N",
        help="so many layers on the first GPU, the others on the CPU; 0: all of the model on the CPU",
    )
    add_dtype(parser)
    add_activations(parser)
    add_on_unsupported(parser)
    add_revision(parser)
    return parser


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Those of --prompt and --file, in that order; without any, what comes by standard input.

    Raises:
        ArgumentError: there is none, or a file is no text.
    """
    found = [*args.prompt, *(read_text(path).removesuffix("\n") for path in args.file)]
    if found:
        return found
    if sys.stdin is None or sys.stdin.isatty():
        raise ArgumentError("there is no prompt: give --prompt, --file, or a text by standard input")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input must be UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ArgumentError("standard input is empty: give --prompt, --file, or some text")
    return [text.removesuffix("\n")]


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `model.generate` is told.

    Raises:
        ArgumentError: an option of sampling without a temperature.
    """
    given = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if chosen and args.temperature == 0:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise ArgumentError(
            f"{named} chooses what to sample from, and at temperature 0 nothing is sampled: add --temperature"
        )
    penalty = {} if args.repetition_penalty is None else {"repetition_penalty": args.repetition_penalty}
    if args.repetition_penalty == 0:
        raise ArgumentError("--repetition-penalty must be above 0, got 0")
    if args.temperature == 0:
        return {"do_sample": False, **penalty}
    return {"do_sample": True, "temperature": args.temperature, **chosen, **penalty}


def run(args: argparse.Namespace) -> int:
    import torch

    from ..checkpoint import load
    from ..generating import answer, prompt_ids, with_room
    from ..texts import load_tokenizer

    prompts, sampling = prompts_of(args), sampling_of(args)
    if args.gpu_layers is not None and args.device not in ("auto", torch.device("cpu")):
        raise ArgumentError(
            f"--gpu-layers splits a model between the first GPU and the CPU: leave out --device {args.device}"
        )
    split: int | Literal["auto"] | None = args.gpu_layers
    if split is None and args.device == "auto":
        split = "auto"
    path = local(args, args.checkpoint)
    tokenizer = load_tokenizer(path)
    ids = prompt_ids(tokenizer, prompts, args.chat, args.system)
    where = torch.device("cpu") if split is not None else args.device
    model = load(path, where, dtype_of(args), args.on_unsupported, args.activations, device_map=split)
    tokens = with_room(model, ids, args.tokens)
    warn_of_threads(model.device)
    if args.compile:
        model.forward = torch.compile(model.forward, dynamic=True)
    torch.manual_seed(args.seed)
    if len(prompts) > 1:
        answers = answer(model, tokenizer, ids, tokens, args.stop, **sampling)
        for number, (prompt, text) in enumerate(zip(prompts, answers.texts, strict=True), 1):
            print(f"--- {number} of {len(prompts)}")
            print(text if args.chat else prompt + text)
    else:
        if not args.chat:
            print(prompts[0], end="", flush=True)
        answers = answer(
            model, tokenizer, ids, tokens, args.stop, emit=lambda text: print(text, end="", flush=True), **sampling
        )
        print()
    print(answers.rates(), file=sys.stderr)
    return 0
