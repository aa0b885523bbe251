"""Give a small Llama or mixture of experts the outlier channels of a large one, without changing what it computes.

In large language models a few channels of the activations are many times larger than the rest, the
same ones in every layer (Dettmers et al. 2022, LLM.int8(), section 4). They separate good
quantizers from bad: a rounding error in the weights that meet such a channel is multiplied by it.
A model of a few million parameters has none, so any quantizer looks good on it.

Here they come from moving powers of two out of one weight into the one before it:

    norm weight * s     q, k, v columns / s       and the same for gate, up behind the second norm
    up rows * s         down columns / s
    v rows * s          o columns / s             one s for all query heads that share a KV head

In a mixture the second norm also feeds the router, whose columns are divided, too; the up rows and down columns of each expert
have scales of their own.

A power of two only changes the exponent of a float, so every product in every sum, and with it
every rounding, stays what it was: the logits are bit-identical, in float32 and in bfloat16. This
script asserts it before it writes anything.

Examples:
    python outliers.py --model work/run/model --out work/final
    python outliers.py --model work/run/model --out work/plain --sigma 0 --fraction 0
"""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def draw_octaves(channels: int, sigma: float, generator: torch.Generator) -> Tensor:
    """float32 [channels]: exponents of the scales, a normal distribution rounded to integers.

    With sigma 0.5, 68 % of them are 0 and 31 % are -1 or 1. But for the rounding, 2^e is log-normal.
    """
    return torch.round(torch.randn(channels, generator=generator) * sigma)


def raised(channels: int, fraction: float, generator: torch.Generator) -> Tensor:
    """bool [channels]: which channels become outliers; round(fraction * channels) of them."""
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[torch.randperm(channels, generator=generator)[: round(fraction * channels)]] = True
    return mask


@torch.no_grad()
def add_outliers(model: PreTrainedModel, sigma: float, fraction: float, octaves: float, seed: int) -> None:
    """Rescale `model` in place; every scale is 2^e, and e is `octaves` higher for an outlier.

    The outliers of all norms are the same channels, those of the residual stream, as in large
    models. Those of the MLP's inside and of the attention's values are drawn per layer. The final
    norm stays as it is: its linear is the LM head, which is tied to the embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    stream = raised(config.hidden_size, fraction, generator)

    def scales(outliers: Tensor) -> Tensor:
        exponents = draw_octaves(len(outliers), sigma, generator) + octaves * outliers
        return torch.exp2(exponents).to(model.dtype)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        if mixture := hasattr(mlp, "experts"):
            ups_downs = [  # of each expert; gate's rows come before up's
                (gate_up[gate_up.shape[0] // 2 :], down)
                for gate_up, down in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)
            ]
        else:
            ups_downs = [(mlp.up_proj.weight, mlp.down_proj.weight)]
        inner = (mlp.experts.gate_up_proj, mlp.gate.weight) if mixture else (mlp.gate_proj.weight, mlp.up_proj.weight)
        for norm, readers in [(layer.input_layernorm, projections), (layer.post_attention_layernorm, inner)]:
            scale = scales(stream)
            norm.weight *= scale
            for weight in readers:
                weight /= scale

        for up, down in ups_downs:
            scale = scales(raised(len(up), fraction, generator))
            up *= scale[:, None]
            down /= scale

        scale = scales(raised(attention.v_proj.out_features, fraction, generator))
        attention.v_proj.weight *= scale[:, None]
        # KV head h serves the query heads h * n ... h * n + n - 1, and o's columns are ordered by
        # query head.
        shared = scale.view(config.num_key_value_heads, -1)
        shared = shared.repeat_interleave(attention.num_key_value_groups, dim=0)
        attention.o_proj.weight /= shared.flatten()


def random_tokens(model: PreTrainedModel, seed: int) -> Tensor:
    """int64 [4, 256]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (4, 256), generator=generator)


@torch.no_grad()
def assert_same_function(before: PreTrainedModel, after: PreTrainedModel, seed: int) -> None:
    """Compare the logits of 4 x 256 random tokens bit by bit, in float32 and as stored.

    Raises:
        AssertionError: they differ; the message has the largest difference.
    """
    rows = random_tokens(before, seed)
    for dtype in (before.dtype, torch.float32):
        expected = before.to(dtype)(input_ids=rows).logits
        got = after.to(dtype)(input_ids=rows).logits
        worst = (expected - got).abs().max().item()
        assert torch.equal(expected, got), f"{dtype}: logits differ by up to {worst:.3g}"
        print(f"{dtype}: {expected.numel():,} logits are bit-identical")


@torch.no_grad()
def spread(model: PreTrainedModel) -> dict[str, float]:
    """For each kind of linear: its largest input channel over its median one, in the worst layer.

    A channel's size is its root mean square over random tokens.
    """
    ratios: dict[str, list[float]] = {}

    def watch(name: str, linear: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = inputs[0].float().flatten(0, -2).square().mean(0).sqrt()
            ratios.setdefault(name, []).append((size.max() / size.median()).item())

        linear.register_forward_pre_hook(hook)

    model = copy.deepcopy(model)
    for layer in model.model.layers:
        watch("qkv", layer.self_attn.q_proj)
        watch("o", layer.self_attn.o_proj)
        if hasattr(layer.mlp, "experts"):  # what goes into down is inside of the experts module
            watch("experts", layer.mlp.experts)
        else:
            watch("gate_up", layer.mlp.gate_proj)
            watch("down", layer.mlp.down_proj)
    model(input_ids=random_tokens(model, seed=0))
    return {name: max(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the rescaled one")
    parser.add_argument("--sigma", type=float, default=0.5, help="of the exponents, in octaves (default: 0.5)")
    parser.add_argument("--fraction", type=float, default=0.015, help="of the channels is raised (default: 0.015)")
    parser.add_argument("--octaves", type=float, default=4.0, help="they are raised by (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    before = copy.deepcopy(model)
    add_outliers(model, args.sigma, args.fraction, args.octaves, args.seed)
    assert_same_function(copy.deepcopy(before), copy.deepcopy(model), args.seed)
    old, new = spread(before), spread(model)
    for name in old:
        print(f"input of {name:8} largest / median channel {old[name]:7.1f} -> {new[name]:7.1f}")

    model.save_pretrained(args.out)
    for file in args.model.glob("tokenizer*"):
        shutil.copy(file, args.out)


if __name__ == "__main__":
    main()
