"""A whole model against llama.cpp: the same random weights, prompt and decode in tokens a second, interleaved in one run.

    python -m benchmarks.models.llama_cpp [--size 1b] [--prompt 128] [--new-tokens 32] [--rounds 9]

The model is `llama.py` with random 4-bit codes in groups of 32, head included, and llama.cpp reads the same codes and scales as a
Q4_0 file (`gguf_file.py`). Logits after the prompt and after the last new token are compared first, with those of our w4a16 mode:
llama.cpp quantizes activations to 8 bits, ours does so in the w4a8 mode only, and each rounds in its own way. Needs
llama-cpp-python; without it this says so and measures nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import QKernelsError
from qkernels.nn import QuantLinear
from qkernels.scheme import QuantScheme
from qkernels.text import table as markdown_table

from ..kernels import roofs
from ..method import envelope, environment
from ..method.statistics import median_interval, ratio_interval
from . import gguf_file
from .llama import SIZES, Llama

SCHEMES = ("w4a16_g32", "w4a8_g32")
VOCABULARY = 32000  # of the 1B model: its own 128256 would make embedding and head a third of all weights
# Relative error of the logits, to those without 8-bit activations. Rounding x to 8 bits is off by max |x| / 127 / sqrt(12): of
# normal values 5e-3 in groups of 32 (theirs), 9e-3 for a token of 2048 to 8192 (ours). After the 16 layers of the 1B model that
# was measured as 1.3e-2 and 2.1e-2, in the same proportion. Where q and k are rotated wrongly, the smallest mistake that a test
# makes on purpose, it is 3.1e-2 to 3.9e-2 after 4 and 8 layers.
SAME = 0.025


SPEED_HEAD = (
    "", "prompt tok/s", "decode tok/s", "% of memory read", "logits off by", "prompt: llama.cpp time / ours", "decode",
)  # fmt: skip


class LlamaCpp:
    """llama.cpp with one GGUF file, through llama-cpp-python's low-level functions."""

    def __init__(self, path: Path, positions: int, threads: int) -> None:
        self.c: Any = importlib.import_module("llama_cpp")
        self.quiet = self.c.llama_log_callback(lambda level, text, data: None)  # must outlive the library's use of it
        self.c.llama_log_set(self.quiet, None)
        self.c.llama_backend_init()
        model_params = self.c.llama_model_default_params()
        self.model = self.c.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = self.c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = positions, positions, min(positions, 512)
        params.n_threads = params.n_threads_batch = threads
        self.context = self.c.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")

    def reset(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)

    def logits(self, tokens: Sequence[int], vocabulary: int) -> Tensor:
        """Logits `[vocabulary]` after these tokens, which follow those seen since `reset`."""
        array = (self.c.llama_token * len(tokens))(*tokens)
        status = self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        pointer = self.c.llama_get_logits_ith(self.context, -1)
        memory = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * vocabulary)).contents
        return torch.frombuffer(memory, dtype=torch.float32)

    def close(self) -> None:
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)


@dataclass(frozen=True)
class SpeedRow:
    """Tokens a second, medians; `*_ratio` [median, low, high]: llama.cpp's time over ours, paired by round.

    `read_percent` is the median of what decoding reads a second, the packed weights once a token, in units of what a sum read
    right before and after.
    """

    candidate: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    read_percent: float
    logit_error: float
    prefill_ratio: list[float]
    decode_ratio: list[float]


def timed(
    logits: Callable[[list[int], int], Tensor],
    prompt: list[int],
    following: list[int],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, Tensor]:
    """(seconds of the prompt, seconds of a new token, logits `[2, vocabulary]` after the prompt and after the last token).

    The likeliest token is found after each step, but the ones of `following` are read: left to themselves, two programs that
    differ in a rounding soon read different texts, whose logits cannot be compared. `logits(tokens, first position)`.
    """
    start = clock()
    answer = logits(prompt, 0)
    int(answer.argmax())
    middle = clock()
    first = answer.clone()
    begin = clock()
    for i, token in enumerate(following):
        answer = logits([token], len(prompt) + i)
        int(answer.argmax())
    return middle - start, (clock() - begin) / len(following), torch.stack([first, answer])


def our_logits(model: Llama, step: Callable[..., Tensor]) -> Callable[[list[int], int], Tensor]:
    """The prompt goes through the model as it is, one token through `step`: the model again, or what torch.compile made of it."""

    def logits(tokens: list[int], at: int) -> Tensor:
        places = torch.arange(at, at + len(tokens))
        return (step if len(tokens) == 1 else model)(torch.tensor([tokens]), places)[0].float()  # as llama.cpp's are

    return logits


class Timed(NamedTuple):
    """One round of one candidate: seconds of the prompt, of a new token, and of reading a token's weights."""

    prefill: float
    decode: float
    reading: float


@dataclass(frozen=True)
class Comparison:
    """Rows (llama.cpp first), why a mode of ours has none; the bytes that a token reads, and the seconds a sum takes for them."""

    rows: list[SpeedRow]
    reasons: list[str]
    token_bytes: int
    reading: float


