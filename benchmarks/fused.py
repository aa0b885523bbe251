"""A decode step of a transformers Llama: linear layers one by one against `fuse_linear`, interleaved.

    python -m benchmarks.fused --size 1b

Random codes, so nothing is downloaded. Both models have the same weights, each in memory of its own, and their logits are
compared bit for bit before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qkernels.markdown import table as markdown_table
from qkernels.nn import fuse_linear, set_module
from qkernels.scheme import QuantScheme

from .llama import SIZES, random_linear
from .statistics import median_interval, ratio_interval

VOCABULARY = 32000
PROMPT = 32


def random_llama(size: str, scheme: QuantScheme) -> Any:
    """A `LlamaForCausalLM` in bf16 of `QuantLinear` layers of random codes, the head among them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    g = SIZES[size]
    config = LlamaConfig(
        vocab_size=min(g.vocabulary, VOCABULARY), hidden_size=g.hidden, intermediate_size=g.intermediate,
        num_hidden_layers=g.layers, num_attention_heads=g.heads, num_key_value_heads=g.kv_heads, head_dim=g.head_dim,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            N, K = module.weight.shape
            set_module(model, name, random_linear(N, K, scheme, torch.bfloat16, torch.device("cpu")))
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        values = torch.randn(parameter.shape) if parameter.dim() == 2 else torch.ones(parameter.shape)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values.bfloat16(), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def decode(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[list[float], torch.Tensor]:
    """Seconds of each greedy decode step after the prompt, and the last logits."""
    out = model(prompt, use_cache=True)
    seconds = []
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return seconds, out.logits


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--schemes", nargs="+", default=["w4a16_g128", "w4a8_g128"])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    lines = []
    for scheme in args.schemes:
        # Made twice, not copied: a deep copy would lie on small pages (docs/cpu-huge-pages.md).
        alone, fused = (random_llama(args.size, QuantScheme.parse(scheme)) for _ in range(2))
        report = fuse_linear(fused)
        assert report.fused, report
        prompt = torch.randint(0, alone.config.vocab_size, (1, PROMPT))
        times: dict[str, list[float]] = {"alone": [], "fused": []}
        with torch.no_grad():
            assert torch.equal(decode(alone, prompt, args.new_tokens)[1], decode(fused, prompt, args.new_tokens)[1])
            for _ in range(args.rounds):
                for name, model in (("alone", alone), ("fused", fused)):
                    times[name].append(median_interval(decode(model, prompt, args.new_tokens)[0]).median)
        ratio = ratio_interval(times["alone"], times["fused"])
        each = [f"{median_interval(samples).median * 1e3:.2f}" for samples in times.values()]
        lines.append([args.size, scheme, *each, f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"])
    print(markdown_table(["size", "scheme", "alone, ms", "fused, ms", "alone : fused"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
