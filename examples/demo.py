"""The demo: quantize the bundled Llama in several ways, compare, plot, and read what each of them writes.

    python examples/demo.py --out demo

Makes OUT/report.md (tables of the Llama and of a mixture of experts, and a plan of a larger model), OUT/report.png (the plot),
OUT/results.json and one checkpoint a configuration. Every row takes the whole way that a user's model would take: quantize into
a directory, load it from there, run it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import qkernels
from qkernels import AWQ, GPTQ, RTN, QuantLinear, extension, text
from qkernels.calibrate_gguf import quantize_gguf
from qkernels.evaluate import compare, perplexity
from qkernels.nn import model_bytes, packed_bytes
from qkernels.planning import plan
from qkernels.quantizers import Options

HERE = Path(__file__).parent
SEQ_LEN = 256  # what the model was trained on
# A method, or the name of a mix of types: a GGUF file, calibrated.
CONFIGURATIONS: tuple[tuple[str, Options | str], ...] = (
    ("int8 RTN", RTN(bits=8)),
    ("int4 RTN", RTN(bits=4)),
    ("int4 GPTQ", GPTQ(bits=4)),
    ("int4 AWQ", AWQ(bits=4, symmetric=False)),
    ("int4 AWQ+GPTQ", GPTQ(bits=4, symmetric=False, act_order="static", scales="awq")),
    ("Q4_K_M GPTQ", "Q4_K_M"),
    ("int3 RTN", RTN(bits=3)),
    ("int3 GPTQ", GPTQ(bits=3)),
    ("int3 AWQ", AWQ(bits=3, symmetric=False)),
    ("int3 AWQ+GPTQ", GPTQ(bits=3, symmetric=False, act_order="static", scales="awq")),
)
EXPERTS: tuple[tuple[str, Options], ...] = (("int4 RTN", RTN(bits=4)), ("int4 GPTQ", GPTQ(bits=4, act_order="static")))
# What `qkernels plan` is asked about: a Llama of 8 billion parameters, of which it needs the config alone.
PLANNED = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}  # fmt: skip
PLANNED_FOR = "rtx4070"


@dataclass(frozen=True)
class Row:
    """One configuration's results. Bytes are those of the quantized layers (of the same layers, for the original): codes at
    their true width as a checkpoint holds them, and as the kernel reads them."""

    name: str
    scheme: str
    true_bytes: int
    bits_per_weight: float
    kernel_bytes: int
    perplexity: float
    kl: float
    top1: float
    tokens_per_second: float
    kernel: str
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=HERE / "demo_model", help="the model to quantize (default: the bundled one)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where results go; replaced (default: demo)")
    parser.add_argument(
        "--tokens", type=int, default=24 * 1024, help="of held-out text to evaluate on (default: 24576)"
    )
    parser.add_argument("--prompt", default="It was a fine morning, and", help="what the models continue")
    args = parser.parse_args()
    start = time.perf_counter()
    rows = compare_all(args.model, args.out, args.tokens, args.prompt)
    parts = [heading(args.model, args.tokens), table(rows), experts(args.out, args.tokens), planned(args.out)]
    report = "\n\n".join([*parts, texts(rows, args.prompt)])
    (args.out / "report.md").write_text(report + "\n", encoding="utf-8")
    (args.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    plot(rows, args.out / "report.png")
    print("\n" + report)
    print(
        f"\n{args.out}/report.md, report.png, results.json and the checkpoints, in {time.perf_counter() - start:.0f} s"
    )
    return 0


def compare_all(model_dir: Path, out: Path, tokens: int, prompt: str) -> list[Row]:
    """Quantize, load and measure every configuration; the original comes first."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = text_ids(model_dir, model_dir / "eval.txt")[:tokens]
    calibration = [(model_dir / "calibration.txt").read_text(encoding="utf-8")]
    prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    original = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)

    def measure(name: str, scheme: str, model: PreTrainedModel, kernel: str) -> Row:
        models.append(model)
        ppl = perplexity(model, ids, SEQ_LEN).perplexity
        loss = compare(model, original, ids, SEQ_LEN)
        true, packed, weights = linear_sizes(model)
        return Row(name, scheme, true, 8 * true / weights, packed, ppl, loss.kl, loss.top1_agreement, 0.0, kernel, "")

    models: list[PreTrainedModel] = []
    rows = [measure("original", "bfloat16", original, "torch (oneDNN)")]
    for name, method in tqdm(CONFIGURATIONS, desc="configurations", unit="model", leave=False):
        target = out / name.replace(" ", "-").lower()
        windows = {"samples": 64, "seq_len": SEQ_LEN, "progress": False}
        if isinstance(method, str):
            target = target.with_suffix(".gguf")
            quantize_gguf(model_dir, target, method, calibration, **windows)
        else:
            text_needed = calibration if method.needs == "moments" else None
            qkernels.quantize(model_dir, method, calibration=text_needed, save_to=target, **windows)
        model = qkernels.load(target, dtype=torch.bfloat16)
        schemes = sorted({str(layer.scheme) for layer in decoder_linears(model)})
        rows.append(measure(name, ", ".join(schemes), model, kernel_of(model)))
    speeds, written = decode_all(models, prompt_ids)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return [replace(row, tokens_per_second=s, text=t) for row, s, t in zip(rows, speeds, texts, strict=True)]


