"""Models for which golden data says which type each tensor gets: their tensors by name, and what else the rules ask."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby
from typing import NamedTuple

from qkernels.models.gguf_mixes import Facts

Shapes = dict[str, tuple[int, ...]]


class Model(NamedTuple):
    facts: Facts
    tensors: Shapes


def _model(facts: Facts, hidden: int = 256, inner: int = 512, tied: bool = False, one_qkv: bool = False) -> Model:
    head, experts = hidden // facts.heads, facts.experts
    keys = head * facts.kv_heads
    tensors: Shapes = {"token_embd.weight": (32, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        tensors["output.weight"] = (32, hidden)
    for i in range(facts.layers):
        layer: Shapes = {
            "attn_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "attn_output.weight": (hidden, hidden),
        }
        if one_qkv:
            layer["attn_qkv.weight"] = (hidden + 2 * keys, hidden)
        else:
            layer |= {
                "attn_q.weight": (hidden, hidden), "attn_k.weight": (keys, hidden), "attn_v.weight": (keys, hidden),
                "attn_q.bias": (hidden,),
            }  # fmt: skip
        if experts:
            layer["ffn_gate_inp.weight"] = (experts, hidden)
        stack, end = ((experts,), "_exps") if experts else ((), "")
        layer |= {f"ffn_{name}{end}.weight": (*stack, inner, hidden) for name in ("gate", "up")}
        layer[f"ffn_down{end}.weight"] = (*stack, hidden, inner)
        tensors |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return Model(facts, tensors)


# The last three: rows that k-quants do not divide, rows that nothing divides, and eight experts.
MIX_MODELS = {
    "llama of 32 layers": _model(Facts("llama", 32, 8, 2)),
    "llama of 80 layers, shared values": _model(Facts("llama", 80, 8, 1), inner=256),
    "llama of 80 layers, heads alike": _model(Facts("llama", 80, 8, 8), inner=256),
    "qwen2 of 80 layers": _model(Facts("qwen2", 80, 8, 8), inner=256),
    "qwen2 of 28 layers, tied": _model(Facts("qwen2", 28, 8, 4), tied=True),
    "qwen3 of 80 layers": _model(Facts("qwen3", 80, 8, 1), inner=256),
    "gemma2 of 26 layers": _model(Facts("gemma2", 26, 8, 4), tied=True),
    "phi3 of 17 layers": _model(Facts("phi3", 17, 8, 8), one_qkv=True),
    "llama of 3 layers": _model(Facts("llama", 3, 4, 4)),
    "rows of 96 and 160": _model(Facts("llama", 9, 4, 4), 96, 160),
    "rows of 256 and 344": _model(Facts("llama", 9, 4, 1), 256, 344),
    "eight experts": _model(Facts("llama", 10, 8, 2, 8)),
    "four experts": _model(Facts("llama", 10, 8, 2, 4)),
}  # fmt: skip


def in_short(types: dict[str, str]) -> str:
    """The most frequent type, then every other one by what follows the layer in a name, layer after layer: "Q4_K; ffn_down.weight
    Q6_K Q4_K*2 Q6_K"; vectors and norms aside, which are F32."""
    found: dict[str, list[str]] = {}
    for name, type in types.items():
        if not name.endswith(("norm.weight", ".bias")):
            found.setdefault(re.sub(r"^blk\.\d+\.", "", name), []).append(type)
    common = Counter(type for of_one in found.values() for type in of_one).most_common(1)[0][0]
    runs = {name: [(type, len(list(run))) for type, run in groupby(of_one)] for name, of_one in sorted(found.items())}
    spelled = {
        name: " ".join(type if count == 1 else f"{type}*{count}" for type, count in of_one)
        for name, of_one in runs.items()
        if [type for type, _ in of_one] != [common]
    }
    return "; ".join([common, *(f"{name} {types}" for name, types in spelled.items())])
