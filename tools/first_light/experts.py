"""A block of experts: our ops, bf16 `grouped_mm` of torch, and humming-kernels' indexed product, one JSON line a row. And
its first product, sorted, in every tile of `gemm_sm80` and `gemm_sm90` that the card has: what the choice among them is worth.

    python -m tools.first_light.experts --device cuda:0 [--shapes HxIxExk,…] [--tokens 1,4,…] [--seconds S]

Each is checked against a float64 block of the weights in bf16 before it is timed: no match, no number. Calls go round several
batches, whose experts differ, so that the weights of few tokens do not stay in a cache. humming is given rows that are aligned
already, which we do and which is timed for us.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

# hidden, width, experts, experts of a token: Qwen3-30B-A3B and Mixtral 8x7B.
SHAPES = "2048x768x128x8,4096x14336x8x2"
TOKENS = "1,4,16,64,256,2048,8192"
BATCHES = 8
TILES = (
    ("gemm_sm80", 1, (32, 64, 128)),
    ("gemm_sm90", 3, (64, 128, 256)),
)  # Path of csrc/cuda/problem.h, and tokens of a block
MOST_ROWS_OF_DECODE = 32  # of an expert: kMaxDecodeTokens of csrc/cuda/blocks.h
MOST_ERROR = 4 * 2**-8  # of the norm: four roundings to bf16; another expert is off by 1.4


@dataclass(frozen=True)
class Mixture:
    """One layer's weights in the hands of all candidates: our buffers, and the same numbers in bf16."""

    hidden: int
    width: int
    count: int
    per_token: int
    layout: str
    stacks: tuple[Any, Any]  # `ops.grouped.Stack`
    weights: tuple[Any, Any]  # one `QuantTensor` an expert
    plain: tuple[Any, Any]  # bf16 [E, N, K]


@dataclass(frozen=True)
class Batch:
    x: Any  # bf16 [T, H]
    ids: Any  # [T, k]
    routing: Any  # fp32 [T, k]


Run = Callable[[Batch], Any]


def packed(experts: Sequence[Any], layout: str) -> Any:
    """The stack of these weights in a layout."""
    import torch

    from qkernels.layouts import get_layout
    from qkernels.ops.grouped import Stack

    value, first = get_layout(layout), experts[0]
    made = [value.pack(weight) for weight in experts]
    each: dict[str, list[Any]] = {name: [p[name] for p in made] for name in made[0]}
    buffers = {name: None if ts[0] is None else torch.stack(ts) for name, ts in each.items()}
    return Stack(buffers, None, value.numbers_of(first.N, first.K, first.scheme), first.K)


def mixture(hidden: int, width: int, count: int, per_token: int, scheme: str, device: Any) -> Mixture:
    import torch

    from qkernels import QuantScheme, QuantTensor
    from qkernels.kernels.catalogue import Problem, arch_of, select

    parsed, generator = QuantScheme.parse(scheme), torch.Generator(device).manual_seed(0)
    stacks, weights, plain, layout = [], [], [], ""
    for N, K in ((2 * width, hidden), (hidden, width)):
        layout = select(Problem(N, K, parsed, torch.bfloat16, arch_of(device), count)).layout
        made = []
        for _ in range(count):
            codes = torch.randint(parsed.max_code + 1, (N, K), generator=generator, device=device, dtype=torch.uint8)
            scales = torch.rand(N, parsed.num_groups(K), generator=generator, device=device) + 0.5
            made.append(QuantTensor(codes, (scales * 0.2 * K**-0.5).bfloat16(), None, None, parsed))
        stacks.append(packed(made, layout))
        plain.append(torch.stack([weight.dequantize(torch.bfloat16) for weight in made]))
        weights.append(made)
    return Mixture(
        hidden, width, count, per_token, layout, (stacks[0], stacks[1]), (weights[0], weights[1]), (plain[0], plain[1])
    )


