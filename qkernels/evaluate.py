"""How much a model lost: perplexity, and KL divergence and top-1 agreement with the original.

One protocol for all of them: consecutive windows of `seq_len` tokens without overlap, a short rest is dropped, and each
window predicts its last `seq_len - 1` tokens. Numbers are comparable only under the same protocol, tokenizer and text, so
every result carries it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from tqdm import tqdm

from .errors import ArgumentError
from .texts import batches_of, text_windows

# Windows of one forward pass together have about this many tokens, and log-probabilities are held for so many entries at a
# time: with a vocabulary of 128 k, 64 MiB a copy.
BATCH_TOKENS = 2048
LOGIT_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) over `tokens` predicted tokens."""

    perplexity: float
    negative_log_likelihood: float
    tokens: int
    windows: int
    seq_len: int
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.4f}  ({self.protocol})"


@dataclass(frozen=True)
class Comparison:
    """A model beside its original, over `tokens` predicted tokens.

    Args:
        kl: mean of KL(original ‖ model) of the next-token distribution, in nats per token.
        top1_agreement: how often both find the same token most likely, 0 to 1.
        reference_perplexity: of the original, on the same windows.
    """

    kl: float
    top1_agreement: float
    reference_perplexity: float
    tokens: int
    windows: int
    seq_len: int
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL(original ‖ model) {self.kl:.3e} nats per token, top-1 agreement {self.top1_agreement:.2%}, "
            f"perplexity of the original {self.reference_perplexity:.4f}"
        )


def perplexity(
    model: nn.Module, token_ids: Tensor, seq_len: int, batch_tokens: int = BATCH_TOKENS, progress: bool = True
) -> Perplexity:
    """Perplexity of a causal language model on a text.

    Args:
        model: returns `.logits` `[windows, seq_len, vocabulary]` for token ids.
        token_ids: integer `[tokens]`, the whole text.
        seq_len: tokens in a window.
        batch_tokens: about so many tokens go through the model at once.
        progress: show a progress bar if it takes more than two seconds.

    Raises:
        ArgumentError: less than one window, or NaN logits.
    """
    windows = text_windows(token_ids, seq_len)
    total = 0.0
    with torch.inference_mode(), evaluating(model):
        for rows in _batches(windows, batch_tokens, progress):
            targets = rows[:, 1:].flatten()
            for logits, span in _logit_slices(model, rows):
                total += float(cross_entropy(logits, targets[span].to(logits.device), reduction="sum"))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = _finite(total / tokens, "the model")
    return Perplexity(_exp(mean), mean, tokens, len(windows), seq_len, _protocol(token_ids, windows))


def compare(
    model: nn.Module,
    reference: nn.Module,
    token_ids: Tensor,
    seq_len: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Comparison:
    """KL divergence and top-1 agreement of a model with its original; the distributions are compared in fp32.

    Args:
        model, reference: return `.logits` `[windows, seq_len, vocabulary]` for token ids; may be on different devices.
        token_ids, seq_len, batch_tokens, progress: as for `perplexity`.

    Raises:
        ArgumentError: less than one window, vocabularies of different sizes, or NaN logits.
    """
    windows = text_windows(token_ids, seq_len)
    divergence, agreements, surprise = 0.0, 0, 0.0
    with torch.inference_mode(), evaluating(model), evaluating(reference):
        for rows in _batches(windows, batch_tokens, progress):
            targets = rows[:, 1:].flatten()
            pairs = zip(_logit_slices(model, rows), _logit_slices(reference, rows), strict=True)
            for (logits, span), (expected, _) in pairs:
                if logits.shape != expected.shape:
                    raise ArgumentError(
                        f"the models must share a vocabulary, got {logits.shape[-1]} and {expected.shape[-1]} (reference) logits"
                    )
                p = log_softmax(expected, -1)
                q = log_softmax(logits.to(p.device), -1)
                divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
                agreements += int((p.argmax(-1) == q.argmax(-1)).sum())
                surprise -= float(p.gather(-1, targets[span].to(p.device).unsqueeze(-1)).double().sum())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = _finite(surprise / tokens, "the reference")
    kl = _finite(divergence / tokens, "the model")
    return Comparison(kl, agreements / tokens, _exp(mean), tokens, len(windows), seq_len, _protocol(token_ids, windows))


def _batches(windows: Tensor, batch_tokens: int, progress: bool) -> Iterator[Tensor]:
    batches = batches_of(windows, batch_tokens)
    return iter(tqdm(batches, desc="evaluating", unit="batch", leave=False, delay=2, disable=not progress))


def _logit_slices(model: nn.Module, rows: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """The logits that predict `rows[:, 1:].flatten()`, in fp32, a slice at a time."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    logits: Tensor = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1]
    flat = logits.reshape(-1, logits.shape[-1])
    step = max(1, LOGIT_ENTRIES // flat.shape[-1])
    for start in range(0, len(flat), step):
        yield flat[start : start + step].float(), slice(start, start + step)


def _protocol(token_ids: Tensor, windows: Tensor) -> str:
    count, seq_len = windows.shape
    rest = len(token_ids) - count * seq_len
    return f"{count} consecutive windows of {seq_len} tokens without overlap, {seq_len - 1} predicted in each" + (
        f", the last {rest} tokens dropped" if rest else ""
    )


def _finite(value: float, whose: str) -> float:
    if not math.isfinite(value):
        raise ArgumentError(
            f"{whose} gives NaN or infinite logits on this text; evaluate it in a wider dtype, or check its weights"
        )
    return value


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
