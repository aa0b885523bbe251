"""`qkernels inspect`: what a checkpoint holds, checked before anything is loaded."""

from __future__ import annotations

import argparse

from .common import Subparsers, add_revision, command_parser

NAME, SUMMARY = "inspect", "show what a checkpoint holds, and whether it is sound"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels inspect out/\n  qkernels inspect out/ --json\n  qkernels inspect Qwen/Qwen3-0.6B --revision main",
    )
    parser.add_argument("checkpoint", help="a directory with safetensors and config.json, a GGUF file, or a Hub id")
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    return parser


def run(args: argparse.Namespace) -> int:
    from ..inspection import inspect

    found = inspect(args.checkpoint, args.revision)
    print(found.to_json() if args.json else found.to_markdown())
    return 0