def batch(of: Mixture, tokens: int, routing: str, seed: int, device: Any) -> Batch:
    """routing: "even", or "skewed": the chance of expert e falls as 1 / (e + 1)."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    chance = torch.ones(of.count) if routing == "even" else 1 / (1 + torch.arange(of.count))
    ids = torch.multinomial(chance.expand(tokens, -1), of.per_token, generator=generator)
    x = torch.randn(tokens, of.hidden, generator=generator)
    weights = torch.rand(tokens, of.per_token, generator=generator) + 0.1
    return Batch(x.to(device).bfloat16(), ids.to(device), (weights / weights.sum(1, keepdim=True)).to(device))


def ours(of: Mixture) -> Run:
    from qkernels.ops import grouped

    return lambda b: grouped.experts(of.layout, b.x, b.ids, b.routing, *of.stacks, "silu")


def on_triton(of: Mixture) -> Run:
    """Our other kernels, where the CUDA kernels are the first choice."""
    from qkernels.ops import grouped

    if of.layout != "mma_tile":
        raise ValueError(f"ours is {of.layout}")
    up, down = (packed(experts, "kpack") for experts in of.weights)
    return lambda b: grouped.experts("kpack", b.x, b.ids, b.routing, up, down, "silu")


def grouped_mm(of: Mixture) -> Run:
    import torch

    from qkernels.ops.grouped import activate, sorted_by_expert

    up, down = (w.transpose(1, 2) for w in of.plain)

    def run(b: Batch) -> Any:
        order, rows, offsets = sorted_by_expert(b.ids, of.count)
        ends = offsets[1:].int()
        hidden = activate("silu", torch._grouped_mm(b.x[rows], up, offs=ends).float()).bfloat16()
        y = torch._grouped_mm(hidden, down, offs=ends).float() * b.routing.flatten()[order, None]
        return b.x.new_zeros(b.x.shape, dtype=torch.float32).index_add_(0, rows, y).bfloat16()

    return run


def humming(of: Mixture) -> Run:
    """Follows humming-kernels 0.1.20's own tests (`humming/testing`); never run by us."""
    import torch
    from humming.layer import HummingLayer, HummingMethod
    from humming.schema.gptq import GPTQWeightSchema
    from humming.testing.data import generate_moe_tensors

    from qkernels.formats import gptq
    from qkernels.ops.grouped import activate

    scheme = of.weights[0][0].scheme
    schema = GPTQWeightSchema(bits=scheme.bits, group_size=scheme.group_size, desc_act=False, sym=True)
    layers = []
    for experts in of.weights:
        written = [gptq.write(1, weight) for weight in experts]
        N, K = experts[0].N, experts[0].K
        layer = HummingLayer(N, K, schema, num_experts=of.count, torch_dtype=torch.bfloat16)
        layer = layer.to(experts[0].device)
        layer.load_from_tensors({name: torch.stack([w[name] for w in written]) for name in written[0]})
        layer.transform()
        layers.append((layer, HummingMethod.get_default_tuning_configs(layer, gemm_type="indexed")))
    aligned: dict[tuple[int, int], Any] = {}

    def product(which: int, b: Batch, x: Any, per: int) -> Any:
        layer, tuned = layers[which]
        tokens = b.ids.shape[0]
        if (which, id(b)) not in aligned:
            size = next(config["block_shape"][0] for low, high, config in tuned if low < tokens <= high)
            aligned[which, id(b)] = generate_moe_tensors(b.ids, of.count, "indexed", size)[2:]
        ids, experts, padded = aligned[which, id(b)]
        return layer(
            x, sorted_ids=ids, expert_ids=experts, num_tokens_padded=padded, top_k=per, valid_shape_m=b.ids.numel(),
            compute_config={"gemm_type": "indexed"}, tuning_config=tuned,
        )  # fmt: skip

    def run(b: Batch) -> Any:
        hidden = activate("silu", product(0, b, b.x, of.per_token).float()).bfloat16()
        y = product(1, b, hidden, 1).float().view(*b.ids.shape, -1)
        return (y * b.routing.unsqueeze(-1)).sum(1).bfloat16()

    return run


WHO: dict[str, Callable[[Mixture], Run]] = {
    "ours": ours,
    "ours on Triton": on_triton,
    "torch grouped_mm bf16": grouped_mm,
    "humming indexed": humming,
}


