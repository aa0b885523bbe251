"""KL per token of other tools' checkpoints and of ours, each read by our readers and run by our kernels.

python -m benchmarks.quality.peers --tool gptqmodel=/venvs/gptqmodel/bin/python --tool hqq=… [--only hqq] [--keep DIR]
python -m benchmarks.quality.peers --mixture --tool …    (the bundled mixture of experts)
python -m benchmarks.quality.peers --encoder all-MiniLM-L6-v2/ --tool …    (1 - cosine of its sentence embeddings instead)

Every tool runs in an environment of its own (`with_<tool>.py` says which version was tried) and gets the calibration windows as
token ids, so that no tool tokenizes or samples by itself. A tool that is not given, or fails, keeps its line in the table with
the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qkernels import evaluate, inspect, load
from qkernels.cli.common import read_text
from qkernels.errors import QKernelsError
from qkernels.text import table
from qkernels.texts import calibration_windows, load_tokenizer, token_ids

from ...method import envelope, environment

HERE = Path(__file__).parent
ROOT = environment.ROOT
MODEL = ROOT / "examples" / "demo_model"
MIXTURE = environment.ROOT / "examples" / "demo_moe"
RESULTS = (
    environment.RESULTS / "quality-peers"
)  # no machine's: other tools' codes and ours are the same on all, up to rounding
KIND = "quality-peers"
OWN = "qkernels"
AIMED = "awq+gptq+model"  # GPTQ(scales="awq", aim="model")
SEQ_LEN, SAMPLES, EVAL_TOKENS = 256, 64, 24576
SENTENCE = 64
TOOL_SECONDS = 1800

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One way to quantize. `order`: none, group, static; GPTQModel's "static" is its group-aware order."""

    tool: str
    method: str
    bits: int = 4
    group_size: int = 128
    zeros: str = "none"
    order: str = "none"

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.tool, self.method, self.bits, f"g{self.group_size}", self.zeros, self.order)))


def gptq_cases(bits: int) -> list[Case]:
    found = []
    for zeros in ("none", "int"):
        for order in ("none", "static", "group"):
            tools = (OWN, "gptqmodel", "llmcompressor")
            # llm-compressor removed group order from 0.14 on; GPTQModel's static order exists once, symmetric
            found += [
                Case(t, "gptq", bits, 128, zeros, order) for t in tools if (t, order) != ("llmcompressor", "group")
            ]
    return found


CASES = (
    Case(OWN, "rtn"),
    Case(OWN, "rtn", zeros="int"),
    *gptq_cases(4),
    *(Case(OWN, "awq+gptq", zeros=zeros, order=order) for zeros in ("none", "int") for order in ("static", "group")),
    *(Case(OWN, AIMED, zeros=zeros, order=order) for zeros in ("none", "int") for order in ("static", "group")),
    *(Case(tool, "awq", zeros="int") for tool in (OWN, "gptqmodel", "llmcompressor")),
    Case("auto_round", "auto-round"),
    Case("auto_round", "auto-round", zeros="int"),
    *(Case(t, "hqq", b, g, "float") for b, g in ((4, 128), (4, 64), (3, 128), (3, 64), (2, 64)) for t in (OWN, "hqq")),
    *(Case(tool, "gptq", 3, 128, "int", "group") for tool in (OWN, "gptqmodel")),
    Case(OWN, "awq", 3, zeros="int"),
    *(
        Case(OWN, method, 3, zeros="int", order=order)
        for method in ("awq+gptq", AIMED)
        for order in ("static", "group")
    ),
)
# GPTQModel and the AWQ of all tools know decoders only.
ENCODER_CASES = tuple(
    case
    for case in CASES
    if case.tool in (OWN, "llmcompressor", "hqq")
    and (case.bits == 4 or case.method == "hqq")
    and "awq" not in case.method
)
# Files of experts with an order of their own are read by few tools: "static" leaves groups as they are.
MIXTURE_CASES = (
    *(Case(OWN, "rtn", zeros=zeros) for zeros in ("none", "int")),
    *(Case(OWN, m, zeros=zeros, order="static") for m in ("awq+gptq", AIMED) for zeros in ("none", "int")),
    *(
        Case(tool, "gptq", zeros=zeros, order=order)
        for zeros, order in (("none", "static"), ("none", "none"), ("int", "static"))
        for tool in (OWN, "gptqmodel", "llmcompressor")
    ),
)
ZEROS = {"none": "symmetric", "int": "integer zero points", "float": "float zero points"}