def decode_all(
    models: list[PreTrainedModel], prompt_ids: torch.Tensor, new: int = 48, rounds: int = 7
) -> tuple[list[float], list[torch.Tensor]]:
    """Greedy decoding of one sequence by every model: (tokens a second, all token ids).

    Rounds are interleaved, so that a busy moment of the machine hits all models alike; the median of a model counts, after
    a round to warm up.
    """
    seconds: list[list[float]] = [[] for _ in models]
    written: list[torch.Tensor] = []
    length = {"max_new_tokens": new, "min_new_tokens": new}
    with torch.inference_mode():
        for _ in tqdm(range(rounds + 1), desc="decoding", unit="round", leave=False, delay=2):
            written = []
            for model, taken in zip(models, seconds, strict=True):
                begin = time.perf_counter()
                written.append(model.generate(prompt_ids, do_sample=False, pad_token_id=0, **length)[0])
                taken.append(time.perf_counter() - begin)
    return [new / statistics.median(taken[1:]) for taken in seconds], written


def decoder_linears(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that every configuration quantizes: all linear ones but the head, which may be one with the embedding."""
    kinds, others = (torch.nn.Linear, QuantLinear), ("lm_head", "embed_tokens.table")
    return [m for name, m in model.named_modules() if isinstance(m, kinds) and not name.endswith(others)]


def linear_sizes(model: PreTrainedModel) -> tuple[int, int, int]:
    """(true bytes of those layers, bytes as the kernel reads them, number of their weights)."""
    layers = decoder_linears(model)
    true = sum(m.quant_tensor().nbytes if isinstance(m, QuantLinear) else model_bytes(m) for m in layers)
    packed = sum(packed_bytes(m) if isinstance(m, QuantLinear) else model_bytes(m) for m in layers)
    return true, packed, sum(m.in_features * m.out_features for m in layers)


def kernel_of(model: PreTrainedModel) -> str:
    layouts = {m.layout for m in decoder_linears(model)}
    return f"{', '.join(sorted(layouts))} ({extension.status().isa})"


def heading(model: Path, tokens: int) -> str:
    return (
        f"# {model.name}, quantized\n\n"
        f"Perplexity and KL over {tokens} held-out tokens in windows of {SEQ_LEN}; KL in nats a token from the original; "
        f"decoding of one sequence on {torch.get_num_threads()} threads of {platform.machine()}. MiB and bits per weight are "
        f"those of the linear layers in the file. "
        f"qkernels {qkernels.__version__}, torch {torch.__version__}."
    )


def table(rows: list[Row]) -> str:
    header = [
        "model",
        "scheme",
        "MiB",
        "bits/weight",
        "MiB read",
        "perplexity",
        "Δ %",
        "KL",
        "top-1 %",
        "tokens/s",
        "kernel",
    ]
    base = rows[0].perplexity
    cells = [
        [
            row.name,
            row.scheme,
            f"{row.true_bytes / 2**20:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.kernel_bytes / 2**20:.2f}",
            f"{row.perplexity:.3f}",
            f"{100 * (row.perplexity / base - 1):+.2f}",
            f"{row.kl:.1e}" if row.kl > 1e-12 else "0",
            f"{100 * row.top1:.2f}",
            f"{row.tokens_per_second:.0f}",
            row.kernel,
        ]
        for row in rows
    ]
    return text.table(header, cells)


def experts(out: Path, tokens: int) -> str:
    """The bundled mixture of experts: its linear layers and stacks of experts quantized, and what that loses."""
    source = HERE / "demo_moe"
    ids = text_ids(source, HERE / "demo_model" / "eval.txt")[:tokens]
    calibration = [(HERE / "demo_model" / "calibration.txt").read_text(encoding="utf-8")]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    lines = []
    for name, method in tqdm(EXPERTS, desc="experts", unit="model", leave=False):
        target = out / f"experts-{name.replace(' ', '-').lower()}"
        text_needed = calibration if method.needs == "moments" else None
        report = qkernels.quantize(
            source, method, calibration=text_needed, save_to=target, samples=64, seq_len=SEQ_LEN, progress=False
        )
        loss = compare(qkernels.load(target, dtype=torch.bfloat16), original, ids, SEQ_LEN)
        stacks = sum("experts" in module.name for module in report.modules)
        sizes = [f"{nbytes / 2**20:.2f}" for nbytes in (report.bytes_before, report.bytes_after)]
        lines.append([name, str(stacks), *sizes, f"{loss.kl:.1e}", f"{100 * loss.top1_agreement:.2f}"])
    header = ["method", "stacks of experts", "MiB before", "after", "KL", "top-1 %"]
    return f"## A mixture of 8 experts\n\n{text.table(header, lines)}"


def planned(out: Path) -> str:
    """What fits on a card, told from a config alone."""
    config = out / "plan" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **PLANNED}))
    found = plan(str(config), [PLANNED_FOR], context=8192)
    rest = found.to_markdown().partition("\n")[2].strip()  # without the heading, which is a path
    return f"## What of a Llama with 8 billion parameters fits on an {PLANNED_FOR}\n\n{rest}"


def text_ids(model_dir: Path, path: Path) -> torch.Tensor:
    """The token ids of a text, without special ones."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    found: torch.Tensor = tokenizer(
        path.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt", verbose=False
    )["input_ids"][0]
    return found


