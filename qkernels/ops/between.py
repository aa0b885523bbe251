"""What a decoder layer does between its products, an op each, where PyTorch takes five to ten for one token.

    rms_norm(x, weight, epsilon, one_added)   weight * round(x / rms(x)); Gemma's: round(x / rms(x) * (1 + weight))
    gated(gate, up, gelu)                     round(silu(gate)) * up; or gelu by tanh
    rotated(x, cos, sin)                      rotary positions: x cos + rotate_half(x) sin, each product rounded
    attended(q, keys, values, mask, scale)    attention of one token a sequence, heads that share keys together

Compiled for the CPU; elsewhere, and without the extension, they are what their twins here say. Results are rounded where
transformers rounds them; sums are in fp32 in an order of their own, so a last bit may differ. There are no gradients: whoever
wants one, or is compiled, keeps PyTorch's own operators (`nn.between`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.nn.functional import gelu as gelu_of
from torch.nn.functional import scaled_dot_product_attention, silu

LANES: Final = 16  # sizes are multiples of it: of a norm, of a gate, of a head (twice it where that is turned)
MOST_HEAD: Final = 256

_LIBRARY: Final = Library("qkernels", "FRAGMENT")  # csrc/cpu/bindings_between.cpp implements it for the CPU


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, one_added: bool) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * (1 + weight.float())).to(x.dtype) if one_added else weight * wide.to(x.dtype)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return (gelu_of(gate, approximate="tanh") if gelu else silu(gate)) * up


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _attended(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    together = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[3])
    seen = None if mask is None else mask[:, None, None]
    return scaled_dot_product_attention(together, keys, values, attn_mask=seen, scale=scale).reshape(q.shape)


def _like(first: Tensor, *_: Any) -> Tensor:
    return torch.empty(first.shape, dtype=first.dtype, device=first.device)


def _define(name: str, schema: str, twin: Callable[..., Tensor]) -> Callable[..., Tensor]:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    register_fake(f"qkernels::{name}", _like, lib=_LIBRARY)
    _LIBRARY.impl(name, twin, "CompositeExplicitAutograd")
    defined: Callable[..., Tensor] = getattr(torch.ops.qkernels, name).default
    return defined


rms_norm = _define("rms_norm", "(Tensor x, Tensor weight, float epsilon, bool one_added) -> Tensor", _rms_norm)
gated = _define("gated", "(Tensor gate, Tensor up, bool gelu) -> Tensor", _gated)
rotated = _define("rotated", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", _rotated)
attended = _define("attended", "(Tensor q, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor", _attended)
