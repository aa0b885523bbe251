"""A GGUF file run whole, ours beside llama.cpp: prompt and decode in tokens a second, time of loading, memory at the peak.

    python -m benchmarks.models.gguf_whole speed FILE.gguf [--activations int8] [--eager] [--rounds 5]
    python -m benchmarks.models.gguf_whole load FILE.gguf [--packed DIR] [--rounds 3]

`gguf_quantizing --make` and `qkernels quantize --type Q4_K_M` make the file of a Llama with random weights; `qkernels pack FILE
DIR` the directory. All read the same file.

`speed` interleaves in one process, after their logits were compared: llama.cpp; the packed layers of `qkernels.load` in the
decoder of `llama.py`, which is nothing but what costs time, as it is and with its layers compiled; and the model of
`qkernels.load` as it is, through `generate`. llama.cpp has activations in 8 bits, one scale for 256 of them.

`load` takes a process for each and tells the median of several, with the file in the page cache; memory is what the process has
of its own (RssAnon), files that are only mapped aside, beyond what it had when all was imported.

Needs llama-cpp-python; without it this says so and measures nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoint import load
from qkernels.checkpoint.activations import Activations
from qkernels.nn import packed_bytes
from qkernels.nn.packed import PackedModule
from qkernels.text import table

from ..kernels import roofs
from ..kernels.shapes import Geometry
from ..method import envelope, environment
from ..method.statistics import median_interval, ratio_interval
from .llama import Block, Llama
from .llama_cpp import SPEED_HEAD, LlamaCpp, Timed, logit_error, our_logits, timed

KIND = "gguf-whole"
# Relative error of logits at two positions, to our 16-bit ones (or int8 ones, where those are asked for). All but the first are
# rounded to 8 bits before every product, in other ways, and a model of random weights carries that on: llama.cpp is off by 7.7e-2
# on 16 layers, 3.1e-2 on 4, our own int8 model by 0.11 where attention is computed in another order. Logits of other weights or
# tokens are off by 1.4. That files mean the same in both is what tests/test_gguf_written.py shows, in F32 within 1e-4.
SAME = 0.2
CPU = torch.device("cpu")


class Beside(nn.Module):
    """Layers of one input, their outputs in one row."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


