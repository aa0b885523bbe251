"""A whole block of experts (gate and up, SwiGLU, down, routing weights, sum) on the CPU: ours, torch's and the llama.cpps'.

    QKERNELS_GGML_LIB=… python -m benchmarks.kernels.experts --shape qwen3-30b-a3b --against torch --tokens 1 4 16 64
    QKERNELS_GGML_LIB=… python -m benchmarks.kernels.experts --shape mixtral-8x7b --against ggml --tokens 2048 --seconds 60

All candidates of a run have the same weights, 4 bits in groups of 128 with scales that fp16 holds, and the same rows and routes,
and take turns. Outputs are compared with fp32 products of the dequantized weights before anything is timed. The routes of one
sample differ from those of the next, so that experts come out of memory as they do in a decoder. Experts are random numbers;
two different ones take turns in the E places, which are memory of their own.

A run is against torch (16-bit experts), ggml, ik (ik_llama.cpp's ggml; QKERNELS_GGML_LIB names it, and a process holds one
ggml) or kt-kernel, so that not all are in memory at once; ours are in each. kt-kernel's threads spin: it and ours beside it are
processes of their own, which stand still between turns, with a thread less than there are cores. Rows of
runs of one commit are gathered in one file. Where other work shares the cores, wall time of two threads is the scheduler's: a
thread that waits for another one waits for whoever has its core. `--clock processor` is for such machines: one thread, and the
seconds of the processor that it had.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qkernels import ops
from qkernels.errors import UnsupportedProblem
from qkernels.layouts import get_layout
from qkernels.models.experts import experts_form
from qkernels.nn.experts import QuantExperts, QuantStack
from qkernels.nn.huge_pages import empty_on_huge_pages
from qkernels.ops.grouped import activate
from qkernels.scheme import QuantScheme
from qkernels.tensor import QuantTensor
from qkernels.text import table

from ..method import envelope, environment
from ..method.apart import Apart
from ..method.statistics import median_interval, ratio_interval
from ..method.timing import WallClock, interleaved
from ..peers import ggml, ggml_experts, kt
from .shapes import GEOMETRIES

KIND = "experts"
TOP_K = {"qwen3-30b-a3b": 8, "mixtral-8x7b": 2}
TOKENS = (1, 4, 16, 64, 256, 2048)
LOOP_TOKENS = (1, 4, 16)  # beyond, a loop over experts loses nothing
ROUTES = 16  # different ones, in turn
CHECKED = 5  # tokens whose outputs are compared
A16, A8 = "w4a16_g128", "w4a8_g128"
A8_SHORT = "w4a8_g32"  # kt-kernel's groups: the same weights, each scale four times
TORCH, REPACK, ROWS = "torch grouped_mm bf16", "ggml mul_mat_id, repack", "ggml mul_mat_id, rows"
IK_REPACK, IK_ROWS = "ik_llama.cpp moe_up_gate, repack", "ik_llama.cpp moe_up_gate, rows"
KT = "kt-kernel RAWINT4"
READ = "memory read"
LOOPS = {A16: f"loop of own {A16}", A8: f"loop of own {A8}"}
Route = tuple[Tensor, Tensor, Tensor]  # x bf16 [T, H], ids int64 [T, k], weights bf16 [T, k]
Run = Callable[[Route], Tensor]


@dataclass(frozen=True)
class Row:
    """One candidate at one number of tokens. `touched`: experts that have rows, the mean of the routes; `samples_us`: one a
    round, and entry i of all candidates of a cell is from round i."""

    shape: str
    experts: int
    top_k: int
    tokens: int
    routing: str
    against: str
    touched: float
    clock: str
    threads: int
    candidate: str
    samples_us: list[float]

    @property
    def cell(self) -> tuple[Any, ...]:
        return self.shape, self.tokens, self.routing, self.against, self.clock, self.threads


@dataclass(frozen=True)
class Target:
    """At `tokens`, the fastest of `peers` takes at least `factor` times as long as `ours`; `shape` None: on all."""

    ours: str
    peers: tuple[str, ...]
    tokens: tuple[int, ...]
    factor: float
    shape: str | None = None


GGML = (REPACK, ROWS)
TARGETS = (
    *(Target(ours, (TORCH,), (1, 4, 16), 3.5) for ours in (A16, A8)),
    *(Target(ours, (TORCH,), (256,), 2.0) for ours in (A16, A8)),
    *(Target(ours, (TORCH,), (2048,), 1.0) for ours in (A16, A8)),
    Target(A8, GGML, (1,), 1.2),
    Target(A8, GGML, (16, 64, 256, 2048), 1.8),
    *(Target(ours, (LOOPS[ours],), (1,), 1.5, "qwen3-30b-a3b") for ours in (A16, A8)),
    *(Target(ours, (LOOPS[ours],), (1,), 1.0, "mixtral-8x7b") for ours in (A16, A8)),
)


def random_expert(N: int, K: int, generator: torch.Generator) -> QuantTensor:
    codes = torch.randint(16, (N, K), generator=generator, dtype=torch.uint8)
    scales = (0.5 + torch.rand(N, K // 128, generator=generator)) / (4.6 * K**0.5)
    return QuantTensor(codes, scales.half(), None, None, QuantScheme.parse(A16))


def route(T: int, k: int, experts: int, hidden: int, skewed: bool, generator: torch.Generator) -> Route:
    """Rows and where they go: to k different experts of E, all as likely, or the r-th of them in proportion to 1 / r."""
    likely = torch.zeros(experts)
    if skewed:
        likely = -torch.log(1.0 + torch.randperm(experts, generator=torch.Generator().manual_seed(1)))
    noise = -torch.log(
        -torch.log(torch.rand(T, experts, generator=generator))
    )  # Gumbel: top-k draws without replacement
    scores, ids = torch.topk(likely + noise, k, dim=1)
    x = torch.randn(T, hidden, generator=generator).bfloat16()
    return x, ids, torch.softmax(scores, 1).bfloat16()


class Weights:
    """Two experts that take turns in the places of E."""

    def __init__(self, shape: str) -> None:
        g, generator = GEOMETRIES[shape], torch.Generator().manual_seed(0)
        self.shape, self.experts, self.hidden, self.width = shape, g.experts, g.hidden, g.intermediate
        self.pair = [
            (random_expert(2 * self.width, self.hidden, generator), random_expert(self.hidden, self.width, generator))
            for _ in range(2)
        ]
        self.stacks: dict[str, tuple[QuantStack, QuantStack]] = {}

    def each(self) -> list[tuple[QuantTensor, QuantTensor]]:
        return [self.pair[e % 2] for e in range(self.experts)]

    def shell(self) -> Any:
        """transformers' module with no weights yet."""
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = SimpleNamespace(
            num_experts=self.experts, hidden_size=self.hidden, moe_intermediate_size=self.width, hidden_act="silu",
            _experts_implementation="grouped_mm",
        )  # fmt: skip
        with torch.device("meta"):
            return Qwen3MoeExperts(config)

    def reference(self, given: Route) -> Tensor:
        """fp32."""
        x, ids, weights = given
        y = torch.zeros(x.shape)
        for parity, (gate_up, down) in enumerate(self.pair):
            share = torch.where(ids % 2 == parity, weights.float(), 0.0).sum(1, keepdim=True)
            rows = share.flatten().nonzero().flatten()
            inner = activate("silu", x[rows].float() @ gate_up.dequantize(torch.float32).T)
            y[rows] += share[rows] * (inner @ down.dequantize(torch.float32).T)
        return y

    def packed(self, scheme: str) -> tuple[QuantStack, QuantStack]:
        if scheme not in self.stacks:
            made = []
            for part in (0, 1):
                parsed = QuantScheme.parse(scheme)
                given = (
                    QuantTensor(
                        w.codes, w.scales.repeat_interleave(128 // parsed.group_length(w.K), 1), None, None, parsed
                    )
                    for w in (pair[part] for pair in self.each())
                )
                made.append(QuantStack.of(given, self.experts, None, "cpu", torch.bfloat16))
            self.stacks[scheme] = (made[0], made[1])
        return self.stacks[scheme]


def own(weights: Weights, scheme: str) -> Run:
    source = weights.shell()
    form = experts_form(source)
    assert form is not None
    stacks: dict[str, QuantStack] = dict(zip((form.up, form.down), weights.packed(scheme), strict=True))
    module = QuantExperts(source, form, stacks)
    return lambda given: module(*given)


def own_loop(weights: Weights, scheme: str) -> Run:
    """Expert after expert, the dense op for each projection, as transformers' eager loop has it."""
    products: list[list[Callable[[Tensor], Tensor]]] = []
    for stack in weights.packed(scheme):
        layout = get_layout(stack.layout)
        tiled = {buffer.name for buffer in layout.buffers if buffer.tiled}

        def product(e: int, stack: QuantStack = stack, tiled: set[str] = tiled) -> Callable[[Tensor], Tensor]:
            own = {n: t[e] if t is not None and n in tiled else t for n, t in stack.as_argument().buffers.items()}
            numbers = stack.as_argument().numbers
            return lambda x: ops.call(ops.GEMM[stack.layout], x, own, None, numbers)

        products.append([product(e) for e in range(weights.experts)])

    def run(given: Route) -> Tensor:
        x, ids, routing = given
        y = torch.zeros(x.shape)
        for e in ids.unique().tolist():
            rows, place = torch.where(ids == e)
            inner = activate("silu", products[0][e](x[rows]))
            y.index_add_(0, rows, products[1][e](inner).float() * routing[rows, place, None].float())
        return y.to(x.dtype)

    return run


def torch_grouped(weights: Weights) -> Run:
    """transformers' own forward, `torch.nn.functional.grouped_mm` in it."""
    module = weights.shell()
    for name, part in (("gate_up_proj", 0), ("down_proj", 1)):
        pair = [each[part].dequantize(torch.bfloat16) for each in weights.pair]
        stacked = torch.empty((weights.experts, *pair[0].shape), dtype=torch.bfloat16)
        for e in range(weights.experts):
            stacked[e] = pair[e % 2]
        setattr(module, name, torch.nn.Parameter(stacked, requires_grad=False))
    return lambda given: module(*given)


def of_ggml(weights: Weights, repack: bool) -> Run:
    block = ggml_experts.Block(weights.each(), repack)
    return lambda given: block(*given)


def not_held(against: str) -> str | None:
    """Why "ggml" (llama.cpp's) or "ik" (ik_llama.cpp's) cannot be asked here; None where it can."""
    if why := ggml.available(torch.device("cpu")):
        return why
    if ggml.is_ik() != (against == "ik"):
        held = "ik_llama.cpp's" if ggml.is_ik() else "llama.cpp's"
        return f"the library in {ggml.library_directory()} is {held}; set QKERNELS_GGML_LIB to the other's directory"
    return None


def own_anew(shape: str, scheme: str) -> Run:
    return own(Weights(shape), scheme)


def of_kt(shape: str, tokens: int) -> Run:
    block = kt.Block(Weights(shape).each(), TOP_K[shape], torch.get_num_threads(), tokens)
    return lambda given: block(*given)


def candidates(weights: Weights, against: str, tokens: int) -> Iterable[tuple[str, Callable[[], Run], float]]:
    """Name, maker, and how far its output may be from the exact one: 16-bit or 8-bit activations."""
    if against == "torch":
        yield A16, lambda: own(weights, A16), 0.01
        yield LOOPS[A16], lambda: own_loop(weights, A16), 0.01
        yield TORCH, lambda: torch_grouped(weights), 0.01
    if against == "kt":
        threads = torch.get_num_threads()
        for scheme in (A8, A8_SHORT):
            yield scheme, lambda scheme=scheme: Apart(partial(own_anew, weights.shape, scheme), threads), 0.03  # type: ignore[misc]
        yield KT, lambda: Apart(partial(of_kt, weights.shape, tokens), threads), 0.03
        return
    yield A8, lambda: own(weights, A8), 0.03
    if against == "ggml":
        yield LOOPS[A8], lambda: own_loop(weights, A8), 0.03
        yield REPACK, lambda: of_ggml(weights, True), 0.03
        yield ROWS, lambda: of_ggml(weights, False), 0.03
    if against == "ik":
        yield IK_REPACK, lambda: of_ggml(weights, True), 0.03
        yield IK_ROWS, lambda: of_ggml(weights, False), 0.03


def reading(weights: Weights) -> Run:
    """A sum over a GiB's next bytes, as many as the scheme of ours has in the experts that are hit, on huge pages as they are."""
    memory, place = empty_on_huge_pages([1 << 28], torch.float32).fill_(1), 0
    nbytes = 3 * weights.hidden * weights.width * (4 + 16 / 128) / 8

    def run(given: Route) -> Tensor:
        nonlocal place
        wanted = min(int(len(given[1].unique()) * nbytes / 4), len(memory))
        place = 0 if place + wanted > len(memory) else place
        place += wanted
        return memory[place - wanted : place].sum()

    return run


def checked(weights: Weights, runs: Mapping[str, tuple[Run, float]], k: int) -> None:
    """Compare outputs at a few tokens.

    Raises:
        SystemExit: one is not the product of these weights.
    """
    generator = torch.Generator().manual_seed(5)
    given = route(CHECKED, k, weights.experts, weights.hidden, False, generator)
    exact = weights.reference(given)
    for name, (run, allowed) in runs.items():
        off = float((run(given).float() - exact).norm() / exact.norm())
        print(f"{name}: {off:.4f} of the norm off")
        if not off < allowed:
            raise SystemExit(f"{name} computes something else: {off:.3g} of the norm off, at most {allowed} allowed")


def processor_sampler(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], float]:
    """The next call in turn, in seconds of the processor."""
    turns = cycle(calls)
    next(turns)()  # lazy set-up

    def sample() -> float:
        call, start = next(turns), time.process_time()
        call()
        return time.process_time() - start

    return sample