def mismatch(of: Mixture, b: Batch, got: Any) -> str | None:
    """Why `got` is not what the block means, on up to eight of its tokens."""
    import torch

    from qkernels.ops.grouped import activate

    if got.shape != b.x.shape:
        return f"its output is {list(got.shape)}, expected {list(b.x.shape)}"
    for t in torch.linspace(0, len(b.x) - 1, min(8, len(b.x))).long().tolist():
        truth = torch.zeros(of.hidden, dtype=torch.float64, device=got.device)
        for e, w in zip(b.ids[t].tolist(), b.routing[t].tolist(), strict=True):
            inner = activate("silu", of.plain[0][e].double() @ b.x[t].double())
            truth += w * (of.plain[1][e].double() @ inner)
        error = float((got[t].double() - truth).norm() / truth.norm())
        if not error <= MOST_ERROR:
            return f"its token {t} is off by {error:.2g} of its norm"
    return None


def tile(of: Mixture, path: int, size: int) -> Run:
    """The first product of a block in blocks of `size` rows, with its sorting of rows that are known."""
    import torch

    from qkernels.layouts import get_layout
    from qkernels.ops.grouped import sorted_by_expert

    arguments = of.stacks[0].arguments(get_layout(of.layout))
    known: dict[int, Any] = {}

    def run(b: Batch) -> Any:
        if id(b) not in known:
            known[id(b)] = sorted_by_expert(b.ids, of.count)[1:]
        op = torch.ops.qkernels_forced.grouped_gemm
        return op(b.x, *known[id(b)], *arguments, torch.bfloat16, path, size)

    return run


def wrong_product(of: Mixture, b: Batch, got: Any) -> str | None:
    """The same of `tile`, on up to eight rows."""
    import torch

    from qkernels.ops.grouped import sorted_by_expert

    _, rows, offsets = sorted_by_expert(b.ids, of.count)
    for r in torch.linspace(0, len(rows) - 1, min(8, len(rows))).long().tolist():
        e = int(torch.searchsorted(offsets, r, right=True)) - 1
        truth = of.plain[0][e].double() @ b.x[rows[r]].double()
        error = float((got[r].double() - truth).norm() / truth.norm())
        if not error <= MOST_ERROR:
            return f"its row {r} is off by {error:.2g} of its norm"
    return None


def measure(of: Mixture, tokens: int, routing: str, device: Any, seconds: float) -> list[dict[str, Any]]:
    """A row for each candidate, with a reason where it has no number."""
    import torch

    from benchmarks.method.timing import clock_for, interleaved

    batches = [batch(of, tokens, routing, seed, device) for seed in range(BATCHES)]
    blank = {"mode": "experts", "H": of.hidden, "I": of.width, "E": of.count, "k": of.per_token, "tokens": tokens,
             "routing": routing, "layout": of.layout}  # fmt: skip
    rows, samplers = [], {}
    who = {name: (prepare, mismatch) for name, prepare in WHO.items()}
    if of.layout == "mma_tile" and tokens * of.per_token > MOST_ROWS_OF_DECODE * of.count:
        for path, number, sizes in TILES:
            who |= {
                f"gate and up, {path}, {size} tokens": (partial(tile, path=number, size=size), wrong_product)
                for size in sizes
            }
    for name, (prepare, is_wrong) in who.items():
        reason = None
        try:
            run = prepare(of)
            reason = is_wrong(of, batches[-1], run(batches[-1]))
            if reason is None:
                samplers[name] = clock_for(device).prepare([partial(run, b) for b in batches])
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, StopIteration, KeyError) as error:
            first = str(error).splitlines()[:1]
            reason = f"{type(error).__name__}: {''.join(first)}"
        rows.append({**blank, "who": name, "us": None, "reason": reason})
    found = interleaved(samplers, 9, time.monotonic() + seconds)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for row in rows:
        if samples := found.get(str(row["who"])):
            row["us"] = round(statistics.median(samples) * 1e6, 2)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.first_light.experts", description=str(__doc__).split("\n\n")[0]
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--scheme", default="w4a16_g128")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each number of tokens")
    args = parser.parse_args(argv)
    import torch

    device, wrong = torch.device(args.device), False
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            hidden, width, count, per_token = map(int, shape.split("x"))
            of = mixture(hidden, width, count, per_token, args.scheme, device)
            for tokens in map(int, args.tokens.split(",")):
                for routing in ("even", "skewed"):
                    for row in measure(of, tokens, routing, device, args.seconds):
                        print(json.dumps(row), flush=True)
                        wrong = wrong or (row["who"] == "ours" and row["us"] is None)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
