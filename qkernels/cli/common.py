"""What several commands share: argument types, the tokenizer, writing results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from .cores import find_cores, oversubscribed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where to compute, for example cpu or cuda:0 (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="of activations (default: that of the checkpoint)")


def warn_of_threads(device: str) -> None:
    """One line on standard error if torch runs more threads on the CPU than this process has cores."""
    advice = oversubscribed(find_cores(), torch.get_num_threads()) if torch.device(device).type == "cpu" else None
    if advice:
        print(f"warning: {advice}", file=sys.stderr)


def read_text(path: str) -> str:
    """A UTF-8 text file.

    Raises:
        ArgumentError: it is not UTF-8, or empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} must be UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ArgumentError(f"{path} is empty; give a file with some text")
    return text


def load_tokenizer(directory: str | Path) -> Any:
    """The checkpoint's own tokenizer; nothing is downloaded, no code of the checkpoint is run.

    Raises:
        CheckpointError: the directory has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no readable tokenizer: {error}") from None


def token_ids(tokenizer: Callable[..., Any], text: str) -> Tensor:
    """int64 `[tokens]`, without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
    ids: Tensor = encoded["input_ids"][0]
    return ids


def print_json(values: Mapping[str, Any]) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))