def make(case: Case, model: Path, windows: Tensor, out: Path, tools: Mapping[str, str]) -> float:
    """Quantize, each tool in a process of its own; returns the seconds it took, its start included.

    Raises:
        RuntimeError: the tool is not given, or failed; the last line it printed is the reason.
    """
    start = time.perf_counter()
    if case.tool not in tools:
        raise RuntimeError(f"no environment given (--tool {case.tool}=PYTHON)")
    stored = out.parent / "windows.safetensors"
    save_file({"windows": windows}, stored)
    script = HERE / f"with_{case.tool}.py"
    options = [
        "--method",
        case.method,
        "--bits",
        str(case.bits),
        "--group-size",
        str(case.group_size),
        "--order",
        case.order,
    ]
    options += [] if case.zeros == "none" else ["--asymmetric"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    environment.pop("PYTHONPATH", None)
    if case.tool == OWN:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [tools[case.tool], script, model.resolve(), stored, out.resolve(), *options], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TOOL_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1] if lines else 'no output'}"[:200])
    return time.perf_counter() - start


def measure(case: Case, out: Path, original: torch.nn.Module, ids: Tensor) -> dict[str, Any]:
    """Distance (KL per token; of an encoder 1 - cosine), top-1 agreement, with fp32 activations; bits a weight as stored."""
    if not hasattr(original, "lm_head"):
        return {
            "distance": embedding_distance(load(out, dtype=torch.float32), original, ids),
            "bits_per_weight": bits_of(out),
        }
    found = evaluate.compare(load(out, dtype=torch.float32), original, ids, SEQ_LEN, progress=False)
    return {"distance": found.kl, "top1": found.top1_agreement, "bits_per_weight": bits_of(out)}


def bits_of(out: Path) -> float | None:
    return inspect(out).bits_per_weight


