"""`qkernels COMMAND …`: parse, run, and turn every expected error into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import QKernelsError
from . import bench, doctor, evaluate, generate, inspect, pack, quantize

COMMANDS = (quantize, pack, inspect, evaluate, generate, bench, doctor)
BAD_INPUT, INTERRUPTED = 1, 130


def parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The command line. With `argv`, of commands that do not occur in it the name and a line of help alone: what `quantize` takes
    is asked of the quantizers, which takes torch, and `qkernels --help` should not wait for that."""
    top = argparse.ArgumentParser(
        prog="qkernels",
        description="Quantize language models to small weights, and run them.",
        epilog="Each command has --help with examples.",
    )
    top.add_argument("--version", action="version", version=f"qkernels {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="log what is being done to standard error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        if argv is None or command.NAME in argv:
            command.add_parser(commands).set_defaults(run=command.run)
        else:
            commands.add_parser(command.NAME, help=command.SUMMARY)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 bad input or a failed read or write, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv).parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(args.run(args))
    except (QKernelsError, OSError) as error:
        print(f"qkernels {args.command}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"qkernels {args.command}: interrupted; nothing half-written was left behind", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
