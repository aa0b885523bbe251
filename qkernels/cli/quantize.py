"""`qkernels quantize`: a float checkpoint in, a quantized one out."""

from __future__ import annotations

import argparse

import torch

from ..scheme import GroupSize
from .common import Subparsers, command_parser, load_tokenizer, positive, read_text

METHODS = ("rtn", "gptq", "awq")


def group_size(text: str) -> GroupSize:
    """An argparse type: a positive integer, "channel" or "tensor"."""
    if text == "channel":
        return "channel"
    return "tensor" if text == "tensor" else positive(text)


def override(text: str) -> tuple[str, str]:
    """An argparse type: PATTERN=SCHEME."""
    pattern, equals, scheme = text.rpartition("=")
    if not (pattern and equals and scheme):
        raise argparse.ArgumentTypeError(f"expected PATTERN=SCHEME such as *.down_proj=w8a16_g128, got {text!r}")
    return pattern, scheme


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        "quantize",
        "quantize a model directory",
        "  qkernels quantize my-llama/ out/ --method gptq --calibration text.txt --format gptq\n"
        "  qkernels quantize my-llama/ out/ --method awq --asym --calibration text.txt --format awq\n"
        "  qkernels quantize my-llama/ out/ --method rtn --bits 8 --override '*.down_proj=w8a16_channel'\n"
        "  qkernels quantize my-llama/ out/ --method gptq --calibration text.txt --dry-run",
        "Quantize a model directory, one decoder layer at a time: memory stays at one layer plus the calibration "
        "activations. The output directory appears complete or not at all.",
    )
    parser.add_argument("model", help="a directory with safetensors, config.json and a tokenizer")
    parser.add_argument("out", help="the directory to make; it must not exist yet")
    parser.add_argument("--method", choices=METHODS, default="gptq", help="rtn needs no calibration (default: gptq)")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4, help="width of a weight (default: 4)")
    parser.add_argument(
        "--group-size",
        type=group_size,
        default=128,
        help='weights that share a scale: an integer, "channel" or "tensor"',
    )
    parser.add_argument("--asym", action="store_true", help="integer zero points instead of symmetric codes")
    parser.add_argument(
        "--act-order",
        choices=("none", "group", "static"),
        help="gptq: the order of columns (default: the best measured)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="UTF-8 text like what the model will see (gptq, awq)")
    parser.add_argument("--samples", type=positive, default=128, help="calibration windows (default: 128)")
    parser.add_argument(
        "--seq-len", type=positive, default=2048, help="tokens in a window, capped to the model's (default: 2048)"
    )
    parser.add_argument("--format", default="native", help="native, gptq, gptq_v2 or awq (default: native)")
    parser.add_argument("--include", action="append", metavar="PATTERN", help="only layers that match; may be repeated")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="never these layers (default: lm_head)")
    parser.add_argument(
        "--override",
        action="append",
        type=override,
        default=[],
        metavar="PATTERN=SCHEME",
        help="another scheme for some layers",
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="say layers, sizes, disk and memory needed, and stop")
    return parser


def run(args: argparse.Namespace) -> int:
    from ..calibrate import plan, quantize
    from ..quantizers import QUANTIZERS

    options = {"bits": args.bits, "group_size": args.group_size, "symmetric": not args.asym}
    if args.act_order is not None:
        options["act_order"] = args.act_order
    method = QUANTIZERS[args.method](**options)
    selection = {
        "include": args.include,
        "exclude": args.exclude if args.exclude is not None else ("lm_head",),
        "overrides": dict(args.override),
    }
    if args.dry_run:
        print(plan(args.model, method, **selection, samples=args.samples, seq_len=args.seq_len).to_markdown())
        return 0
    report = quantize(
        args.model,
        method,
        calibration=[read_text(args.calibration)] if args.calibration else None,
        tokenizer=load_tokenizer(args.model) if args.calibration else None,
        save_to=args.out,
        format=args.format,
        samples=args.samples,
        seq_len=args.seq_len,
        device=torch.device(args.device),
        overwrite=args.overwrite,
        **selection,
    )
    print(report.to_markdown())
    print(f"wrote {args.out}")
    return 0
