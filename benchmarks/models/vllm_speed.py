"""Speed in vLLM on a CPU: the plug-in beside vLLM's own int4, zentorch and bf16, on the same weights, interleaved.

    python -m benchmarks.models.vllm_speed --python …/bin/python [--zentorch DIRECTORY] [--rounds 3]

`…/bin/python` is of an environment with vLLM in which this package is installed, so that its entry point is found; its code is
that of this tree. zentorch, since vLLM takes it wherever it can import it, lies in a folder of its own (`pip install --target
DIRECTORY --no-deps zentorch deprecated wrapt`). The model is a Llama of random weights that are rounded to w4a16_g128 first:
native files, a compressed-tensors file and a file in bfloat16 hold the same values. Two engines live at a time, ours and another,
on the same core, and compute in turn; their log-probabilities are compared with those of transformers in float32 before anything
is timed, and vLLM has to have taken the platform and the kernel that were meant.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qkernels import load, load_tokenizer, replace_linear, save
from qkernels.storage import CONFIG
from qkernels.text import table as markdown_table

from ..method import envelope, environment
from ..method.statistics import median_interval, ratio_interval

KIND = "vllm"
DEMO = environment.ROOT / "examples" / "demo_model"
CHILD = Path(__file__).with_name("vllm_engine.py")
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = (
    2048,
    5632,
    32,
    8,
    64,
)  # TinyLlama's, with 8 heads of keys instead of 4
NEVER = r"Using \w+ for mixed-precision linear"  # the log of vLLM where a kernel of its own takes packed weights
# How far from float32 log p may be, in its standard deviations, and as a share of what leaving out the last layer does to it:
# 8-bit activations in 12 layers were measured as 0.06, unrelated models are 1.1 apart (the mean of |difference| of two normals).
FARTHEST, SAME = 0.25, 0.5


class Candidate(NamedTuple):
    """What is started: its file, its `--quantization`, what its environment says, and what its log must and must not say."""

    file: str
    quantization: str | None = None
    settings: Mapping[str, str] = {}
    zentorch: bool = False
    says: str = ""
    never: str = "$^"


EXACT = {"VLLM_CPU_INT4_W4A8": "0"}  # otherwise activations may get 8 bits, unasked
WNA16, ZEN_WNA16 = "Using CPUWNA16LinearKernel", "Using ZentorchWNA16LinearKernel"
CANDIDATES = {
    "qkernels w4a16_g128": Candidate("w4a16_g128", quantization="qkernels", never=NEVER),
    "qkernels w4a8_g128": Candidate("w4a8_g128", quantization="qkernels", never=NEVER),
    "vLLM int4": Candidate("compressed-tensors", settings=EXACT, says=WNA16),
    "vLLM bf16": Candidate("bf16"),
    "zentorch w4a16": Candidate("compressed-tensors", settings=EXACT, zentorch=True, says=ZEN_WNA16, never="DA8W4"),
    "zentorch w4a8": Candidate("compressed-tensors", zentorch=True, says="zentorch_dynamic_qlinear for DA8W4"),
}
PAIRS = {
    "vLLM int4": "qkernels w4a16_g128",
    "zentorch w4a16": "qkernels w4a16_g128",
    "zentorch w4a8": "qkernels w4a8_g128",
    "vLLM bf16": "qkernels w4a16_g128",
}


class Task(NamedTuple):
    """Prompts of so many tokens and what comes after each; `tokens` is what a rate counts."""

    sequences: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        return self.sequences * (self.new if self.new > 1 else self.prompt)

    def request(self) -> dict[str, Any]:
        prompts = [[(7 * i + 3 * j) % 2000 + 5 for j in range(self.prompt)] for i in range(self.sequences)]
        return {"prompts": prompts, "new": self.new}


TASKS = {"batch 1": Task(1, 8, 33), "batch 8": Task(8, 8, 17), "prefill 512": Task(1, 512, 1)}


@dataclass(frozen=True)
class Row:
    """A peer and our candidate beside it. By task: tokens a second of each, medians, the prompts' time included; the peer's time
    over ours, [median, low, high], paired by round; all seconds. `far` is the distance of its log p from float32, `versions` are
    of its environment."""

    peer: str
    ours: str
    peer_tokens_per_s: dict[str, float]
    our_tokens_per_s: dict[str, float]
    ratio: dict[str, list[float]]
    peer_seconds: dict[str, list[float]]
    our_seconds: dict[str, list[float]]
    peer_far: float
    our_far: float
    versions: dict[str, str]


class Engine:
    """vLLM with one file, in a process of its own."""

    def __init__(self, name: str, python: str, files: Path, zentorch: Path | None, core: str) -> None:
        self.name, self.candidate = name, CANDIDATES[name]
        self.log = files / f"{name.replace(' ', '-')}.log"
        paths = [
            str(environment.ROOT),
            *([str(zentorch)] if self.candidate.zentorch else []),
        ]  # the plug-in of this tree
        settings = {**os.environ, **self.candidate.settings, "VLLM_CPU_OMP_THREADS_BIND": core}
        settings["PYTHONPATH"] = os.pathsep.join(paths)
        command = [python, str(CHILD), str(files / self.candidate.file)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *([self.candidate.quantization] if self.candidate.quantization else [])],
                env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.versions: dict[str, str] = {}

    def start(self) -> None:
        """Wait until it is there; raises RuntimeError if it does not come."""
        self.versions = self._answer()

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: {reason(self.log.read_text())}")
        return json.loads(line)

    def told(self) -> None:
        """Raises RuntimeError unless the log names the kernel that was meant."""
        log, platform = self.log.read_text(), self.versions["platform"]
        if (platform == "ZenCpuPlatform") != self.candidate.zentorch:
            raise RuntimeError(f"{self.name}: vLLM took {platform}")
        if not re.search(self.candidate.says, log) or re.search(self.candidate.never, log):
            found = ", ".join(sorted(set(re.findall(r"[Uu]sing [^\n]*", log)))) or "nothing"
            raise RuntimeError(
                f"{self.name}: the log must say {self.candidate.says!r} and not {self.candidate.never!r}, got {found}"
            )

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def reason(log: str) -> str:
    """The last error of a log, in one line."""
    errors = re.findall(r"^(?:\([^)]*\) )?(?:\S+ \S+ \S+ \[[^\]]*\] )?(\w*(?:Error|Exception): .*)$", log, re.MULTILINE)
    return str(errors[-1]) if errors else (log.strip().splitlines() or ["it ended and said nothing"])[-1]


def write_files(out: Path, layers: int) -> tuple[Tensor, float]:
    """One model in the four files that the candidates read. Returns log-probabilities `[tokens - 1]` of `text` in float32, and
    how far from them those without the last layer are."""
    config = LlamaConfig.from_pretrained(DEMO)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = HIDDEN, INTERMEDIATE, layers
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = HEADS, KV_HEADS, HEAD_DIM
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokenizer = load_tokenizer(DEMO)
    quantized = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    quantized.load_state_dict(model.state_dict())
    replace_linear(quantized, "w4a16_g128")
    save(quantized, out / "w4a16_g128")
    shutil.copytree(out / "w4a16_g128", out / "w4a8_g128")  # the same bytes under another name
    said = (out / "w4a8_g128" / CONFIG).read_text(encoding="utf-8")
    (out / "w4a8_g128" / CONFIG).write_text(said.replace("w4a16_g128", "w4a8_g128"), encoding="utf-8")
    save(load(out / "w4a16_g128"), out / "compressed-tensors", format="compressed-tensors")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data.copy_(quantized.get_submodule(name).weight)
    model.save_pretrained(out / "bf16")
    for name in ("w4a16_g128", "w4a8_g128", "compressed-tensors", "bf16"):
        tokenizer.save_pretrained(out / name)
    tokens = torch.tensor([text()])
    model = load(out / "w4a16_g128", dtype="float32")
    exact = log_likelihood(model, tokens)
    del model.model.layers[-1]
    return exact, distance(exact, log_likelihood(model, tokens))


def log_likelihood(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logs: Tensor = model(tokens, use_cache=False).logits.log_softmax(-1)[0, :-1]
    return logs.gather(-1, tokens[0, 1:, None])[:, 0]


def text() -> list[int]:
    tokens: list[int] = torch.randint(5, 2000, (128,), generator=torch.Generator().manual_seed(1)).tolist()
    return tokens


def distance(exact: Tensor, found: Tensor) -> float:
    """Mean |Δ log p|, in standard deviations of log p over the text."""
    return float((found - exact).abs().mean() / exact.std())


def check(name: str, exact: Tensor, found: Tensor, other: float) -> float:
    """The distance; raises RuntimeError if it is as that of `other` models."""
    far = distance(exact, found)
    if not far < min(FARTHEST, SAME * other):
        raise RuntimeError(
            f"no match, no number: log p of {name} is {far:.3f} deviations from float32, and {other:.3f} without a layer"
        )
    return far


@dataclass(frozen=True)
class Comparison:
    """Rows, why a peer has none, and how far from float32 log p without the last layer is."""

    rows: list[Row]
    reasons: list[str]
    without_a_layer: float


def compare(
    peers: Sequence[str], python: str, zentorch: Path | None, layers: int, rounds: int, core: str,
    progress: Callable[[Comparison], None],
) -> Comparison:  # fmt: skip
    """Write the files; start, check and time one pair after the other, and tell `progress` after each."""
    rows: list[Row] = []
    reasons: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        exact, other = write_files(Path(directory), layers)
        for peer in peers:
            engines: list[Engine] = []
            try:
                if CANDIDATES[peer].zentorch and zentorch is None:
                    raise RuntimeError(f"{peer}: --zentorch names no folder that has it")
                for name in (PAIRS[peer], peer):
                    engines.append(Engine(name, python, Path(directory), zentorch, core))
                for engine in engines:
                    engine.start()
                rows.append(pair(engines[0], engines[1], exact, other, rounds))
            except RuntimeError as error:
                reasons.append(str(error))
                print(error, file=sys.stderr, flush=True)
            finally:
                for engine in engines:
                    engine.close()
            progress(Comparison(rows, reasons, other))
    return Comparison(rows, reasons, other)


def pair(ours: Engine, peer: Engine, exact: Tensor, other: float, rounds: int) -> Row:
    """Check and time two engines; raises RuntimeError if one is not what was meant, or computes another model."""
    far = []
    for engine in (ours, peer):
        found = torch.tensor(engine.ask({"likelihoods": text()}))
        engine.told()
        far.append(check(engine.name, exact, found, other))
        engine.ask({**TASKS["batch 8"].request(), "new": 4})  # warms up
    seconds: dict[str, dict[str, list[float]]] = {e.name: {task: [] for task in TASKS} for e in (ours, peer)}
    for i in range(rounds):
        for task, work in TASKS.items():
            for engine in (ours, peer) if i % 2 else (peer, ours):
                seconds[engine.name][task].append(engine.ask(work.request()))
    return row(ours, peer, seconds[ours.name], seconds[peer.name], far)


def row(
    ours: Engine, peer: Engine, our_seconds: dict[str, list[float]], peer_seconds: dict[str, list[float]],
    far: Sequence[float],
) -> Row:  # fmt: skip
    def rates(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return {task: work.tokens / median_interval(seconds[task]).median for task, work in TASKS.items()}

    ratios = {task: ratio_interval(peer_seconds[task], our_seconds[task]) for task in TASKS}
    return Row(
        peer.name, ours.name, rates(peer_seconds), rates(our_seconds),
        {task: [r.median, r.low, r.high] for task, r in ratios.items()}, peer_seconds, our_seconds, far[1], far[0],
        peer.versions,
    )  # fmt: skip


def to_markdown(found: Comparison) -> str:
    names = [f"{what}, {task}" for task in TASKS for what in ("its tok/s", "ours", "its time / ours")]
    lines = []
    for r in found.rows:
        cells = []
        for task in TASKS:
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*r.ratio[task])
            cells += [f"{r.peer_tokens_per_s[task]:.1f}", f"{r.our_tokens_per_s[task]:.1f}", ratio]
        lines.append([r.peer, r.ours, *cells, f"{r.peer_far:.3f}, {r.our_far:.3f}"])
    header = ["", "beside", *names, "log p off by, its and ours"]
    without = f"Without its last layer log p of the model is off by {found.without_a_layer:.3f} (standard deviations of log p)."
    return (
        "\n\n".join([markdown_table(header, lines), without, *(f"* unmeasured: {why}" for why in found.reasons)]) + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.vllm_speed", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--python", required=True, help="the interpreter of an environment with vLLM and this package")
    parser.add_argument("--zentorch", type=Path, help="a folder that zentorch was installed into, and nothing else")
    parser.add_argument("--peers", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--layers", type=int, default=8, help="of 45 million weights each (default: 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", default="0", help="where all engines compute (default: 0)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/vllm-speed.json")
    args = parser.parse_args(argv)
    where = environment.describe(torch.device("cpu"))
    out = args.out or environment.RESULTS / where["machine"] / "vllm-speed.json"
    conditions = {
        "layers": args.layers, "core": args.core, "rounds": args.rounds, "tasks": {k: v._asdict() for k, v in TASKS.items()},
    }  # fmt: skip

    def write(found: Comparison) -> None:
        more = {"reasons": found.reasons, "without_a_layer": found.without_a_layer}
        envelope.write(envelope.sealed(KIND, where, [asdict(r) for r in found.rows], conditions | more), out)
        about = (
            f"{args.layers} layers of 45 million weights, one core, eager, medians of {args.rounds} rounds in pairs. "
            f"{where['cpu']}, qkernels {where['commit']}, {where['date']}.\n"
        )
        out.with_suffix(".md").write_text(f"{to_markdown(found)}\n{about}", encoding="utf-8")

    found = compare(args.peers, args.python, args.zentorch, args.layers, args.rounds, args.core, write)
    print(to_markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
