"""What several commands share: argument types, reading a text, writing results.

The modules of commands import torch where they run, not at their head: `--help` needs none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..machine import find_cores, oversubscribed

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
Subparsers = Any  # argparse keeps the type private


def command_parser(
    commands: Subparsers, name: str, summary: str, examples: str, description: str | None = None
) -> argparse.ArgumentParser:
    """A sub-command whose --help ends with examples."""
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description or summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return made


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or not 1 <= (value := int(text[:20])) < 2**31:  # Python refuses to read thousands of digits
        raise argparse.ArgumentTypeError(f"expected a positive integer below 2^31, got {text[:40]!r}")
    return value


def unsigned(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return 0 if text == "0" else positive(text)


def some_text(text: str) -> str:
    """An argparse type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got ''")
    return text


def seed(text: str) -> int:
    """An argparse type: what torch's generators take, -2^63 … 2^64 - 1."""
    digits = text.removeprefix("-")
    value = int(text[:22]) if digits.isdecimal() else None
    if value is None or not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected an integer of -2^63 … 2^64 - 1, got {text[:40]!r}")
    return value


def any_device(text: str) -> torch.device:
    """An argparse type: a device that kernels run on, here or elsewhere."""
    import torch

    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu or cuda:0, got {text!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"kernels run on cpu and cuda, got {text!r}")
    return found


def device(text: str) -> torch.device:
    """An argparse type: the CPU, or a GPU that this torch sees."""
    import torch

    found = any_device(text)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(
            f"this torch sees {count or 'no'} GPU{'s' * (count > 1)}, got {text!r}: see qkernels doctor"
        )
    return found


def temperature(text: str) -> float:
    """An argparse type: a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """An argparse type: a number above 0, at most 1."""
    value = temperature(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device, default="cpu", help="where to compute, for example cpu or cuda:0 (default: cpu)"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of activations (default: that of the checkpoint)")


def add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="of a model on the Hub: a branch, tag or commit (default: main)")


def local(args: argparse.Namespace, model: str) -> str:
    """Where a model lies here: a Hub id's folder in the cache, at `--revision`; everything else as it is."""
    from ..hub import local_copy

    return str(local_copy(model, args.revision))


def add_on_unsupported(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-unsupported",
        choices=("raise", "reference"),
        default="raise",
        help="where no kernel takes a layer: an error with the reasons, or the slow plain-PyTorch one (default: raise)",
    )


def add_activations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations",
        choices=("file", "16bit", "int8"),
        help="16bit: never quantized; int8: rounded to 8 bits a token, also where the file does not ask for it; file: as the "
        "checkpoint asks, and an error where no kernel has that (default: as it asks, and 16 bits with a warning where no kernel "
        "has that)",
    )


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """What `add_dtype` was given; None: the checkpoint's own."""
    import torch

    return getattr(torch, args.dtype) if args.dtype else None


def warn_of_threads(place: torch.device) -> None:
    """One line on standard error if torch runs more threads on the CPU than this process has cores."""
    import torch

    advice = oversubscribed(find_cores(), torch.get_num_threads()) if place.type == "cpu" else None
    if advice:
        print(f"warning: {advice}", file=sys.stderr)


def read_text(path: str) -> str:
    """A UTF-8 text file.

    Raises:
        ArgumentError: there is no such file, or it is not UTF-8, or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        found = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
        raise ArgumentError(f"{path} {found}; name a file with UTF-8 text") from None
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} must be UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ArgumentError(f"{path} is empty; give a file with some text")
    return text


def print_json(values: Mapping[str, Any]) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))  # a terminal without such characters: see `streams`