def embedding_distance(model: torch.nn.Module, original: torch.nn.Module, ids: Tensor) -> float:
    """1 - mean cosine of the mean-pooled last hidden states, in windows of `SENTENCE` tokens."""
    windows = ids.flatten()[: ids.numel() // SENTENCE * SENTENCE].view(-1, SENTENCE)
    total = 0.0
    with torch.no_grad():
        for rows in windows.split(32):
            pair = [m(rows).last_hidden_state.double().mean(1) for m in (model, original)]
            total += float(torch.cosine_similarity(*pair).sum())
    return 1 - total / len(windows)


def run(
    cases: Sequence[Case], model: Path, tools: Mapping[str, str], keep: Path | None, out: Path, earlier: Rows
) -> Rows:
    """Measure cases one by one; their rows take the place of those in `earlier`, or come after them. A row has its own commit."""
    where = environment.describe(torch.device("cpu"))
    tokenizer = load_tokenizer(model)
    ids = token_ids(tokenizer, read_text(str(MODEL / "eval.txt")))[:EVAL_TOKENS]
    (windows,) = calibration_windows([read_text(str(MODEL / "calibration.txt"))], SAMPLES, SEQ_LEN, tokenizer)
    original = load(model, dtype=torch.float32)
    rows = {Case(**{f.name: row[f.name] for f in fields(Case)}): row for row in earlier}
    with TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for case in cases:
            row: dict[str, Any] = {**asdict(case), "commit": where["commit"]}
            target = folder / case.name
            try:
                if not (target / "config.json").is_file():
                    row["seconds"] = make(case, model, windows, target, tools)
                row |= measure(case, target, original, ids)
            except (RuntimeError, subprocess.TimeoutExpired, QKernelsError) as error:
                row["reason"] = str(error)[:300]
            rows[case] = row
            print(case.name, row.get("distance", row.get("reason")), flush=True)
            sealed = envelope.sealed(KIND, where, list(rows.values()), conditions(model))
            envelope.write(sealed, out.with_suffix(".json"))
    out.with_suffix(".md").write_text(markdown(list(rows.values()), model))
    return list(rows.values())


def conditions(model: Path) -> dict[str, Any]:
    return {"model": model.name, "calibration_windows": SAMPLES, "seq_len": SEQ_LEN, "eval_tokens": EVAL_TOKENS,
            "activations": "float32"}  # fmt: skip


def markdown(rows: Rows, model: Path) -> str:
    """One table for each width and kind of zero point, the best first."""
    measure = "KL" if model in (MODEL, MIXTURE) else "1 - cosine"
    what = {
        "KL": f"KL per token (nats) from the original over {EVAL_TOKENS:,} held-out tokens in windows of {SEQ_LEN}",
        "1 - cosine": f"1 - mean cosine of the mean-pooled embeddings with the original's, windows of {SENTENCE} tokens",
    }[measure]
    parts = [
        "# Other tools' quantizers beside ours",
        f"{model.name}: {what}, fp32 activations; {SAMPLES} × {SEQ_LEN} calibration tokens, the same for all (HQQ and RTN use "
        "none). Every checkpoint is read by our reader. Made by `python -m benchmarks.quality.peers`; the heads of its "
        "`with_*.py` name the versions. Seconds: a process from its start to its end, on a machine that other work may share; a "
        "dash was not timed.",
    ]
    parts += [f"## Least {measure}, ours and theirs", _bests(rows, measure)]
    head = ["tool", "method", "order", "group", "bits/weight", measure, "top-1 %", "s"]
    for bits, zeros in dict.fromkeys((row["bits"], row["zeros"]) for row in rows):
        chosen = [row for row in rows if (row["bits"], row["zeros"]) == (bits, zeros)]
        chosen.sort(key=lambda row: row.get("distance", float("inf")))
        title = f"## {bits} bits, {ZEROS[zeros]}"
        parts += [title, table(head, [_line(row) for row in chosen])]
    return "\n\n".join(parts) + "\n"


def best_of(rows: Rows) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each width, kind of zero point and group size that both sides have: the best row of ours and of the others."""
    pairs = []
    for bits, zeros, group in dict.fromkeys((row["bits"], row["zeros"], row["group_size"]) for row in rows):
        alike = [
            r for r in rows if (r["bits"], r["zeros"], r["group_size"]) == (bits, zeros, group) and "distance" in r
        ]
        ours, theirs = ([row for row in alike if (row["tool"] == OWN) == own] for own in (True, False))
        if ours and theirs:
            pairs.append((min(ours, key=_distance), min(theirs, key=_distance)))
    return pairs


def _distance(row: Mapping[str, Any]) -> float:
    return float(row["distance"])


def _bests(rows: Rows, measure: str) -> str:
    lines = []
    for pair in best_of(rows):
        named = [f"{row['distance']:.2e} ({_name(row)})" for row in pair]
        ratio = f"{_distance(pair[0]) / _distance(pair[1]):.2f}"
        lines.append([str(pair[0]["bits"]), ZEROS[pair[0]["zeros"]], str(pair[0]["group_size"]), *named, ratio])
    return table(["bits", "zeros", "group", f"{measure}, ours", f"{measure}, theirs", "ratio"], lines)


def _name(row: Mapping[str, Any]) -> str:
    order = f" {row['order']}" if "gptq" in row["method"] else ""
    return row["method"] + order if row["tool"] in (OWN, row["method"]) else f"{row['tool']} {row['method']}{order}"


def _line(row: Mapping[str, Any]) -> list[str]:
    order = row["order"] if "gptq" in row["method"] else ""
    start = [row["tool"], row["method"], order, str(row["group_size"])]
    if "distance" not in row:
        return [*start, "", "not measured: " + row["reason"].replace("|", "/"), "", ""]
    return [
        *start,
        f"{row['bits_per_weight']:.3f}",
        f"{row['distance']:.2e}",
        f"{100 * row['top1']:.2f}" if "top1" in row else "–",
        f"{row['seconds']:.0f}" if "seconds" in row else "–",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.peers", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tool", action="append", default=[], metavar="NAME=PYTHON", help="interpreter of a tool's environment"
    )
    parser.add_argument("--mixture", action="store_true", help="the bundled mixture of experts")
    parser.add_argument("--encoder", type=Path, help="a BERT-like model directory, instead of the bundled model")
    parser.add_argument("--only", default="", help="cases whose name contains this; other rows of --out stay")
    parser.add_argument("--keep", type=Path, help="keep the checkpoints here, and use those that are there")
    parser.add_argument("--out", type=Path, help="without a suffix (default: benchmarks/results/quality-peers/<model>)")
    args = parser.parse_args(argv)
    tools = {OWN: sys.executable} | dict(item.split("=", 1) for item in args.tool)
    cases, model = (MIXTURE_CASES, MIXTURE) if args.mixture else (CASES, MODEL)
    if args.encoder is not None:
        cases, model = ENCODER_CASES, args.encoder
    out = args.out or RESULTS / re.sub(r"[^a-z0-9]+", "-", model.name.lower())
    stored = out.with_suffix(".json")
    earlier = envelope.read(stored, KIND).rows if args.only and stored.is_file() else []
    chosen = [case for case in cases if args.only in case.name]
    run(chosen, model, tools, args.keep, out, earlier)
    return 0


if __name__ == "__main__":
    sys.exit(main())
