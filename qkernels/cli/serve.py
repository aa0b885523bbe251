"""`qkernels serve`: a checkpoint behind an OpenAI-compatible server, that of transformers."""

from __future__ import annotations

import argparse
import sys

from .common import (
    Subparsers,
    add_activations,
    add_device,
    add_dtype,
    add_on_unsupported,
    add_revision,
    command_parser,
    dtype_of,
    local,
    positive,
    warn_of_threads,
)

NAME, SUMMARY = "serve", "answer requests (OpenAI's API) with a checkpoint"


def add_parser(commands: Subparsers) -> argparse.ArgumentParser:
    parser = command_parser(
        commands,
        NAME,
        SUMMARY,
        "  qkernels serve out/\n"
        "  qkernels serve model-Q4_K_M.gguf --name my-model --port 8080\n"
        "  qkernels serve out/ --continuous-batching        # many clients at once\n"
        "  qkernels serve Qwen/Qwen3-0.6B --revision main\n"
        "  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        '       -d \'{"model": "out/", "prompt": "It was", "max_tokens": 20}\'',
        "Serve a checkpoint with the server of transformers: /v1/completions, /v1/chat/completions, /v1/responses, /v1/models, "
        "/health. What that server does not do is printed when it starts. It asks for no key: do not bind it beyond loopback "
        "without something in front of it.",
    )
    parser.add_argument("checkpoint", help="a checkpoint directory, GGUF file or Hub id, quantized or not")
    parser.add_argument("--name", help="what requests call the model (default: CHECKPOINT as it is spelled)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1, loopback)")
    parser.add_argument("--port", type=positive, default=8000, help="(default: 8000)")
    parser.add_argument(
        "--continuous-batching", action="store_true", help="compute requests together, with a paged cache"
    )
    parser.add_argument(
        "--cache-blocks",
        type=positive,
        help="blocks of that cache (default: 128 on a CPU, else up to the memory there is)",
    )
    parser.add_argument("--batch-tokens", type=positive, help="most tokens in one batch (default: 512 on a CPU)")
    add_device(parser)
    add_dtype(parser)
    add_activations(parser)
    add_on_unsupported(parser)
    add_revision(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from ..integrations.serving import check, need_address, need_server, serve

    need_server()
    need_address(args.host, args.port)
    name = args.name or args.checkpoint
    path = local(args, args.checkpoint)
    served = check(path, name, args.continuous_batching)
    warn_of_threads(args.device)
    print(f"serving {served.architecture} as {served.name!r} at http://{args.host}:{args.port}/v1", file=sys.stderr)
    for gap in served.gaps:
        print(f"note: {gap}", file=sys.stderr)
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: {args.host} may be reached from other machines, and no key is asked for", file=sys.stderr)
    cache = {"cb_num_blocks": args.cache_blocks, "cb_max_batch_tokens": args.batch_tokens}
    given = {key: value for key, value in cache.items() if value is not None}
    serve(
        path, name, args.host, args.port, args.device, dtype_of(args), args.continuous_batching,
        on_unsupported=args.on_unsupported, activations=args.activations, **given,
    )  # fmt: skip
    return 0
