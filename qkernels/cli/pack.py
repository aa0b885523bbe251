"""`qkernels pack`: rewrite a quantized checkpoint for a kernel's layout, or in another format, without loss."""

from __future__ import annotations

import argparse

from ..errors import ArgumentError
from .common import Subparsers, add_revision, any_device, command_parser, local

GGUF = "gguf"
NAME, SUMMARY = "pack", "rewrite a quantized checkpoint for a kernel, or in another format"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels pack some-gptq-model/ out/\n"
        "  qkernels pack some-awq-model/ out/ --layout cpu_tile_a16\n"
        "  qkernels pack out/ for-other-engines/ --format gptq\n"
        "  qkernels pack out/ for-any-machine/ --format native\n"
        "  qkernels pack some-gptq-model/ model.gguf --format gguf\n"
        "  qkernels pack model-Q4_0.gguf out/ --format gptq",
        "Rewrite a quantized checkpoint: in the layout that a kernel reads (--layout), or in another file format "
        "(--format). The weights stay the same, bit for bit; what the target cannot express is refused with the reason.",
    )
    parser.add_argument("checkpoint", help="a quantized checkpoint directory, GGUF file or Hub id")
    parser.add_argument("out", help="the directory (with --format gguf: the file) to make; it must not exist yet")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--layout", help='a layout such as cpu_tile_a16; "auto" asks the catalogue for --device (default)'
    )
    target.add_argument(
        "--format", help="a file format instead: native, gptq, gptq_v2, awq, compressed-tensors or gguf"
    )
    parser.add_argument(
        "--device", type=any_device, default="cpu", help="the device that --layout auto packs for (default: cpu)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that qkernels wrote")
    add_revision(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import convert, to_gguf
    from ..checkpoint.packed import PACKED
    from ..checkpoint.saving import layout_of

    path = local(args, args.checkpoint)
    if args.format == GGUF or (args.format is None and args.layout is None and str(args.out).endswith(".gguf")):
        plan = to_gguf(path, args.out, overwrite=args.overwrite)
        print(plan.to_markdown())
        print(f"wrote {args.out} ({GGUF})")
        return 0
    layout = args.layout or "auto"
    if args.format is not None:
        target = args.format
    elif layout == "auto":
        target = layout_of(path, args.device)
    elif layout in PACKED:
        target = layout
    else:
        raise ArgumentError(
            f"--layout must be auto, {', '.join(list(PACKED)[:-1])} or {list(PACKED)[-1]}, got {layout!r}; a checkpoint in no "
            "kernel's layout, which every machine reads, is --format native"
        )
    convert(path, args.out, target, args.overwrite)
    print(f"wrote {args.out} ({target})")
    return 0
