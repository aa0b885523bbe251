"""`qkernels quantize`: a float checkpoint in, a quantized one out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..scheme import GroupSize
from .common import Subparsers, add_device, add_revision, command_parser, local, positive, read_text
from .gguf import add_gguf_options, check_no_gguf_options, quantize_to_gguf

if TYPE_CHECKING:
    from ..quantizers import Options


NAME, SUMMARY = "quantize", "quantize a model directory"
DEFAULT_METHOD, DEFAULT_FORMAT = "gptq", "native"


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
    from ..quantizers import QUANTIZERS

    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels quantize my-llama/ out/ --method gptq --calibration text.txt --format gptq\n"
        "  qkernels quantize my-llama/ out/ --method awq --asym --calibration text.txt --format awq\n"
        "  qkernels quantize my-llama/ out/ --method gptq --scales awq --asym --calibration text.txt\n"
        "  qkernels quantize my-llama/ out/ --method rtn --bits 8 --override '*.down_proj=w8a16_channel'\n"
        "  qkernels quantize my-llama/ out/ --method hqq --bits 3\n"
        "  qkernels quantize my-llama/ out/ --method nf4\n"
        "  qkernels quantize my-llama/ out/ --method rtn --bits 6 --group-size 32\n"
        "  qkernels quantize my-llama/ out/ --method rtn --scheme w4a16_g32_offset\n"
        "  qkernels quantize my-llama/ out/ --method rtn --scheme mxfp4_g32 --format compressed-tensors\n"
        "  qkernels quantize my-llama/ out/ --method gptq --scheme w4a8_g128 --calibration text.txt\n"
        "  qkernels quantize my-llama/ out/ --method rtn --scheme w8a8w_channel --format compressed-tensors\n"
        "  qkernels quantize my-llama/ out/ --method smoothquant --calibration text.txt    (w8a8_channel)\n"
        "  qkernels quantize my-llama/ out/ --method gptq --calibration text.txt --dry-run\n"
        "  qkernels quantize my-llama/ my-llama-Q4_K_M.gguf --type Q4_K_M\n"
        "  qkernels quantize my-llama/ my-llama-Q3_K_M.gguf --type Q3_K_M --imatrix my-llama.imatrix\n"
        "  qkernels quantize my-llama/ my-llama-Q4_K_M.gguf --type Q4_K_M --method gptq --calibration text.txt\n"
        "  qkernels quantize my-llama/ out.gguf --target-size 4.2GiB --calibration text.txt --samples 16 --seq-len 512\n"
        "  qkernels quantize my-llama/ out.gguf --type Q4_K_M --tensor-type 'ffn_down=Q6_K' --dry-run\n"
        "  qkernels quantize Qwen/Qwen3-0.6B out/ --method rtn --revision main",
        "Quantize a model directory, one decoder layer at a time: memory stays at one layer plus the calibration "
        "activations. The output appears complete or not at all. With --type a GGUF file is written, of any checkpoint that can "
        "be loaded, one tensor at a time; with --type and --method gptq its blocks are calibrated.",
    )
    parser.add_argument("model", help="a directory with safetensors, config.json and a tokenizer, or a Hub id")
    parser.add_argument("out", help="the directory to make, or with --type the .gguf file; it must not exist yet")
    parser.add_argument(
        "--method",
        choices=QUANTIZERS,
        help=f"{_listed(_names(lambda method: method.needs == 'weight'))} need no calibration (default: gptq)",
    )
    parser.add_argument("--bits", type=int, choices=range(2, 9), help="width of a weight (default: 4; smoothquant: 8)")
    parser.add_argument(
        "--scheme",
        help="instead of --bits, --group-size and --asym, in short form: w4a16_g128, w4a16_g64_asym, w4a16_g32_offset, "
        "w3a16_g64_fzero, w8a16_channel, w4a8_g128 (activations in 8 bits), w8a8w_channel (as compressed-tensors has "
        "them), w8a8o6_channel (LLM.int8), nf4_g64, fp4_g64, "
        "mxfp4_g32, nvfp4_g16, fp8_channel, fp8_block128",
    )
    parser.add_argument(
        "--group-size",
        type=group_size,
        help='weights that share a scale: an integer, "channel" or "tensor" (default: 128; hqq, nf4: 64; smoothquant: channel)',
    )
    with_zeros = ", ".join(_names(lambda method: method.integer_zeros))
    parser.add_argument("--asym", action="store_true", help=f"integer zero points ({with_zeros})")
    parser.add_argument(
        "--act-order",
        choices=("none", "group", "static"),
        help="gptq: the order of columns (default: the best measured)",
    )
    parser.add_argument(
        "--scales",
        choices=("none", "awq"),
        help="gptq: first scale input channels as awq does, which has the least error, in the time of both (default: none)",
    )
    parser.add_argument(
        "--aim",
        choices=("layer", "model"),
        help="gptq: what a layer's output shall be: what its float weight makes of its inputs, or that of the model as it came, "
        "errors of the layers before made up for (default: layer)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help=f"UTF-8 text like what the model will see ({', '.join(_names(lambda method: method.needs == 'moments'))})",
    )
    parser.add_argument(
        "--eval-text", metavar="FILE", help="UTF-8 text the model has not seen: the report says perplexity and KL on it"
    )
    parser.add_argument(
        "--routing",
        choices=("routed", "all"),
        help="tokens that an expert is calibrated with: those that the router sends to it, or all (default: routed)",
    )
    parser.add_argument("--samples", type=positive, default=128, help="calibration windows (default: 128)")
    parser.add_argument(
        "--seq-len", type=positive, default=2048, help="tokens in a window, capped to the model's (default: 2048)"
    )
    parser.add_argument("--format", help="native, gptq, gptq_v2, awq or compressed-tensors (default: native)")
    parser.add_argument("--include", action="append", metavar="PATTERN", help="only layers that match; may be repeated")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="never these layers (default: heads)")
    parser.add_argument(
        "--override",
        action="append",
        type=override,
        default=[],
        metavar="PATTERN=SCHEME",
        help="another scheme for some layers",
    )
    add_gguf_options(parser)
    add_device(parser)
    add_revision(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that qkernels wrote")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the finished layers of an interrupted run for the same directory",
    )
    parser.add_argument("--dry-run", action="store_true", help="say layers, sizes, disk and memory needed, and stop")
    return parser


def method_of(args: argparse.Namespace) -> Options:
    """The method with the options that were given; what was not stays the method's own default.

    Raises:
        ArgumentError: the method has no such option.
    """
    from ..quantizers import QUANTIZERS

    name = args.method or DEFAULT_METHOD
    method = QUANTIZERS[name]
    if args.scheme is not None:
        if args.bits is not None or args.group_size is not None or args.asym:
            raise ArgumentError(f"--scheme {args.scheme} says it all: leave out --bits, --group-size and --asym")
        return method(**_own_options(args, method)).with_scheme(args.scheme)
    given: dict[str, Any] = {"bits": args.bits, "group_size": args.group_size}
    options = _own_options(args, method) | {name: value for name, value in given.items() if value is not None}
    if args.asym and not method.integer_zeros:
        raise ArgumentError(
            f"--asym gives {_listed(_names(lambda known: known.integer_zeros))} integer zero points; {name} has "
            f"zero points of its own or none"
        )
    if method.integer_zeros:
        options["symmetric"] = not args.asym
    return method(**options)


def _own_options(args: argparse.Namespace, method: type[Options]) -> dict[str, Any]:
    """What was given of the options that only some methods have."""
    given = {
        option: getattr(args, option) for option in ("act_order", "scales", "aim") if getattr(args, option) is not None
    }
    for option in given:
        if not _has(method, option):
            having = partial(_has, option=option)
            raise ArgumentError(
                f"--{option.replace('_', '-')} is an option of {_listed(_names(having))}, got --method "
                f"{args.method or DEFAULT_METHOD}"
            )
    return given


def _names(which: Callable[[type[Options]], bool]) -> list[str]:
    """The registered methods of which something is true."""
    from ..quantizers import QUANTIZERS

    return [name for name, method in QUANTIZERS.items() if which(method)]


def _has(method: type[Options], option: str) -> bool:
    return any(field.name == option for field in fields(method))


def _listed(names: list[str]) -> str:
    """Names as in a sentence: `a, b and c`."""
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])


def run(args: argparse.Namespace) -> int:
    if args.type is not None or args.target_size is not None:
        return quantize_to_gguf(args)
    check_no_gguf_options(args)
    from ..calibrate import preview, quantize
    from ..layerwise.preview import check_disk
    from ..texts import load_tokenizer

    method, path = method_of(args), local(args, args.model)
    selection = {
        "include": args.include,
        "exclude": args.exclude,
        "overrides": dict(args.override),
    }
    if args.dry_run:
        previewed = preview(
            path,
            method,
            **selection,
            samples=args.samples,
            seq_len=args.seq_len,
            format=args.format or DEFAULT_FORMAT,
        )
        print(previewed.to_markdown())
        check_disk(previewed, args.out)
        return 0
    report = quantize(
        path,
        method,
        calibration=[read_text(args.calibration)] if args.calibration else None,
        evaluation=[read_text(args.eval_text)] if args.eval_text else None,
        tokenizer=load_tokenizer(path) if args.calibration or args.eval_text else None,
        save_to=args.out,
        format=args.format or DEFAULT_FORMAT,
        samples=args.samples,
        seq_len=args.seq_len,
        device=args.device,
        overwrite=args.overwrite,
        resume=args.resume,
        routing=args.routing or "routed",
        **selection,
    )
    print(report.to_markdown())
    print(report.quality())
    print(f"wrote {args.out}")
    return 0
