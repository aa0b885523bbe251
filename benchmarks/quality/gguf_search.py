"""What the searches for GGUF blocks leave of error, and GPTQ in these types, on the linear layers of a model's decoder layers.

python -m benchmarks.quality.gguf_search examples/demo_model [--types Q4_K …] [--out gguf-search.json]

Relative errors: Σ importance · (ŵ - w)² over Σ importance · w², and of the output, tr Δ H Δᵀ over tr W H Wᵀ, summed over layers
in fp64; H is 2/n Σ x xᵀ of calibration.txt in the float model, importance its diagonal. KL to the float model, nats a token over
eval.txt, with all of these layers in one type and fp32 everywhere else, for the types that GPTQ is tried in.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import evaluate
from qkernels.checkpoint import load
from qkernels.cli.common import read_text
from qkernels.formats.gguf import WRITABLE_TYPES, dequantize, gguf_blocks
from qkernels.layerwise.gguf_blocks import gguf_gptq
from qkernels.layerwise.running import Hook, pre_hooks
from qkernels.quantizers import InputStatistics
from qkernels.text import table
from qkernels.texts import batches_of, calibration_windows, load_tokenizer, token_ids

from ..method import envelope, environment

KIND = "gguf-search"
SWEPT = ["Q2_K", "Q3_K", "Q4_K"]

# Weight, Hessian and type to blocks.
WAYS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "plain": lambda w, h, type: gguf_blocks(w, type),
    "best": lambda w, h, type: gguf_blocks(w, type, search="best"),
    "plain, importance": lambda w, h, type: gguf_blocks(w, type, h.diagonal()),
    "best, importance": lambda w, h, type: gguf_blocks(w, type, h.diagonal(), "best"),
    "GPTQ, natural order": lambda w, h, type: gguf_gptq(w, h, type, "natural"),
    "GPTQ, by energy": lambda w, h, type: gguf_gptq(w, h, type, "energy"),
}


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def hessians(model: nn.Module, windows: Sequence[Tensor]) -> dict[str, Tensor]:
    collected = {name: InputStatistics(layer.in_features) for name, layer in layers_of(model).items()}

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            collected[name].update(args[0])

        return hook

    with torch.inference_mode(), pre_hooks(model, {name: watch(name) for name in collected}):
        for group in windows:
            for batch in batches_of(group):
                model(batch)
    return {name: found.hessian(name) for name, found in collected.items()}


def errors(layers: Mapping[str, nn.Linear], made: Mapping[str, Tensor], h: Mapping[str, Tensor]) -> dict[str, float]:
    """The three errors of all layers together."""
    sums = dict.fromkeys(("alike", "importance", "output"), 0.0)
    wholes = dict(sums)
    for name, layer in layers.items():
        w, H = layer.weight.detach().double(), h[name].double()
        for part, into in ((made[name].double() - w, sums), (w, wholes)):
            into["alike"] += float(part.square().sum())
            into["importance"] += float((part.square() * H.diagonal()).sum())
            into["output"] += float(((part @ H) * part).sum())
    return {f"error_{name}": sums[name] / wholes[name] for name in sums}


def divergence(model: nn.Module, made: Mapping[str, Tensor], ids: Tensor, seq_len: int) -> float:
    small = copy.deepcopy(model)
    small.load_state_dict({f"{name}.weight": value for name, value in made.items()}, strict=False)
    return evaluate.compare(small, model, ids, seq_len, progress=False).kl


def measure(
    path: Path, types: Sequence[str], swept: Sequence[str], samples: int, seq_len: int, tokens: int
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(path)
    ids = token_ids(tokenizer, read_text(str(path / "eval.txt")))[:tokens]
    model = load(path, dtype=torch.float32)
    windows = calibration_windows([read_text(str(path / "calibration.txt"))], samples, seq_len, tokenizer)
    h, layers, rows = hessians(model, windows), layers_of(model), []
    for type in types:
        for way, quantized in WAYS.items():
            if way.startswith("GPTQ") and type not in swept:
                continue
            made = {
                name: dequantize(quantized(layer.weight.detach(), h[name], type), type)
                for name, layer in layers.items()
            }
            kl = divergence(model, made, ids, seq_len) if type in swept else None
            rows.append({"type": type, "way": way, **errors(layers, made, h), "kl": kl, "tokens": len(ids)})
            print(*printed(rows[-1]), sep="  ", file=sys.stderr, flush=True)
    return rows


def printed(row: dict[str, Any]) -> list[str]:
    numbers = [row[name] for name in ("error_alike", "error_importance", "error_output", "kl")]
    return [row["type"], row["way"], *("" if number is None else f"{number:.3e}" for number in numbers)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.gguf_search", description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with eval.txt and calibration.txt beside the model")
    parser.add_argument("--types", nargs="+", choices=WRITABLE_TYPES, default=list(WRITABLE_TYPES))
    parser.add_argument("--swept", nargs="*", choices=WRITABLE_TYPES, default=SWEPT, help="types for GPTQ and KL")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=3072, help="of eval.txt, from its beginning")
    parser.add_argument("--out", type=Path, help="the rows as JSON, and the table beside them")
    args = parser.parse_args(argv)
    where = environment.describe(torch.device("cpu"))
    rows = measure(args.model, args.types, args.swept, args.samples, args.seq_len, args.tokens)
    head = ["type", "way", "error, columns alike", "error by importance", "error of the output", "KL"]
    text = table(head, [printed(row) for row in rows])
    if args.out:
        conditions = {"model": args.model.resolve().name, "calibration_tokens": args.samples * args.seq_len}
        envelope.write_with_table(envelope.sealed(KIND, where, rows, conditions), args.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
