"""`qkernels quantize … --type`: a GGUF file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ArgumentError
from .common import local, read_text

if TYPE_CHECKING:
    from ..formats.gguf import ImportanceFile

# What says how a weight is quantized in another way, or what a GGUF file does not have.
_OTHERS: Final = {
    "bits": "--bits", "scheme": "--scheme", "group_size": "--group-size", "asym": "--asym",
    "act_order": "--act-order", "format": "--format", "include": "--include", "exclude": "--exclude", "override": "--override",
    "eval_text": "--eval-text", "aim": "--aim",
}  # fmt: skip
_OF_RUNS: Final = {
    "method": "--method",
    "resume": "--resume",
    "routing": "--routing",
    "scales": "--scales",
}  # decoder layer by decoder layer
_OWN: Final = {"pure": "--pure", "tensor_type": "--tensor-type", "imatrix": "--imatrix"}
PLAIN: Final = "plain"
_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def tensor_type(text: str) -> tuple[str, str]:
    """An argparse type: REGEX=TYPE."""
    pattern, equals, type = text.rpartition("=")
    if not (pattern and equals and type):
        raise argparse.ArgumentTypeError(f"expected REGEX=TYPE such as ffn_down=Q6_K, got {text!r}")
    return pattern, type.upper()


def size(text: str) -> int:
    """An argparse type: bytes, as 4.2GiB, 900MB or 5306976."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMG]?I?B|)", text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 4.2GiB, 900MB or 5306976, got {text[:40]!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def add_gguf_options(parser: argparse.ArgumentParser) -> None:
    """The options of GGUF files."""
    group = parser.add_argument_group("GGUF files", "instead of --bits, --scheme and --format")
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
        help="an importance matrix of llama.cpp, which says how much each input column counts; --calibration measures one "
        "instead, with the whole model in memory, or (--method gptq, --method awq) calibrates the blocks, layer by layer",
    )
    group.add_argument(
        "--search",
        choices=("plain", "best"),
        help="how blocks are found: as llama.cpp finds them, or with less error in more time (default: plain; "
        "--method gptq and awq have searches of their own)",
    )
    group.add_argument(
        "--target-size",
        type=size,
        metavar="SIZE",
        help="instead of --type: the types with which a file of this size (4.2GiB) loses least on the --calibration text; each "
        "tensor is asked about once, with the whole model in memory",
    )


def check_no_gguf_options(args: argparse.Namespace) -> None:
    """Raise where options of GGUF files were given without a type."""
    given = [option for name, option in {**_OWN, "search": "--search"}.items() if getattr(args, name)]
    if given:
        raise ArgumentError(f"{given[0]} belongs to GGUF files: name a type, such as --type Q4_K_M")
    if str(args.out).endswith(".gguf"):
        raise ArgumentError(
            f"{args.out} would be a directory of safetensors; for a GGUF file name a type, such as --type Q4_K_M"
        )


def quantize_to_gguf(args: argparse.Namespace) -> int:
    """Write the file, or say what it would hold."""
    from ..checkpoint import plan_gguf, to_gguf

    asked = f"--type {args.type}" if args.target_size is None else "--target-size"
    others = _OTHERS if args.target_size is None else {**_OTHERS, "type": "--type", **_OWN, "method": "--method"}
    if args.method is None or args.target_size is not None:
        others = others | {name: option for name, option in _OF_RUNS.items() if name != "method"}
    given = [option for name, option in others.items() if getattr(args, name)]
    if given:
        rest = f"leave out {', '.join(given)}, or leave out {asked.split()[0]}"
        raise ArgumentError(f"{asked} says how a GGUF file is quantized: {rest}")
    if args.calibration and args.imatrix:
        raise ArgumentError("--calibration measures an importance matrix, and --imatrix is one: leave one of them out")
    if args.target_size is not None:
        return _to_size(args)
    if args.method is not None:
        return _calibrated(args)
    options: dict[str, Any] = {
        "type": args.type.upper(), "pure": args.pure, "tensor_types": args.tensor_type, "importance": _importance(args),
    }  # fmt: skip
    path = local(args, args.model)
    if args.dry_run:
        print(plan_gguf(path, **options).to_markdown())
        return 0
    print(to_gguf(path, args.out, overwrite=args.overwrite, search=args.search or PLAIN, **options).to_markdown())
    print(f"wrote {args.out}")
    return 0


def _calibrated(args: argparse.Namespace) -> int:
    """The file by a method that looks at what goes into each layer."""
    from ..calibrate_gguf import preview_gguf, quantize_gguf

    if args.method not in ("gptq", "awq"):
        raise ArgumentError(
            f"blocks of GGUF files are made by --method gptq, by --method awq, or without --method by a search; got {args.method}"
        )
    if args.scales is not None and args.method != "gptq":
        raise ArgumentError(f"--scales is an option of gptq, got --method {args.method}")
    given = [option for option in ("imatrix", "search") if getattr(args, option)]
    if given:
        raise ArgumentError(
            f"--method {args.method} has the moments of inputs and a search of its own: leave out --{given[0]}"
        )
    model = local(args, args.model)
    method = "awq+gptq" if args.scales == "awq" else args.method
    options: dict[str, Any] = {
        "method": method, "pure": args.pure, "tensor_types": args.tensor_type, "samples": args.samples,
        "seq_len": args.seq_len,
    }  # fmt: skip
    if args.dry_run:
        plan, preview = preview_gguf(model, args.type.upper(), **options)
        print(f"{plan.to_markdown()}\n\n{preview.to_markdown()}")
        return 0
    if not args.calibration:
        raise ArgumentError(f"--method {args.method} is calibrated: give it a text with --calibration")
    plan, report = quantize_gguf(
        model, args.out, args.type.upper(), [read_text(args.calibration)], **options, device=args.device,
        overwrite=args.overwrite, resume=args.resume, routing=args.routing or "routed",
    )  # fmt: skip
    print(f"{plan.to_markdown()}\n\n{report.to_markdown()}\n{report.quality()}")
    print(f"wrote {args.out}")
    return 0


def _importance(args: argparse.Namespace) -> ImportanceFile | None:
    from ..formats.gguf import read_importance
    from ..sizing import importance_of

    if args.imatrix is not None:
        return read_importance(args.imatrix)
    return None if args.calibration is None else importance_of(local(args, args.model), **_measuring(args))


def _measuring(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": [read_text(args.calibration)], "samples": args.samples, "seq_len": args.seq_len, "device": args.device,
        "dataset": Path(args.calibration).name,
    }  # fmt: skip


def _to_size(args: argparse.Namespace) -> int:
    from ..checkpoint import to_gguf
    from ..sizing import choose_types

    if not args.calibration:
        raise ArgumentError("--target-size measures what each tensor costs: give it a text with --calibration")
    model = local(args, args.model)
    found = choose_types(model, args.target_size, **_measuring(args), search=args.search or PLAIN)
    print(found.to_markdown())
    if not args.dry_run:
        to_gguf(
            model,
            args.out,
            found.mix,
            False,
            found.tensor_types(),
            found.importance,
            args.overwrite,
            args.search or PLAIN,
        )
        print(f"wrote {args.out}")
    return 0