def compare(size: str, prompt: int, new_tokens: int, rounds: int, threads: int) -> Comparison:
    """Build the models, check and time them."""
    g = dataclasses.replace(SIZES[size], vocabulary=min(SIZES[size].vocabulary, VOCABULARY))
    positions = -(-(prompt + new_tokens) // 256) * 256  # llama.cpp rounds its context up to this
    device, models, reasons = torch.device("cpu"), {}, []
    with torch.inference_mode():
        for scheme in SCHEMES:
            torch.manual_seed(0)  # the same codes for each
            try:
                made = Llama(g, QuantScheme.parse(scheme), positions, torch.bfloat16, device, quantized_head=True)
                models[f"qkernels {scheme}"] = made
            except QKernelsError as error:
                reasons.append(f"{scheme}: {str(error).splitlines()[0]}")
        tokens, following = torch.randint(0, g.vocabulary, (prompt + new_tokens,)).split([prompt, new_tokens])
        texts = tokens.tolist(), following.tolist()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            gguf_file.write(next(iter(models.values())), path)
            peer = LlamaCpp(path, positions, threads)

            def theirs() -> tuple[float, float, Tensor]:
                peer.reset()
                return timed(lambda ids, _: peer.logits(ids, g.vocabulary), *texts)

            runs: dict[str, Callable[[], tuple[float, float, Tensor]]] = {"llama.cpp Q4_0": theirs}
            for name, model in models.items():
                # Calls in C++, too: those of 65 products and as many small kernels from Python take 0.2 to 0.5 ms a token.
                compiled: Callable[..., Tensor] = torch.compile(model, dynamic=False, options={"cpp_wrapper": True})
                steps: dict[str, Callable[..., Tensor]] = {name: model, f"{name}, compiled": compiled}
                for title, step in steps.items():
                    ours = our_logits(model, step)
                    runs[title] = lambda ours=ours: timed(ours, *texts)  # type: ignore[misc]
            times: dict[str, list[Timed]] = {name: [] for name in runs}
            token_bytes = _packed_bytes(next(iter(models.values())))
            memory = roofs.read_sampler(device, environment.cache_bytes(device))
            for i in range(rounds + 1):  # the first warms up: then torch.compile need not ask again what it found
                names = list(runs)
                logits: dict[str, Tensor] = {}
                with torch.compiler.set_stance("default", skip_guard_eval_unsafe=i > 0):
                    for name in names[i % len(names) :] + names[: i % len(names)]:
                        rate = memory()
                        first, each, logits[name] = runs[name]()
                        if i > 0:
                            times[name].append(Timed(first, each, token_bytes * (rate + memory()) / 2))
                check(logits, f"qkernels {SCHEMES[0]}")
            peer.close()
    reading = median_interval([t.reading for of_one in times.values() for t in of_one]).median
    return Comparison(_rows(times, logits, prompt), reasons, token_bytes, reading)


def _packed_bytes(model: Llama) -> int:
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return sum(layer.qweight.nbytes + layer.scales.nbytes for layer in layers)


def check(logits: dict[str, Tensor], base: str) -> None:
    """Raises RuntimeError unless all logits are those of `base`, within `SAME`."""
    for name, answer in logits.items():
        error = logit_error(logits[base], answer)
        if not error < SAME:
            raise RuntimeError(f"no match, no number: the logits of {name} are off those of {base} by {error:.4f}")


def logit_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a| over the vocabulary, of the position where it is largest."""
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1)).max())


def _rows(times: dict[str, list[Timed]], logits: dict[str, Tensor], prompt: int) -> list[SpeedRow]:
    names, rows = list(times), []
    base = times[names[0]]
    for name in names:
        of_one = times[name]
        prefill, decode = ([t[i] for t in of_one] for i in (0, 1))
        ratios = [ratio_interval([t[i] for t in base], [t[i] for t in of_one]) for i in (0, 1)]
        error = logit_error(logits[f"qkernels {SCHEMES[0]}"], logits[name])
        share = median_interval([100 * t.reading / t.decode for t in of_one]).median
        rows.append(
            SpeedRow(
                name, prompt / median_interval(prefill).median, 1 / median_interval(decode).median, share, error,
                *([r.median, r.low, r.high] for r in ratios),
            )
        )  # fmt: skip
    return rows


def to_markdown(found: Comparison) -> str:
    lines = [
        [
            r.candidate, f"{r.prefill_tokens_per_s:.1f}", f"{r.decode_tokens_per_s:.2f}", f"{r.read_percent:.0f}",
            f"{r.logit_error:.1e}",
            *("{:.2f} [{:.2f}, {:.2f}]".format(*ratio) for ratio in (r.prefill_ratio, r.decode_ratio)),
        ]
        for r in found.rows
    ]  # fmt: skip
    rate = found.token_bytes / found.reading / 1e9
    floor = (
        f"A token reads {found.token_bytes / 1e6:.0f} MB of packed weights: {found.reading * 1e3:.2f} ms at {rate:.1f} GB/s, the "
        "median of what a sum read before and after each run."
    )
    return (
        "\n\n".join([markdown_table(SPEED_HEAD, lines), floor, *(f"* unmeasured: {why}" for why in found.reasons)])
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.llama_cpp", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/llama-cpp.json")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is not here (pip install llama-cpp-python): nothing to compare with", file=sys.stderr)
        return 0
    device = torch.device("cpu")
    where = environment.describe(device)
    compared = compare(args.size, args.prompt, args.new_tokens, args.rounds, torch.get_num_threads())
    text = to_markdown(compared)
    out = args.out or environment.RESULTS / environment.machine_name(device) / "llama-cpp.json"
    conditions = {"size": args.size, "prompt": args.prompt, "new_tokens": args.new_tokens, **asdict(compared)}
    envelope.write(envelope.sealed("llama.cpp", where, conditions.pop("rows"), conditions), out)
    quiet = "" if where["quiet"]["quiet"] else "\nThis machine was not quiet: ratios hold better than rates.\n"
    about = f"{args.size}, prompt of {args.prompt}, {args.new_tokens} new tokens, {where['threads']} threads, {where['cpu']}, "
    out.with_suffix(".md").write_text(f"{text}\n{about}{where['date']}\n{quiet}", encoding="utf-8")
    print(text + quiet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
