"""How many bytes the cache of a conversation takes, layer by layer.

Sizes are not computed from fields of a config, which every architecture calls and means otherwise (heads that are shared, latent
keys, layers without keys of their own, states of linear attention): the model, on meta, is run on two and on three tokens, and
what its own cache then holds says what a token adds and what stays. How a layer goes on from there is its kind's:

* full attention grows with each token; so do the keys of an indexer beside it;
* a sliding window holds `window - 1` tokens at most (transformers' `DynamicSlidingWindowLayer`);
* states of linear attention, SSMs and convolutions have one size;
* a layer that uses another's keys holds nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.architectures import text_config, text_part
from ..models.experts import experts_of
from ..text import dtype_name

# Bytes of a number in a cache, by the names of --kv-dtype. What transformers computes with here is the model's own dtype; fp8 is
# what engines with such a cache (vLLM's --kv-cache-dtype fp8) would hold.
KV_DTYPES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_CALLED: Final = ("cache", "past_key_values", "cache_params")  # in the order of what is deprecated
_SHORT, _LONG = 2, 3  # tokens; a window of one token is none


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps for each sequence.

    Args:
        kind: "full", "window", "state", "full + state" or "none".
        per_token: bytes that a token adds.
        fixed: bytes that do not grow.
        window: tokens that are kept at most; None: all of them.
    """

    kind: str
    per_token: int
    fixed: int
    window: int | None = None

    def nbytes(self, context: int) -> int:
        """Bytes after so many tokens."""
        kept = context if self.window is None else min(context, self.window)
        return (self.fixed if context else 0) + self.per_token * kept


@dataclass(frozen=True)
class Cache:
    """What a model keeps for one sequence, in `dtype`."""

    layers: tuple[LayerCache, ...]
    dtype: str

    def nbytes(self, context: int, batch: int = 1) -> int:
        """Bytes after `context` tokens of each of `batch` sequences."""
        return batch * sum(layer.nbytes(context) for layer in self.layers)

    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind; windows with their length."""
        named = (f"window of {x.window + 1}" if x.window is not None else x.kind for x in self.layers)
        return dict(Counter(named))


def cache_of(model: nn.Module, kv_dtype: str | None = None) -> Cache:
    """The cache of a causal language model, for one sequence.

    Args:
        model: its parameters may be on meta; not changed.
        kv_dtype: of keys and values, a key of `KV_DTYPES`; None: that of the model. States stay in the model's.

    Raises:
        CheckpointError: the model keeps no cache that transformers' classes describe, or cannot be run on meta.
    """
    config: Any = text_config(model)
    dtype = getattr(model, "dtype", torch.float32)
    short, long = _held(model)
    layers = []
    for layer, before, after in zip(long, _sizes(short), _sizes(long), strict=True):
        grows = sum(after) - sum(before)
        fixed = sum(after) - _LONG * grows
        if kv_dtype is not None:
            grows = grows * KV_DTYPES[kv_dtype] // dtype.itemsize
        window = int(layer.sliding_window) - 1 if getattr(layer, "is_sliding", False) else None
        kind = " + ".join(name for name, there in (("full", grows), ("state", fixed)) if there) or "none"
        layers.append(LayerCache("window" if window is not None and grows else kind, grows, fixed, window))
    if not any(layer.per_token or layer.fixed for layer in layers):
        raise CheckpointError(
            f"{type(model).__name__} ({getattr(config, 'model_type', None)}) leaves nothing in its cache when it is run on meta; "
            "plan it with a context of 0, which counts no cache"
        )
    return Cache(tuple(layers), kv_dtype or dtype_name(dtype))


def _held(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The layers of the cache after `_SHORT` and after `_LONG` tokens, on meta."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{type(model).__name__} has an encoder, whose input sets a part of its cache; plan it with a context of 0, which "
            "counts no cache"
        )
    hollow: Any = copy.deepcopy(model).to("meta")
    for name in experts_of(hollow):  # which expert a token gets is asked of values; none of them keeps anything
        hollow.get_submodule(name).forward = lambda hidden, *args, **others: torch.empty_like(hidden)
    errors: list[Exception] = []
    # multimodal models look for pictures among the ids: what their text part keeps is all there is; some look for padding
    for part in dict.fromkeys((hollow, text_part(hollow))):
        for without_padding in (False, True):
            try:
                if without_padding:
                    part.config.pad_token_id = text_config(part).pad_token_id = None
                with torch.no_grad():
                    return _after(part, _SHORT), _after(part, _LONG)
            except Exception as error:  # as many ways as there are models
                errors.append(error)
    raise CheckpointError(
        f"the cache of {type(model).__name__} cannot be told without weights ({type(errors[0]).__name__}: {errors[0]}); plan it "
        "with a context of 0, which counts no cache"
    ) from errors[0]


def _after(part: Any, tokens: int) -> list[Any]:
    output = part(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=True)
    found: Any = next(output[name] for name in _CALLED if name in output)
    return list(found.layers)


def _sizes(layers: list[Any]) -> Iterator[list[int]]:
    """Bytes of every tensor that each layer keeps."""
    for layer in layers:
        values = [value for name, value in vars(layer).items() if not name.startswith("_")]
        yield [tensor.nbytes for value in values for tensor in _tensors(value)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.dim():  # counters are no cache
            yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