class LoadedBlock(Block):
    """A decoder layer that `load` made, its modules in `llama.py`'s decoder; the types of gate and up may differ."""

    def __init__(self, layer: Any, g: Geometry, positions: int, dtype: torch.dtype) -> None:
        super().__init__(g, None, positions, dtype, torch.device("meta"))
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Beside(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o, self.gate_up, self.up, self.down = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.norm1, self.norm2 = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
        for name in ("keys", "values"):
            setattr(self, name, torch.zeros(1, g.kv_heads, positions, g.head_dim, dtype=dtype))

    def gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_up(x), self.up(x)


class Loaded(Llama):
    """The modules of a Llama that `load` made, in the decoder of `llama.py`."""

    def __init__(self, model: Any, positions: int) -> None:
        g = geometry_of(model.config)
        base = model.config.rope_parameters["rope_theta"]
        super().__init__(replace(g, layers=0, vocabulary=1), None, positions, model.dtype, CPU, rope_base=base)
        self.g, self.inner, self.epsilon = g, model.model.embed_tokens, model.config.rms_norm_eps
        self.blocks = nn.ModuleList(LoadedBlock(layer, g, positions, model.dtype) for layer in model.model.layers)
        for block in self.blocks:
            assert isinstance(block, LoadedBlock)
            block.epsilon = self.epsilon
        self.norm, self.head = model.model.norm.weight.detach(), model.lm_head

    def rows(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.inner(tokens)
        return found


def geometry_of(config: Any) -> Geometry:
    return Geometry(
        "of the file", config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size,
    )  # fmt: skip


class _Clock:
    """A streamer of `generate` that notes when each token came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, list[float]()

    def put(self, value: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def generated(
    model: Any, prompt: Tensor, new_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """(seconds of the prompt, seconds of a new token) as a user has them."""
    streamer = _Clock(clock)
    began = clock()
    model.generate(
        prompt[None], max_new_tokens=new_tokens + 1, min_new_tokens=new_tokens + 1, do_sample=False, streamer=streamer,
        pad_token_id=0,
    )  # fmt: skip
    first, last = streamer.times[1], streamer.times[-1]  # the prompt is streamed, too
    return first - began, (last - first) / (len(streamer.times) - 2)


def with_compiled_layers(bare: Loaded) -> Loaded:
    """The same modules. One layer at a time: all layers of the same types share what is compiled for one."""
    made = copy.copy(bare)
    made._modules = dict(bare._modules)
    compiled: list[Any] = [torch.compile(block, dynamic=False, options={"cpp_wrapper": True}) for block in bare.blocks]
    made.blocks = nn.ModuleList(compiled)
    return made


def hand_written(model: Any, tokens: Tensor, following: Tensor) -> Tensor:
    """Logits `[2, vocabulary]` of the loaded model, as `timed` has them, through its own cache."""
    found = model(tokens[None], use_cache=True)
    answers = [found.logits[0, -1]]
    for token in following:
        found = model(token.view(1, 1), past_key_values=found.past_key_values, use_cache=True)
    return torch.stack([answers[0], found.logits[0, -1]]).float()


def measure(
    path: Path,
    activations: Activations,
    prompt: int,
    new_tokens: int,
    rounds: int,
    threads: int,
    eager: bool = False,
    packed: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, llama.cpp's first, and what they depend on.

    Raises:
        RuntimeError: logits differ.
    """
    positions = -(-(prompt + new_tokens) // 256) * 256  # llama.cpp rounds its context up to this
    torch.set_num_threads(1)  # not what is measured here: on a machine that others use, two threads wait for each other
    model = load(packed or path, dtype=torch.bfloat16, activations=activations)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        bare = Loaded(model, positions)
        generator = torch.Generator().manual_seed(0)
        tokens, following = torch.randint(1, bare.g.vocabulary, (prompt + new_tokens,), generator=generator).split(
            [prompt, new_tokens]
        )
        texts = tokens.tolist(), following.tolist()
        peer = LlamaCpp(path, positions, threads)

        def theirs() -> tuple[float, float, Tensor]:
            peer.reset()
            return timed(lambda ids, _: peer.logits(ids, bare.g.vocabulary), *texts, clock)

        ours = {f"qkernels, {activations}": our_logits(bare, bare)}
        if not eager:
            ours[f"qkernels, {activations}, layers compiled"] = our_logits(bare, with_compiled_layers(bare))
        whole = f"qkernels.load + generate, {activations}"
        logits = {name: timed(run, *texts)[2] for name, run in ours.items()}
        logits["llama.cpp"] = theirs()[2]
        logits[whole] = hand_written(model, tokens, following)
        generated(model, tokens, 2)
        errors = {name: logit_error(logits[f"qkernels, {activations}"], answer) for name, answer in logits.items()}
        if unlike := {name: error for name, error in errors.items() if not error < SAME}:
            raise RuntimeError(f"no match, no number: relative errors of logits {unlike}")
        runs: dict[str, Callable[[], tuple[float, float]]] = {"llama.cpp": lambda: theirs()[:2]}
        for name, run in ours.items():
            runs[name] = lambda run=run: timed(run, *texts, clock)[:2]  # type: ignore[misc]
        runs[whole] = lambda: generated(model, tokens, new_tokens, clock)
        read = sum(packed_bytes(m) for m in bare.modules() if isinstance(m, PackedModule) and m is not table_of(model))
        memory = roofs.read_sampler(CPU, environment.cache_bytes(CPU))
        times: dict[str, list[Timed]] = {name: [] for name in runs}
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            for i in range(rounds):
                names = list(runs)
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    rate = memory()
                    first, each = runs[name]()
                    times[name].append(Timed(first, each, read * (rate + memory()) / 2))
        peer.close()
    base, rows = times["llama.cpp"], []
    for name, taken in times.items():
        prefill, decode = (median_interval([t[i] for t in taken]).median for i in (0, 1))
        ratios = [ratio_interval([t[i] for t in base], [t[i] for t in taken]) for i in (0, 1)]
        rows.append(
            {
                "candidate": name, "prompt_tokens_per_s": prompt / prefill, "decode_tokens_per_s": 1 / decode,
                "read_percent": 100 * median_interval([t.reading / t.decode for t in taken]).median,
                "logit_error": errors[name], "prompt_ratio": [ratios[0].median, ratios[0].low, ratios[0].high],
                "decode_ratio": [ratios[1].median, ratios[1].low, ratios[1].high],
            }
        )  # fmt: skip
    reading = median_interval([t.reading for taken in times.values() for t in taken]).median
    return rows, {"token_bytes": read, "reading": reading}


def table_of(model: Any) -> nn.Module | None:
    """The packed weight of an embedding that is no head, of which a token reads a row."""
    found = getattr(model.model.embed_tokens, "table", None)
    return None if found is model.lm_head else found


# --- loading -----------------------------------------------------------------------------------------------------------


@contextmanager
def watched(peaks: list[int]) -> Any:
    """Appends what the process has of its own, in bytes, every 5 ms."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peaks.append(anonymous())

    peaks.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load_once(candidate: str, path: Path, threads: int) -> dict[str, Any]:
    """Seconds until a model is there, and what memory it takes until it has read a prompt of 128 and answered 4 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    generated(LlamaForCausalLM(small), torch.arange(4), 1)  # imports what the first call of it does
    tokens, peaks = list(range(1, 129)), list[int]()
    _ = torch.eye(64) @ torch.eye(64)
    base = anonymous()
    with watched(peaks):
        began, spent = time.perf_counter(), time.process_time()
        if candidate == "llama.cpp":
            peer = LlamaCpp(path, 256, threads)
            seconds, spent = time.perf_counter() - began, time.process_time() - spent
            for text in (tokens, *[[i] for i in range(4)]):
                peer.logits(text, 1)
        else:
            model = load(path, dtype=torch.bfloat16)
            seconds, spent = time.perf_counter() - began, time.process_time() - spent
            loaded = anonymous() - base
            generated(model, torch.tensor(tokens), 4)
            del model
    if candidate == "llama.cpp":
        loaded = peaks[-1] - base
    return {"seconds": seconds, "processor": spent, "peak": max(peaks) - base, "loaded": loaded}


def loads(path: Path, packed: Path | None, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each, llama.cpp's first."""
    runs = {"llama.cpp": path, "qkernels.load": path} | ({"qkernels.load, packed": packed} if packed else {})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, at in runs.items():
            command = [sys.executable, "-m", "benchmarks.models.gguf_whole", "once", str(at), "--candidate", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows, nbytes = [], path.stat().st_size
    base = [one["seconds"] for one in found["llama.cpp"]]
    for name, several in found.items():
        seconds = [one["seconds"] for one in several]
        ratio = ratio_interval(base, seconds)
        rows.append(
            {
                "candidate": name, "seconds": median_interval(seconds).median, "every": seconds,
                "ratio": [ratio.median, ratio.low, ratio.high],
                "processor": min(one["processor"] for one in several),
                **{part: max(one[part] for one in several) for part in ("peak", "loaded")}, "file": nbytes,
            }
        )  # fmt: skip
    return rows


# --- telling -----------------------------------------------------------------------------------------------------------


def told(rows: list[dict[str, Any]]) -> str:
    if "seconds" in rows[0]:
        head = [
            "",
            "seconds to load",
            "llama.cpp's time / it",
            "processor seconds",
            "memory loaded, of the file",
            "at the peak",
        ]
        return table(
            head,
            [
                [
                    r["candidate"], f"{r['seconds']:.2f}", "{:.2f} [{:.2f}, {:.2f}]".format(*r["ratio"]),
                    f"{r['processor']:.2f}", f"{r['loaded'] / r['file']:.2f}", f"{r['peak'] / r['file']:.2f}",
                ]
                for r in rows
            ],
        )  # fmt: skip
    return table(
        SPEED_HEAD,
        [
            [
                r["candidate"], f"{r['prompt_tokens_per_s']:.1f}", f"{r['decode_tokens_per_s']:.2f}", f"{r['read_percent']:.0f}",
                f"{r['logit_error']:.1e}",
                *("{:.2f} [{:.2f}, {:.2f}]".format(*r[part]) for part in ("prompt_ratio", "decode_ratio")),
            ]
            for r in rows
        ],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.gguf_whole", description=__doc__)
    parser.add_argument("what", choices=("speed", "load", "once"), help="once: one candidate of load, in this process")
    parser.add_argument("file", type=Path)
    parser.add_argument("--activations", choices=("16bit", "int8"), default="16bit", help="ours (speed)")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without compiled layers (speed)")
    parser.add_argument(
        "--processor",
        action="store_true",
        help="one thread each, in seconds of the processor: on a machine that is shared",
    )
    parser.add_argument("--packed", type=Path, help="what qkernels pack made of the file: ours is loaded from there")
    parser.add_argument("--candidate", default="qkernels.load", help="of once")
    parser.add_argument("--out", type=Path, help="the rows as JSON, and the table beside them")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is not here (pip install llama-cpp-python): nothing to compare with", file=sys.stderr)
        return 0
    threads = 1 if args.processor else torch.get_num_threads()
    if args.what == "once":
        print(json.dumps(load_once(args.candidate, args.file, threads)))
        return 0
    where = environment.describe(CPU)
    about: dict[str, Any] = {"file": args.file.name, "bytes": args.file.stat().st_size}
    if args.what == "load":
        rows = loads(args.file, args.packed, args.rounds, threads)
    else:
        clock = time.process_time if args.processor else time.perf_counter
        rows, more = measure(
            args.file,
            args.activations,
            args.prompt,
            args.new_tokens,
            args.rounds,
            threads,
            args.eager,
            args.packed,
            clock,
        )
        about |= {"threads": threads, "clock": "processor" if args.processor else "wall"}
        about |= {"prompt": args.prompt, "new_tokens": args.new_tokens, **more}
    text = told(rows)
    if args.out:
        envelope.write_with_table(envelope.sealed(KIND, where, rows, about), args.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
