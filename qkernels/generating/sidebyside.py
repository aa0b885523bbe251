"""The answers of a model and of its original to the same prompts, and what may be wrong where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn.functional import log_softmax

from ..errors import ArgumentError
from ..layouts import canonical
from ..nn import QuantExperts, QuantLinear, model_bytes
from ..reports import readable_size
from ..text import dtype_name
from .sampling import Answers, answer, with_room

# KL from the original on its own answers, in nats a token, from which on a model is called garbled: 3-bit round-to-nearest of the
# bundled model has 0.2, 2-bit 1.5 (docs/quality.md).
GARBLED: Final = 0.5
DRIFTING: Final = 0.1
SMALL: Final = 2**26  # bytes of weights, below which most of the time is PyTorch's own


@dataclass(frozen=True)
class Pair:
    """One prompt.

    Args:
        answer, original: continuations by the model and by its original, the likeliest token each time.
        same: how many tokens from the beginning are the same.
        of: tokens of the original's answer.
        kl: of the model from the original on the original's answer, nats a token.
        agreement: how often both find the same token likeliest there.
    """

    prompt: str
    answer: str
    original: str
    same: int
    of: int
    kl: float
    agreement: float


@dataclass(frozen=True)
class SideBySide:
    """All prompts, and findings in sentences."""

    pairs: tuple[Pair, ...]
    findings: tuple[str, ...]

    @property
    def match_rate(self) -> float:
        """Tokens before the first difference, of all."""
        return sum(pair.same for pair in self.pairs) / max(1, sum(pair.of for pair in self.pairs))

    @property
    def kl(self) -> float:
        """Nats a token, over all answers."""
        return sum(pair.kl * pair.of for pair in self.pairs) / max(1, sum(pair.of for pair in self.pairs))

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {**asdict(self), "match_rate": self.match_rate, "answers_kl": self.kl}

    def to_markdown(self) -> str:
        """Prompt by prompt, then the findings."""
        lines = []
        for number, pair in enumerate(self.pairs, 1):
            where = "the same" if pair.same >= pair.of else f"differs from token {pair.same + 1} of {pair.of} on"
            lines += [
                f"## {number}: {pair.prompt.strip()!r:.100}",
                f"{where}; KL {pair.kl:.3e}, top-1 agreement {pair.agreement:.1%}",
                f"  original: {pair.original!r}",
                f"  model:    {pair.answer!r}",
                "",
            ]
        lines.append(f"match rate {self.match_rate:.1%} (tokens before the first difference)")
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])


def side_by_side(
    model: Any, original: Any, tokenizer: Any, prompts: Mapping[str, Sequence[int]], tokens: int
) -> SideBySide:
    """Let both models answer, and look at where and why they differ.

    Args:
        model, original: on any devices.
        prompts: token ids by text.
        tokens: new ones for each, at most.

    Raises:
        ArgumentError: there is no prompt, or one that fills the original's context; or the models have different vocabularies.
    """
    if not prompts:
        raise ArgumentError("there is no prompt to answer")
    tokens = with_room(original, list(prompts.values()), tokens)
    pairs, ours, theirs = [], [], []
    for prompt, ids in prompts.items():
        mine, its = (answer(one, tokenizer, [ids], tokens, do_sample=False) for one in (model, original))
        ours.append(mine)
        theirs.append(its)
        same = next((i for i, (a, b) in enumerate(zip(mine.ids[0], its.ids[0], strict=False)) if a != b), None)
        same = min(len(mine.ids[0]), len(its.ids[0])) if same is None else same
        kl, agreement = _on_answer(model, original, [*ids, *its.ids[0]], len(ids))
        pairs.append(Pair(prompt, mine.texts[0], its.texts[0], same, len(its.ids[0]), kl, agreement))
    made = SideBySide(tuple(pairs), ())
    return SideBySide(made.pairs, tuple(diagnosis(made, model, original, _rate(ours), _rate(theirs))))


def _on_answer(model: Any, original: Any, ids: Sequence[int], begin: int) -> tuple[float, float]:
    """KL and top-1 agreement over the tokens from `begin` on."""
    rows = torch.tensor([ids])
    with torch.inference_mode():
        q, p = (
            one(input_ids=rows.to(one.device), use_cache=False).logits[0, begin - 1 : -1] for one in (model, original)
        )
    if q.shape != p.shape:
        raise ArgumentError(f"the models must share a vocabulary, got {q.shape[-1]} and {p.shape[-1]} logits")
    p, q = log_softmax(p.float(), -1), log_softmax(q.to(p.device).float(), -1)
    kl = float((p.exp() * (p - q)).sum(-1).double().mean())
    return kl, float((p.argmax(-1) == q.argmax(-1)).double().mean())


def _rate(answers: Sequence[Answers]) -> float:
    """New tokens a second, the first of each answer aside."""
    seconds = sum(a.seconds - a.first_seconds for a in answers)
    return sum(a.tokens - 1 for a in answers) / seconds if seconds > 0 else 0.0


def diagnosis(found: SideBySide, model: nn.Module, original: nn.Module, rate: float, before: float) -> list[str]:
    """What may be wrong, in sentences: garbled answers, no speed-up, no memory saved.

    Args:
        rate, before: tokens a second of the model and of its original.
    """
    return [_of_quality(found, model), _of_speed(model, rate, before), _of_memory(model, original)]


def _of_quality(found: SideBySide, model: nn.Module) -> str:
    schemes = Counter(str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear))
    named = ", ".join(f"{scheme} ({count})" for scheme, count in schemes.most_common(3)) or "no quantized linear layer"
    if not found.kl < DRIFTING:  # NaN as well
        how = "answers are garbled" if not found.kl < GARBLED else "answers drift"
        return (
            f"{how} (KL {found.kl:.2f} nats a token): {named}. Too few bits, or calibration unlike these prompts: more bits, "
            "smaller groups, GPTQ or AWQ instead of rounding, or text like what the model will see help"
        )
    return f"answers stay close to the original's (KL {found.kl:.1e} nats a token): {named}"


def _of_speed(model: nn.Module, rate: float, before: float) -> str:
    kernels = Counter(m.layout for m in model.modules() if isinstance(m, QuantLinear))
    ran = ", ".join(f"{name} ({count})" for name, count in kernels.items()) or "no kernel of ours"
    if rate > 1.1 * before:
        return f"{rate:.1f} tokens/s, the original {before:.1f}: {ran}"
    why = "what is quantized is not what takes the time: attention, small layers, PyTorch's own calls"
    if any(name in (canonical.LAYOUT.name, canonical.LAYOUT_A8.name) for name in kernels):
        why = "the plain-PyTorch reference ran, which is slow; qkernels doctor says which kernels there are"
    elif model_bytes(model) < SMALL:
        why = "the model is small: in 16 bits its weights are read about as fast"
    return f"no speed-up: {rate:.1f} tokens/s, the original {before:.1f}; {ran}; {why}"


def _of_memory(model: nn.Module, original: nn.Module) -> str:
    after, was = model_bytes(model), model_bytes(original)
    quantized = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantExperts)))
    floats = {
        id(t): (f"{name} {dtype_name(t.dtype)}", t.nbytes)
        for name, t in model.named_parameters()
        if t.dim() > 1 and not name.startswith(quantized)
    }
    largest = sorted(floats.values(), key=lambda item: -item[1])[:3]
    stayed = ", ".join(f"{name} {readable_size(nbytes)}" for name, nbytes in largest) or "nothing"
    saved = "memory" if after <= 0.75 * was else "little or no memory saved"
    return f"{saved}: {readable_size(after)} of {readable_size(was)}; in floats stay {stayed}"