def texts(rows: list[Row], prompt: str) -> str:
    shown = [f"**{row.name}**: {' '.join(row.text.split())}" for row in rows]
    return f"## What they write after “{prompt}”\n\n" + "\n\n".join(shown)


COLORS = {"RTN": "#888888", "GPTQ": "#1b6ca8", "AWQ": "#c8553d", "AWQ+GPTQ": "#4f8a3c"}


def plot(rows: list[Row], path: Path) -> None:
    """Two panels: what each configuration loses against its size, and how fast it decodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quantized = rows[1:]
    figure, (loss, speed) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for row in quantized:
        color = COLORS[row.name.split()[1]]
        loss.scatter(row.bits_per_weight, row.kl, color=color, s=60, zorder=3)
        left = row.name.endswith("AWQ")  # beside GPTQ's, the labels would touch
        below = -14 if row.name == "int4 AWQ+GPTQ" else -3  # under Q4_K_M's
        side = {"xytext": (-8, -3), "ha": "right"} if left else {"xytext": (8, below)}
        loss.annotate(row.name, (row.bits_per_weight, row.kl), textcoords="offset points", fontsize=9, **side)
    loss.set(yscale="log", xlabel="bits per weight", ylabel="KL from the original, nats a token (log)")
    loss.set_title("What is lost (original: 16 bits, KL 0)", fontsize=11)
    loss.margins(x=0.25, y=0.15)
    loss.grid(alpha=0.3)
    names = [row.name for row in rows]
    colors = ["#333333", *(COLORS[row.name.split()[1]] for row in quantized)]
    bars = speed.barh(names, [row.tokens_per_second for row in rows], color=colors)
    speed.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    speed.invert_yaxis()
    speed.set_xlabel("tokens a second, one sequence")
    speed.set_title("How fast it decodes", fontsize=11)
    speed.margins(x=0.12)
    speed.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
