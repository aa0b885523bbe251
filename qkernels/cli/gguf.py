"""`qkernels quantize … --type`: a GGUF file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from ..errors import ArgumentError
from .common import local

if TYPE_CHECKING:
    from ..formats.gguf import ImportanceFile

# What says how a weight is quantized in another way, or what a GGUF file does not have.
_OTHERS: Final = {
    "method": "--method", "bits": "--bits", "scheme": "--scheme", "group_size": "--group-size", "asym": "--asym",
    "act_order": "--act-order", "format": "--format", "include": "--include", "exclude": "--exclude", "override": "--override",
    "calibration": "--calibration", "eval_text": "--eval-text", "resume": "--resume",
}  # fmt: skip
_OWN: Final = {"pure": "--pure", "tensor_type": "--tensor-type", "imatrix": "--imatrix"}


def tensor_type(text: str) -> tuple[str, str]:
    """An argparse type: REGEX=TYPE."""
    pattern, equals, type = text.rpartition("=")
    if not (pattern and equals and type):
        raise argparse.ArgumentTypeError(f"expected REGEX=TYPE such as ffn_down=Q6_K, got {text!r}")
    return pattern, type.upper()


def add_gguf_options(parser: argparse.ArgumentParser) -> None:
    """The options of GGUF files."""
    group = parser.add_argument_group("GGUF files", "instead of --method, --bits, --scheme and --format")
    group.add_argument(
        "--type",
        help="write a GGUF file in this mix of types, by llama.cpp's own rules: Q4_K_M, Q4_K_S, Q5_K_M, Q5_K_S, Q6_K, Q8_0, "
        "Q3_K_L, Q3_K_M, Q3_K_S, Q2_K, IQ4_XS, IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4_MOE, F16, BF16 or F32",
    )
    group.add_argument("--pure", action="store_true", help="every matrix in the one type")
    group.add_argument(
        "--tensor-type",
        action="append",
        type=tensor_type,
        default=[],
        metavar="REGEX=TYPE",
        help="another type for the tensors in whose names the expression is found (blk.0.ffn_down.weight); the first counts",
    )
    group.add_argument(
        "--imatrix",
        metavar="FILE",
        help="an importance matrix of llama.cpp, which says how much each input column counts",
    )


def check_no_gguf_options(args: argparse.Namespace) -> None:
    """Raise where options of GGUF files were given without a type."""
    given = [option for name, option in _OWN.items() if getattr(args, name)]
    if given:
        raise ArgumentError(f"{given[0]} belongs to GGUF files: name a type, such as --type Q4_K_M")
    if str(args.out).endswith(".gguf"):
        raise ArgumentError(
            f"{args.out} would be a directory of safetensors; for a GGUF file name a type, such as --type Q4_K_M"
        )


def quantize_to_gguf(args: argparse.Namespace) -> int:
    """Write the file, or say what it would hold."""
    from ..checkpoint import plan_gguf, to_gguf

    given = [option for name, option in _OTHERS.items() if getattr(args, name)]
    if given:
        raise ArgumentError(
            f"--type {args.type} says how a GGUF file is quantized: leave out {', '.join(given)}, or leave out --type"
        )
    options: dict[str, Any] = {
        "type": args.type.upper(), "pure": args.pure, "tensor_types": args.tensor_type, "importance": _importance(args.imatrix),
    }  # fmt: skip
    path = local(args, args.model)
    if args.dry_run:
        print(plan_gguf(path, **options).to_markdown())
        return 0
    print(to_gguf(path, args.out, overwrite=args.overwrite, **options).to_markdown())
    print(f"wrote {args.out}")
    return 0


def _importance(path: str | None) -> ImportanceFile | None:
    from ..formats.gguf import read_importance

    return None if path is None else read_importance(path)
