"""A Llama-shaped decoder in plain PyTorch with random weights, built on the device without a checkpoint.

Only what costs time and memory is here: RMSNorm, rotary embedding, grouped-query attention over a static cache, SwiGLU. Its
linear layers are `nn.Linear` or `QuantLinear`. The step that decodes one token has fixed shapes and reads nothing on the host, so
that it can be compiled and captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu

from qkernels.layouts.tiles import true_bits
from qkernels.nn import QuantLinear
from qkernels.ops import between
from qkernels.scheme import QuantScheme

from ..kernels.shapes import GEOMETRIES, Geometry
from ..kernels.weights import random_weight

ROPE_BASE, RMS_EPSILON = 500000.0, 1e-5

SIZES: dict[str, Geometry] = {
    "tiny": Geometry("tiny", 256, 768, 4, 8, 4, 32, 2048),
    "small": Geometry("small", 1024, 2816, 8, 16, 8, 64, 32000),
    "1b": Geometry("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256),
    "8b": GEOMETRIES["llama-3-8b"],
    "70b": GEOMETRIES["llama-3-70b"],
}


def random_linear(N: int, K: int, scheme: QuantScheme | None, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer of random weights of about 1 / sqrt(K); quantized ones are made of random codes, never of a float weight."""
    if scheme is None:
        layer = nn.Linear(K, N, bias=False, device="meta", dtype=dtype)
        layer.weight = nn.Parameter(
            torch.empty(N, K, device=device, dtype=dtype).normal_(0, K**-0.5), requires_grad=False
        )
        return layer
    weight = random_weight(N, K, scheme, dtype, seed=None, device=device, centred=True)
    return QuantLinear.from_quant_tensor(weight, dtype=dtype)


class Block(nn.Module):
    """One decoder layer with its part of the cache, `[1, kv_heads, positions, head_dim]` each."""

    qkv: nn.Module
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module
    epsilon = RMS_EPSILON
    norm1: Tensor
    norm2: Tensor
    keys: Tensor
    values: Tensor

    def __init__(
        self, g: Geometry, scheme: QuantScheme | None, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.g = g
        self.qkv = random_linear((g.heads + 2 * g.kv_heads) * g.head_dim, g.hidden, scheme, dtype, device)
        self.o = random_linear(g.hidden, g.heads * g.head_dim, scheme, dtype, device)
        self.gate_up = random_linear(2 * g.intermediate, g.hidden, scheme, dtype, device)
        self.down = random_linear(g.hidden, g.intermediate, scheme, dtype, device)
        for name in ("norm1", "norm2"):
            self.register_buffer(name, torch.ones(g.hidden, dtype=dtype, device=device))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, g.kv_heads, positions, g.head_dim, dtype=dtype, device=device))

    def forward(self, x: Tensor, at: Tensor, turn: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """x `[1, T, hidden]`, at `[T]` positions, turn (cos, sin, plain) `[T, head_dim]`, mask `[T, positions that are
        seen]` of 0 and -inf."""
        g, T = self.g, x.shape[1]
        qkv = self.qkv(_norm(x, self.norm1, self.epsilon)).view(1, T, -1, g.head_dim).transpose(1, 2)
        qk, v = qkv.split([g.heads + g.kv_heads, g.kv_heads], dim=1)
        q, k = _turned(qk, *turn).split([g.heads, g.kv_heads], dim=1)
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        y = _attention(q, self.keys, self.values, mask)
        x = x + self.o(y.transpose(1, 2).reshape(1, T, -1))
        gate, up = self.gated(_norm(x, self.norm2, self.epsilon))
        down: Tensor = self.down(between.gated(gate, up, False) if _by_ops(x) else silu(gate) * up)
        return x + down

    def gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.gate_up(x).chunk(2, -1)
        return gate, up


def _by_ops(x: Tensor) -> bool:
    """Whether this package's ops stand for PyTorch's, compiled or not: loops that the compiler fused took longer."""
    return x.device.type == "cpu"


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return between.rms_norm(x, weight, epsilon, False) if _by_ops(x) else rms_norm(x, weight.shape, weight, epsilon)


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """q and result `[1, heads, T, head_dim]`; mask `[T, positions that are seen]`. On a CPU heads that share keys go as if they
    were tokens: the same to the bit. Where each reads them again a token takes 320 us instead of 38 (32 heads, 8 of keys, 256
    positions, bf16).
    """
    heads, T, D = q.shape[1:]
    if T == 1 and _by_ops(q):
        return between.attended(q, keys, values, mask, D**-0.5)
    keys, values = keys[:, :, : mask.shape[1]], values[:, :, : mask.shape[1]]
    if T > 1 and not _by_ops(q):
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    shared = heads // keys.shape[1]
    together = q.reshape(1, -1, shared * T, D)
    return scaled_dot_product_attention(
        together, keys, values, attn_mask=mask if T == 1 else mask.repeat(shared, 1)
    ).view_as(q)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, plain: Tensor) -> Tensor:
    """Both halves of a head as the coordinates of head_dim / 2 points; `sin` comes with a minus in its first half, `plain` has
    none."""
    if _by_ops(x):
        return between.rotated(x, cos[None], plain[None])
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin)


