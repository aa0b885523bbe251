"""Perplexity and KL of methods and schemes whatever kernels there are: dequantized weights in the float model, and int8
activations (one scale a token) imitated by a hook where the scheme asks for them.

python -m benchmarks.quality.dequantized examples/demo_model [--out quality-dequantized.json]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import HQQ, NF4, RTN, SmoothQuant, evaluate, quantize
from qkernels.checkpoint import load, open_checkpoint
from qkernels.cli.common import read_text
from qkernels.quantizers import Options
from qkernels.text import table
from qkernels.texts import load_tokenizer, token_ids

from ..method import envelope, environment

KIND = "quality-dequantized"

METHODS: dict[str, Options] = {
    "RTN": RTN(4, 64, False, zeros="float"),
    "RTN, integer zeros": RTN(4, 64, False),
    "HQQ": HQQ(4),
    "HQQ, p = 1": HQQ(4, p=1.0),
    "HQQ, p = 0.7": HQQ(4, p=0.7),
    "NF4": NF4(),
    "NF4, double quantization": NF4(double_quant=True),
    "RTN 3 bit": RTN(3, 64, False, zeros="float"),
    "HQQ 3 bit": HQQ(3),
    "HQQ 3 bit, p = 1": HQQ(3, p=1.0),
    "RTN 2 bit": RTN(2, 64, False, zeros="float"),
    "HQQ 2 bit": HQQ(2),
    "W8A8": RTN().with_scheme("w8a8_channel"),
    "W8A8 SmoothQuant": SmoothQuant(),
    "W4A8": RTN().with_scheme("w4a8_g128"),
    "W4A8 SmoothQuant": SmoothQuant(4, 128),
}


def int8_activations(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook: symmetric int8 with one scale a token, the largest magnitude at 127."""
    x = args[0]
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((x / scale).round() * scale, *args[1:])


def dequantized(original: nn.Module, directory: Path, act: str | None) -> nn.Module:
    """A copy of the float model with the weights of a quantized checkpoint."""
    model, checkpoint = copy.deepcopy(original), open_checkpoint(directory)
    state = {name: checkpoint.read(name).float() for name in checkpoint.names()}
    for module in checkpoint.modules:
        state[f"{module}.weight"] = checkpoint.weight(module).weight.dequantize()
        if act == "int8":
            model.get_submodule(module).register_forward_pre_hook(int8_activations)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = getattr(model, "_tied_weights_keys", None) or ()
    if unexpected or set(missing) - set(tied):
        raise SystemExit(f"{directory} does not fit the model: missing {missing}, unexpected {unexpected}")
    return model


def measure(model: Path, names: Sequence[str], samples: int, seq_len: int, tokens: int | None) -> list[dict[str, Any]]:
    """One row a method: perplexity, that of the original, and KL from it (nats a token), in fp32, over the model's eval.txt."""
    tokenizer = load_tokenizer(model)
    ids = token_ids(tokenizer, read_text(str(model / "eval.txt")))[:tokens]
    original = load(model, dtype=torch.float32)
    base = evaluate.perplexity(original, ids, seq_len, progress=False).perplexity
    rows = []
    for name in names:
        method = METHODS[name]
        texts = None if method.needs == "weight" else [read_text(str(model / "calibration.txt"))]
        with TemporaryDirectory() as directory:
            target = Path(directory) / "out"
            quantize(model, method, calibration=texts, save_to=target, samples=samples, seq_len=seq_len, progress=False)
            small = dequantized(original, target, method.act)
        perplexity = evaluate.perplexity(small, ids, seq_len, progress=False).perplexity
        kl = evaluate.compare(small, original, ids, seq_len, progress=False).kl
        rows.append(
            {
                "method": name,
                "scheme": str(method.scheme),
                "perplexity": perplexity,
                "original": base,
                "kl": kl,
                "tokens": len(ids),
                "calibration_tokens": 0 if texts is None else samples * seq_len,
                "seq_len": seq_len,
            }
        )
        print(*printed(rows[-1]), sep="  ", file=sys.stderr, flush=True)
    return rows


def printed(row: dict[str, Any]) -> list[str]:
    change = 100 * (row["perplexity"] / row["original"] - 1)
    return [row["method"], row["scheme"], f"{change:+.2f} %", f"{row['kl']:.1e}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.dequantized", description=__doc__)
    parser.add_argument("model", type=Path, help="a directory with eval.txt and calibration.txt beside the model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, help="of eval.txt, from its beginning (default: all)")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    args = parser.parse_args(argv)
    where = environment.describe(torch.device("cpu"))
    rows = measure(args.model, args.methods, args.samples, args.seq_len, args.tokens)
    if args.out:
        conditions = {"model": args.model.resolve().name, "activations": "float32"}
        envelope.write(envelope.sealed(KIND, where, rows, conditions), args.out)
    print(table(["method", "scheme", "perplexity", "KL"], [printed(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
