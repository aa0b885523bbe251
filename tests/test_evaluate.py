"""Perplexity and comparison against the same numbers computed at once, in float64."""

from __future__ import annotations

import copy
import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels.errors import ArgumentError
from qkernels.evaluate import compare, perplexity
from qkernels.texts import text_windows, window_length

VOCABULARY = 17


class Bigram(nn.Module):
    """Predicts the next token from the last one; notes how it is called."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(table * 3)
        self.calls: list[tuple[int, ...]] = []
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace(max_position_embeddings=64)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not torch.is_grad_enabled()
        self.calls.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


def text(tokens: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(5))


def log_probabilities(model: Bigram, ids: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """float64 `[tokens, vocabulary]` and the tokens they predict."""
    rows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    return torch.log_softmax(model.table.detach().double(), -1)[rows[:, :-1].flatten()], rows[:, 1:].flatten()


@pytest.mark.parametrize(
    ("tokens", "seq_len", "batch_tokens"), [(100, 10, 1), (100, 10, 1000), (103, 10, 35), (64, 64, 8), (6, 2, 4)]
)
def test_perplexity_is_that_of_the_definition(tokens: int, seq_len: int, batch_tokens: int) -> None:
    """fp32 log-likelihoods of at most 30 nats, summed in chunks: 1e-5 is hundreds of roundings."""
    model = Bigram(1).train()
    result = perplexity(model, text(tokens), seq_len, batch_tokens)
    log_p, targets = log_probabilities(model, text(tokens), seq_len)
    nll = float(-log_p.gather(1, targets[:, None]).mean())
    assert result.negative_log_likelihood == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert (result.tokens, result.windows) == (tokens // seq_len * (seq_len - 1), tokens // seq_len)
    assert all(rows == 1 or rows * seq_len <= batch_tokens for rows, _ in model.calls)
    assert model.training


@pytest.mark.parametrize("entries", [1 << 24, VOCABULARY * 7])
def test_comparison_is_that_of_the_definition(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[compare.__module__], "LOGIT_ENTRIES", entries)
    reference = Bigram(1)
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.table += torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2
    result = compare(model, reference, text(200), 20, batch_tokens=60)
    (log_p, targets), (log_q, _) = log_probabilities(reference, text(200), 20), log_probabilities(model, text(200), 20)
    assert result.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4)
    assert result.top1_agreement == float((log_p.argmax(1) == log_q.argmax(1)).double().mean()) < 1
    assert result.reference_perplexity == pytest.approx(
        math.exp(float(-log_p.gather(1, targets[:, None]).mean())), rel=1e-4
    )


def test_a_model_does_not_differ_from_itself() -> None:
    result = compare(Bigram(1), Bigram(1), text(100), 10)
    assert result.kl == 0
    assert result.top1_agreement == 1


def test_kl_is_from_the_original_and_not_symmetric() -> None:
    one, other = Bigram(1), Bigram(2)
    assert compare(one, other, text(100), 10).kl != pytest.approx(compare(other, one, text(100), 10).kl, rel=1e-3)


def test_results_speak() -> None:
    result = perplexity(Bigram(1), text(103), 10)
    assert (
        result.protocol
        == "10 consecutive windows of 10 tokens without overlap, 9 predicted in each, the last 3 tokens dropped"
    )
    assert str(result) == f"perplexity {result.perplexity:.4f}  ({result.protocol})"
    comparison = compare(Bigram(1), Bigram(1), text(100), 10)
    assert comparison.protocol == "10 consecutive windows of 10 tokens without overlap, 9 predicted in each"
    assert "KL(original ‖ model) 0.000e+00 nats per token, top-1 agreement 100.00%" in str(comparison)
    for value in (result, comparison):
        assert json.loads(json.dumps(value.to_json())) == value.to_json()


def test_window_length_is_capped_to_the_positions() -> None:
    assert window_length(Bigram(1)) == 64
    assert window_length(Bigram(1), 8) == 8
    assert window_length(nn.Linear(1, 1)) == 2048
    with pytest.raises(ArgumentError, match=r"seq_len must be an integer of at least 2 .*, got 1"):
        window_length(Bigram(1), 1)


@pytest.mark.parametrize(
    ("ids", "seq_len", "message"),
    [
        (text(9), 10, "the text has 9 tokens, less than one window of seq_len=10; give more text or a smaller seq_len"),
        (text(9), 1, "seq_len must be an integer of at least 2"),
        (text(9), True, "seq_len must be an integer of at least 2"),
        (text(10).view(2, 5), 5, r"token_ids must be an integer tensor \[tokens\], got torch.int64 \[2, 5\]"),
        (torch.zeros(10), 5, r"token_ids must be an integer tensor \[tokens\], got torch.float32 \[10\]"),
    ],
)
def test_texts_that_make_no_window(ids: Tensor, seq_len: Any, message: str) -> None:
    for call in (lambda: text_windows(ids, seq_len), lambda: perplexity(Bigram(1), ids, seq_len)):
        with pytest.raises(ArgumentError, match=message):
            call()


def test_nan_logits_are_refused() -> None:
    broken = Bigram(1)
    with torch.no_grad():
        broken.table[3] = float("nan")
    with pytest.raises(ArgumentError, match="the model gives NaN or infinite logits"):
        perplexity(broken, text(100), 10)
    with pytest.raises(ArgumentError, match="the model gives NaN or infinite logits"):
        compare(broken, Bigram(1), text(100), 10)
    with pytest.raises(ArgumentError, match="the reference gives NaN or infinite logits"):
        compare(Bigram(1), broken, text(100), 10)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(ArgumentError, match=r"must share a vocabulary, got 17 and 19 \(reference\) logits"):
        compare(Bigram(1), Bigram(1, 19), text(100), 10)