def measure(
    weights: Weights, runs: Mapping[str, tuple[Run, float]], tokens: int, routing: str, against: str, clock: str, seconds: float,
    rounds: int,
) -> list[Row]:  # fmt: skip
    k, generator = TOP_K[weights.shape], torch.Generator().manual_seed(tokens)
    count = ROUTES if tokens < 64 else 2
    routes = [route(tokens, k, weights.experts, weights.hidden, routing == "skewed", generator) for _ in range(count)]

    def prepare(run: Run) -> Callable[[], float]:
        if isinstance(run, Apart):
            return run.prepare([(given,) for given in routes])
        calls: list[Callable[[], Tensor]] = [partial(run, given) for given in routes]
        return processor_sampler(calls) if clock == "processor" else WallClock().prepare(calls)

    few = tokens in LOOP_TOKENS
    if few:  # the least that memory allows: a sum of as many bytes as the experts that are hit have in 4 bits
        runs = {**runs, READ: (reading(weights), 0.0)}
    samplers = {name: prepare(run) for name, (run, _) in runs.items() if few or name not in LOOPS.values()}
    samples = interleaved(samplers, rounds, time.monotonic() + seconds, min_rounds=min(rounds, 3))
    touched = sum(len(ids.unique()) for _, ids, _ in routes) / count
    return [
        Row(
            weights.shape, weights.experts, k, tokens, routing, against, touched, clock, torch.get_num_threads(), name,
            [round(1e6 * s, 1) for s in times],
        )
        for name, times in samples.items()
    ]  # fmt: skip


