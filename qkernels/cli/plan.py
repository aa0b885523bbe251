"""`qkernels plan`: will it fit, in which form, and what to take."""

from __future__ import annotations

import argparse

from .common import Subparsers, add_dtype, add_revision, command_parser, dtype_of, positive, unsigned

NAME, SUMMARY = "plan", "say whether a model fits, and in which form to take it"
SHORT = 3  # exit code where nothing fits


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels plan my-llama/\n"
        "  qkernels plan my-llama/ --device rtx4090 --context 32768\n"
        "  qkernels plan my-llama/config.json --device 24GiB --batch 8 --prefer speed\n"
        "  qkernels plan Qwen/Qwen3-8B --device rtx4070 --device cpu      # what the card has no room for runs on the CPU\n"
        "  qkernels plan model-Q4_K_M.gguf --json\n"
        "  qkernels plan my-llama/ --scheme w4a16_g128 --scheme w3a16_g64 --type Q4_K_M",
        "Weights, cache and speed of a model on a device, for the forms that it can be given; headers are all that is read. "
        "The last line decides. Exit code 0 where something fits, 3 where nothing does.",
    )
    parser.add_argument(
        "model", help="a directory, a GGUF file, a config.json alone, or a Hub id (its headers are fetched)"
    )
    parser.add_argument(
        "--device",
        action="append",
        metavar="DEVICE",
        help="cpu (what is free here), cuda:0, a card (rtx4090, h200, …) or an amount of GPU memory (24GiB); twice: a GPU, "
        "and what takes the layers that it has no room for (default: cpu)",
    )
    parser.add_argument(
        "--context", type=unsigned, help="tokens of prompt and answer (default: 4096, at most the model's)"
    )
    parser.add_argument("--batch", type=positive, default=1, help="sequences at a time (default: 1)")
    parser.add_argument("--kv-dtype", help="of the cache: float32, bfloat16, float16 or fp8 (default: the model's)")
    parser.add_argument(
        "--scheme",
        action="append",
        metavar="SCHEME",
        help="a row, such as w4a16_g128; may be repeated (default: a list)",
    )
    parser.add_argument(
        "--type",
        action="append",
        metavar="TYPE",
        help="a row of a GGUF file, such as Q4_K_M, with its bytes exactly; may be repeated, and beside --scheme",
    )
    parser.add_argument(
        "--prefer",
        choices=("quality", "speed", "size"),
        default="quality",
        help="what decides among the rows that fit (default: quality)",
    )
    parser.add_argument(
        "--bench",
        action="append",
        default=[],
        metavar="FILE",
        help="a result of this machine: of `qkernels bench --json`, for its bandwidth, or of "
        "`python -m benchmarks.models.quantize_speed`, for the time that quantizing takes; may be repeated",
    )
    add_dtype(parser)
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(args: argparse.Namespace) -> int:
    from ..planning import plan

    found = plan(
        args.model,
        args.device or ["cpu"],
        args.context,
        args.batch,
        args.kv_dtype,
        dtype_of(args),
        args.scheme or (),
        args.prefer,
        args.bench,
        args.revision,
        args.type or (),
    )
    print(found.to_json() if args.json else found.to_markdown())
    return 0 if found.fits else SHORT
