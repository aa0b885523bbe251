"""Shapes of real models by name: every linear layer of a decoder block, as engines run it (q, k, v and gate, up fused).

Sizes are those of the models' published `config.json` files. Under tensor parallelism (`shards`), the first linear layer of a
pair is cut along N, the second along K (Shoeybi et al. 2019, Megatron-LM, section 3), so that a GPU of a world of 8 runs the
layers of "llama-3-70b" with `shards=8`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qkernels.errors import ArgumentError


@dataclass(frozen=True)
class Geometry:
    """What the linear layers of a decoder follow from. `experts` 0: a dense model; else one expert's layers are listed."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0


GEOMETRIES: dict[str, Geometry] = {
    g.name: g
    for g in (
        Geometry("llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256),
        Geometry("llama-3-70b", 8192, 28672, 80, 64, 8, 128, 128256),
        Geometry("qwen3-8b", 4096, 12288, 36, 32, 8, 128, 151936),
        Geometry("qwen3-32b", 5120, 25600, 64, 64, 8, 128, 151936),
        Geometry("qwen3-30b-a3b", 2048, 768, 48, 32, 4, 128, 151936, experts=128),
        Geometry("mixtral-8x7b", 4096, 14336, 32, 32, 8, 128, 32000, experts=8),
    )
}

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Layer:
    """One linear layer: y [M, N] = x [M, K] W^T."""

    model: str
    name: str
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.model} {self.name} [{self.N}, {self.K}]"


def layers_of(model: str, shards: int = 1) -> tuple[Layer, ...]:
    """The linear layers of one decoder block of a model, on one of `shards` devices.

    Args:
        model: a key of `GEOMETRIES`.
        shards: tensor-parallel world size.

    Raises:
        ArgumentError: unknown model, or it cannot be cut in so many parts.
    """
    if model not in GEOMETRIES:
        raise ArgumentError(f"model must be one of {', '.join(GEOMETRIES)}, got {model!r}")
    g = GEOMETRIES[model]
    if shards < 1 or any(size % shards for size in (g.heads, g.kv_heads, g.intermediate)):
        raise ArgumentError(
            f"shards must divide {g.heads} heads, {g.kv_heads} key-value heads and intermediate size {g.intermediate} of "
            f"{model}, got {shards}"
        )
    name = model if shards == 1 else f"{model}-tp{shards}"
    expert = "expert " if g.experts else ""
    return (
        Layer(name, "qkv", (g.heads + 2 * g.kv_heads) * g.head_dim // shards, g.hidden),
        Layer(name, "o", g.hidden, g.heads * g.head_dim // shards),
        Layer(name, f"{expert}gate_up", 2 * g.intermediate // shards, g.hidden),
        Layer(name, f"{expert}down", g.hidden, g.intermediate // shards),
    )


def find_layer(model: str, name: str, shards: int = 1) -> Layer:
    """One of `layers_of`, by its name ("o", "down", "expert down", …)."""
    found = {layer.name: layer for layer in layers_of(model, shards)}
    if name not in found:
        raise ArgumentError(f"layer of {model} must be one of {', '.join(found)}, got {name!r}")
    return found[name]


# What the full set measures: dense, sharded as a node of 2 or 8 GPUs would, and experts.
FULL_SET: tuple[tuple[str, int], ...] = (
    ("llama-3-8b", 1),
    ("llama-3-70b", 1),
    ("llama-3-70b", 2),
    ("llama-3-70b", 8),
    ("qwen3-8b", 1),
    ("qwen3-32b", 1),
    ("qwen3-30b-a3b", 1),
    ("mixtral-8x7b", 1),
)
# On a CPU: a dense model, the smallest shards and the smallest experts. The rest would take hours (10 times the weights).
CPU_SET: tuple[tuple[str, int], ...] = (("llama-3-8b", 1), ("llama-3-70b", 8), ("qwen3-30b-a3b", 1))
CPU_TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
