"""`qkernels COMMAND …`: parse, run, and turn every expected error into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import QKernelsError
from . import bench, doctor, evaluate, generate, inspect, pack, plan, quantize, serve
from .streams import drop_output, take_any_text

COMMANDS = (plan, quantize, pack, inspect, evaluate, generate, serve, bench, doctor)
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 130, 141  # the last two as a shell has them, for signals 2 and 13


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
    """Run one command; returns the exit code: 0 done, 1 bad input or a failed read or write, 130 interrupted, 141 where nobody
    reads the output any more."""
    argv = sys.argv[1:] if argv is None else argv
    take_any_text()
    name = "qkernels"
    try:
        try:
            args = parser(argv).parse_args(argv)
            name = f"qkernels {args.command}"
            logging.basicConfig(
                level=logging.INFO if args.verbose else logging.WARNING,
                format="%(levelname)s %(name)s: %(message)s",
                stream=sys.stderr,
            )
            return int(args.run(args))
        finally:
            print(end="", flush=True)  # here, and not while Python ends, where a broken pipe is a traceback
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE
    except (QKernelsError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing half-written was left behind", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
