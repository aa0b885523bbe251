"""What a plan says of the cache, against the cache that transformers makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkernels.errors import CheckpointError
from qkernels.planning.cache import cache_of
from tests.matrix.rows import ROWS
from tests.matrix.tiny import tiny

# Shared heads, one head for all, none shared; windows; latent keys; layers that share keys; states beside and instead of keys;
# experts.
NAMES = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "Phi3ForCausalLM", "MistralForCausalLM", "Cohere2ForCausalLM",
    "GptOssForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "Gemma3nForCausalLM", "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM", "Mamba2ForCausalLM", "FalconH1ForCausalLM", "Zamba2ForCausalLM", "GraniteMoeHybridForCausalLM",
    "ModernBertDecoderForCausalLM",
)  # fmt: skip


def model_of(name: str) -> Any:
    return next((row.model() for row in ROWS if row.name == name), None) or tiny(name, {})


def held(model: Any, tokens: int, batch: int) -> int:
    """Bytes of the tensors that a model's cache keeps after so many tokens, the last alone: what a window let go goes then."""
    ids = torch.zeros(batch, tokens - 1, dtype=torch.long)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
        name = next(
            name for name in ("cache", "cache_params", "past_key_values") if name in output
        )  # the last: before 5.20
        cache = output[name]
        model(input_ids=ids[:, :1], use_cache=True, **{name: cache})
    found = [value for layer in cache.layers for value in vars(layer).values()]
    flat = [part for v in found for part in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else [v])]
    return sum(t.nbytes for t in flat if isinstance(t, torch.Tensor) and t.dim() > 0)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_bytes_as_transformers_keeps(name: str) -> None:
    model = model_of(name).eval()
    cache = cache_of(model)
    for tokens, batch in ((5, 1), (24, 2)):  # windows hold 7
        assert cache.nbytes(tokens, batch) == held(model, tokens, batch)
    assert cache.nbytes(0) == 0


def test_kinds_of_layers_are_told() -> None:
    def kinds(name: str) -> dict[str, int]:
        return cache_of(model_of(name)).kinds()

    assert kinds("LlamaForCausalLM") == {"full": 2}
    assert kinds("GptOssForCausalLM") == {"window of 8": 1, "full": 1}
    # Layers that read the cache of others: entries without bytes, or (transformers 5.16) no entries.
    assert {"none": 2} | kinds("Gemma3nForCausalLM") == {"window of 8": 1, "full": 1, "none": 2}
    assert kinds("Qwen3_5ForCausalLM") == {"state": 1, "full": 1}
    assert kinds("FalconH1ForCausalLM") == {"full + state": 2}


def test_another_dtype_counts_for_what_grows() -> None:
    model = model_of("FalconH1ForCausalLM")
    plain, small = cache_of(model), cache_of(model, "fp8")
    assert [x.fixed for x in small.layers] == [x.fixed for x in plain.layers]
    assert [4 * x.per_token for x in small.layers] == [x.per_token for x in plain.layers]


def test_a_cache_of_its_own_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"RwkvForCausalLM cannot be told.* a context of 0"):
        cache_of(model_of("RwkvForCausalLM"))
    with pytest.raises(CheckpointError, match="has an encoder"):
        cache_of(model_of("BartForConditionalGeneration"))
