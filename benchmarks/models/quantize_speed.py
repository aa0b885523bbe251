"""How long quantizing takes, by method: processor time for a decoder layer of 45 million weights, from files to files.

    python -m benchmarks.models.quantize_speed [--methods gptq awq] [--out FILE]

The model is a Llama of one layer (2048 x 5632) with random weights, written once; each method reads it and writes a result.
Methods with calibration run twice, over 2048 and 8192 tokens: what a token adds (two passes through the layer, and the method's
sums) and what weights cost by themselves come apart. Seconds are those of all threads together, which a busy machine changes
little: on one core it is the time that passes, on more that is less. Rows go to the file as they come, beside those of other
methods of the same commit. `qkernels plan --bench FILE` takes them in place of its own table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qkernels import load_tokenizer, quantize
from qkernels.checkpoint import to_gguf
from qkernels.quantizers import QUANTIZERS
from qkernels.text import table as markdown_table

from ..method import envelope, environment

KIND = "quantizing"
DEMO = environment.ROOT / "examples" / "demo_model"
HIDDEN, INTERMEDIATE = 2048, 5632
WINDOW, WINDOWS = 256, (8, 32)
SCHEMES = {
    "rtn": "w4a16_g128",
    "gptq": "w4a16_g128",
    "awq": "w4a16_g128_asym",
    "smoothquant": "w8a8_channel",
    "nf4": "nf4_g64",
}
GGUF = {"gguf": "plain", "gguf, best search": "best"}
TYPE = "Q4_K_M"


@dataclass(frozen=True)
class Row:
    """Processor seconds for 10^9 weights, and how many more for each 1000 tokens of calibration.

    `measured`: (tokens, seconds) of each run on `weights` weights.
    """

    method: str
    scheme: str
    weights: int
    seconds: float
    seconds_a_thousand_tokens: float
    measured: list[tuple[int, float]]


def fitted(method: str, scheme: str, weights: int, measured: list[tuple[int, float]]) -> Row:
    """The line through one run or two."""
    billions = weights / 1e9
    (tokens, seconds), *others = measured
    slope = (others[0][1] - seconds) / (others[0][0] - tokens) if others else 0.0
    slope = max(slope, 0.0)
    rest = max(seconds - slope * tokens, 0.0)
    return Row(method, scheme, weights, rest / billions, 1000 * slope / billions, measured)


def write_model(out: Path) -> int:
    """The model with the demo model's tokenizer; how many weights its layer has."""
    config = LlamaConfig.from_pretrained(DEMO)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = HIDDEN, INTERMEDIATE, 1
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 32, 8, 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    load_tokenizer(DEMO).save_pretrained(out)
    return sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(method: str, source: Path, weights: int, scratch: Path) -> Row:
    """Time one method; `scratch` takes what it writes."""
    if method in GGUF:
        target = scratch / "model.gguf"
        return fitted(
            method,
            TYPE,
            weights,
            [(0, seconds_of(lambda: to_gguf(source, target, TYPE, search=GGUF[method])))],  # type: ignore[arg-type]
        )
    options = QUANTIZERS[method]().with_scheme(SCHEMES[method])
    words = [(DEMO / "calibration.txt").read_text(encoding="utf-8")]
    measured = []
    for windows in WINDOWS if options.needs == "moments" else (0,):
        calibration = {"calibration": words, "samples": windows, "seq_len": WINDOW} if windows else {}
        out = scratch / f"{windows}"
        seconds = seconds_of(lambda: quantize(source, options, save_to=out, progress=False, **calibration))  # type: ignore[arg-type] # noqa: B023
        measured.append((windows * WINDOW, seconds))
    return fitted(method, SCHEMES[method], weights, measured)


def to_markdown(rows: Sequence[Row]) -> str:
    header = ["method", "scheme", "s for 10^9 weights", "and for each 1000 tokens", "runs: tokens, s"]
    lines = [
        [
            r.method, r.scheme, f"{r.seconds:.0f}", f"{r.seconds_a_thousand_tokens:.1f}",
            "; ".join(f"{tokens}, {seconds:.1f}" for tokens, seconds in r.measured),
        ]
        for r in rows
    ]  # fmt: skip
    return markdown_table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.quantize_speed", description=str(__doc__).split("\n\n")[0]
    )
    methods = [*SCHEMES, *GGUF]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/quantize-speed.json")
    args = parser.parse_args(argv)
    where = environment.describe(torch.device("cpu"))
    out = args.out or environment.RESULTS / where["machine"] / "quantize-speed.json"
    rows = [Row(**row) for row in envelope.rows_so_far(out, KIND, where["commit"])]
    with tempfile.TemporaryDirectory() as directory:
        weights = write_model(Path(directory) / "model")
        quantize(
            Path(directory) / "model", QUANTIZERS["rtn"](), save_to=Path(directory) / "first", progress=False
        )  # imports
        for method in args.methods:
            with tempfile.TemporaryDirectory() as scratch:
                row = measure(method, Path(directory) / "model", weights, Path(scratch))
            rows = sorted([r for r in rows if r.method != method] + [row], key=lambda r: methods.index(r.method))
            envelope.write(envelope.sealed(KIND, where, [asdict(r) for r in rows]), out)
    text = to_markdown(rows)
    about = (
        f"{weights} weights, {where['threads']} threads, {where['cpu']}, qkernels {where['commit']}, {where['date']}."
    )
    out.with_suffix(".md").write_text(f"{text}\n\n{about}\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