class Llama(nn.Module):
    """The whole decoder; `scheme` None leaves its linear layers in `dtype`, as the embedding always and the head unless asked."""

    blocks: nn.ModuleList
    head: nn.Module
    epsilon = RMS_EPSILON
    table: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor

    def __init__(
        self, g: Geometry, scheme: QuantScheme | None, positions: int, dtype: torch.dtype, device: torch.device,
        quantized_head: bool = False, rope_base: float = ROPE_BASE,
    ) -> None:  # fmt: skip
        super().__init__()
        self.g = g
        self.register_buffer("table", torch.empty(g.vocabulary, g.hidden, dtype=dtype, device=device).normal_())
        self.blocks = nn.ModuleList(Block(g, scheme, positions, dtype, device) for _ in range(g.layers))
        self.register_buffer("norm", torch.ones(g.hidden, dtype=dtype, device=device))
        self.head = random_linear(g.vocabulary, g.hidden, scheme if quantized_head else None, dtype, device)
        half = torch.arange(0, g.head_dim, 2, device=device) / g.head_dim
        angles = torch.outer(torch.arange(positions, device=device), rope_base**-half).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(dtype))
        sin = angles.sin()
        sin[:, : g.head_dim // 2].neg_()  # see _turned
        self.register_buffer("sin", sin.to(dtype))
        self.register_buffer("positions", torch.arange(positions, device=device))

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Logits `[1, vocabulary]` of the token after the last of `tokens` `[1, T]`, which stand at positions `at` `[T]`."""
        x = self.rows(tokens)
        # Of a prompt, no further than it reaches; the step of one token has a fixed shape. As numbers: attention would make them
        # of a bool in every layer.
        seen = self.positions if len(at) == 1 else self.positions[: int(at[-1]) + 1]
        mask = torch.where(seen[None, :] <= at[:, None], 0.0, -torch.inf).to(x.dtype)
        sin = self.sin[at]
        half = self.g.head_dim // 2
        turn = (self.cos[at], sin, torch.cat([-sin[:, :half], sin[:, half:]], -1))
        for block in self.blocks:
            x = block(x, at, turn, mask)
        y: Tensor = self.head(_norm(x[:, -1], self.norm, self.epsilon))
        return y

    def rows(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.table)


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose, computed from the geometry alone."""

    linears: int
    embeddings: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.linears + self.embeddings + self.cache + self.activations


def predicted_memory(g: Geometry, scheme: QuantScheme | None, positions: int, prompt: int, itemsize: int = 2) -> Memory:
    """What the model should take, before it is built.

    Linear layers: codes at the width that the kernels store (4 or 8 bits) and scales; embedding table and head in the
    activations' dtype; keys and values for every position; and, while a prompt goes through the widest layer, x, gate and up,
    their product,
    the mask and one expanded copy of it.
    """
    shapes = (
        ((g.heads + 2 * g.kv_heads) * g.head_dim, g.hidden), (g.hidden, g.heads * g.head_dim),
        (2 * g.intermediate, g.hidden), (g.hidden, g.intermediate),
    )  # fmt: skip
    linears = 0
    for N, K in shapes:
        if scheme is None:
            linears += N * K * itemsize
        else:
            linears += N * K * true_bits(scheme.bits) // 8 + N * scheme.num_groups(K) * itemsize
    cache = 2 * g.layers * positions * g.kv_heads * g.head_dim * itemsize
    activations = prompt * (2 * g.hidden + 4 * g.intermediate) * itemsize + prompt * positions * (1 + itemsize)
    return Memory(g.layers * linears, 2 * g.vocabulary * g.hidden * itemsize, cache, activations)