def to_markdown(rows: Sequence[Row]) -> str:
    """Times of each cell, and what the issue of speed asks for."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, {})[row.candidate] = row
    lines, goals = [], []
    for (shape, tokens, routing, against, clock, threads), found in cells.items():
        place = f"{threads}, {clock}"
        for name, row in found.items():
            median = median_interval(row.samples_us)
            spread = f"{median.median / 1e3:.3g} [{median.low / 1e3:.3g}, {median.high / 1e3:.3g}]"
            beside = []
            for ours in (A16, A8):
                if ours in found and name != ours:
                    beside.append(f"{_ratio(row, found[ours])[0]:.2f}")
                else:
                    beside.append("–")
            hit = f"{row.touched:.0f} of {row.experts}"
            lines.append([shape, place, str(tokens), routing, against, hit, name, spread, *beside])
        for target in TARGETS:
            peers = [found[name] for name in target.peers if name in found]
            if (
                tokens not in target.tokens
                or target.shape not in (None, shape)
                or target.ours not in found
                or not peers
            ):
                continue
            ratio, low, high = min(_ratio(peer, found[target.ours]) for peer in peers)
            word = "reached" if ratio >= target.factor else "**short**"
            word += ", within noise" if low < target.factor <= high else ""
            named = peers[0].candidate if len(peers) == 1 else "the faster of ggml's"
            told = f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
            goals.append([shape, place, str(tokens), routing, target.ours, named, f"≥ {target.factor}", told, word])
    head = [
        "shape",
        "threads, clock",
        "tokens",
        "routing",
        "run",
        "experts hit",
        "candidate",
        "ms",
        f"over {A16}",
        f"over {A8}",
    ]
    goal_head = [
        "shape",
        "threads, clock",
        "tokens",
        "routing",
        "ours",
        "against",
        "goal",
        "its time / ours",
        "verdict",
    ]
    return "\n\n".join(["# Blocks of experts on the CPU", table(goal_head, goals), "Times:", table(head, lines)])


def _ratio(peer: Row, ours: Row) -> tuple[float, float, float]:
    found = ratio_interval(peer.samples_us, ours.samples_us)
    return found.median, found.low, found.high


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.experts", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--shape", choices=TOP_K, default="qwen3-30b-a3b")
    parser.add_argument("--against", choices=("torch", "ggml", "ik", "kt"), default="torch")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--routing", nargs="+", choices=("random", "skewed"), default=["random", "skewed"])
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor: of one thread")
    parser.add_argument(
        "--threads", type=int, help="default: one a core; 1 by the processor's clock, and one less beside kt"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of sampling, all cells together")
    parser.add_argument("--rounds", type=int, default=21, help="at most so many samples of each (default: 21)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>/experts.json")
    args = parser.parse_args(argv)
    if args.against in ("ggml", "ik") and (why := not_held(args.against)):
        raise SystemExit(f"{args.against}: {why}")
    if args.against == "kt" and (
        why := kt.available() or ("its threads spin: --clock wall" if args.clock != "wall" else None)
    ):
        raise SystemExit(f"kt-kernel: {why}")
    if args.clock == "processor" and args.threads not in (None, 1):
        raise SystemExit(f"--clock processor is of one thread, got --threads {args.threads}")
    cores = torch.get_num_threads()
    default = 1 if args.clock == "processor" else max(1, cores - 1) if args.against == "kt" else cores
    torch.set_num_threads(args.threads or default)
    where = environment.describe(torch.device("cpu"))
    out = args.out or environment.RESULTS / where["machine"] / "experts.json"
    weights = Weights(args.shape)
    runs: dict[str, tuple[Run, float]] = {}
    with ExitStack() as processes, torch.inference_mode():
        for name, make, allowed in candidates(weights, args.against, max(CHECKED, *args.tokens)):
            try:
                run = make()
            except UnsupportedProblem as error:
                print(f"{name}: {error}")
                continue
            runs[name] = (processes.enter_context(run) if isinstance(run, Apart) else run), allowed
        checked(weights, runs, TOP_K[args.shape])
        rows = [Row(**row) for row in envelope.rows_so_far(out, KIND, where["commit"])]
        cells = [(tokens, routing) for tokens in args.tokens for routing in args.routing]
        for tokens, routing in cells:
            share = args.seconds / len(cells)
            made = measure(weights, runs, tokens, routing, args.against, args.clock, share, args.rounds)
            rows = [row for row in rows if row.cell != made[0].cell] + made
            for row in made:
                print(tokens, routing, f"{median_interval(row.samples_us).median:10.0f} us", row.candidate, flush=True)
            order = [*TOP_K], [*TOKENS]
            rows.sort(key=lambda r: (order[0].index(r.shape), r.against, r.tokens, r.routing))
            envelope.write(envelope.sealed(KIND, where, [asdict(row) for row in rows]), out)
    place = f"{where['cpu']}, {where['isa']}, torch {where['torch']}"
    about = f"{place}, qkernels {where['commit']}, {where['date']}."
    out.with_suffix(".md").write_text(f"{to_markdown(rows)}\n\n{about}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
