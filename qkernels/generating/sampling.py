"""Continue prompts with a model, one as a stream or several as a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ArgumentError
from ..texts import capped

log = logging.getLogger(__name__)

Emit = Callable[[str], None]


@dataclass(frozen=True)
class Answers:
    """What a model made of prompts.

    Args:
        texts: of each prompt the continuation, without what stopped it.
        ids: its tokens, up to the end or the padding.
        prompt_tokens: of all prompts, without padding.
        first_seconds, seconds: until the first new token, and in all.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    prompt_tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens(self) -> int:
        """New ones, of all prompts."""
        return sum(map(len, self.ids))

    def rates(self) -> str:
        """Tokens a second, in words: of the prompt, of what was made after it."""
        rest = self.seconds - self.first_seconds
        later = self.tokens - len(self.ids)
        made = f", then {later / rest:.1f} tokens/s" if later > 0 and rest > 0 else ""
        return (
            f"{self.prompt_tokens} prompt tokens and the first new one in {self.first_seconds:.2f} s"
            f"{made}; {self.tokens} tokens in {self.seconds:.2f} s, {self.tokens / self.seconds:.1f} tokens/s"
        )


def prompt_ids(
    tokenizer: Any, prompts: Sequence[str], chat: bool = False, system: str | None = None
) -> list[list[int]]:
    """Token ids of prompts.

    Args:
        tokenizer: of transformers.
        chat: each prompt is what a user says, put into the tokenizer's chat template.
        system: what comes before it, in a chat.

    Raises:
        ArgumentError: a prompt has no token; there is no chat template, or it does not take these messages.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ArgumentError(
            "--chat needs a chat template, and this tokenizer has none: give the prompt as it is to be read"
        )
    if system is not None and not chat:
        raise ArgumentError("--system is a part of a chat: add --chat")
    found = []
    for prompt in prompts:
        if chat:
            messages = [{"role": "user", "content": prompt}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            try:
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except Exception as error:  # templates are programs, and fail in as many ways
                raise ArgumentError(f"the chat template does not take this prompt: {error}") from error
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise ArgumentError(f"--prompt must have at least one token, got {prompt!r:.80}")
        found.append([int(token) for token in ids])
    return found


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    stop: Sequence[str] = (),
    emit: Emit | None = None,
    **sampling: Any,
) -> Answers:
    """Continue prompts, several as one batch (padded on the left).

    Args:
        prompts: token ids.
        tokens: new ones for each prompt, at most; fewer, with a warning, where the model has no positions for them.
        stop: an answer ends before the first of these texts.
        emit: is given pieces of the answer as they come; for one prompt alone.
        sampling: of `model.generate`.

    Raises:
        ArgumentError: a stream of several prompts, an empty text to stop at, or a prompt that fills the model's context.
    """
    if emit is not None and len(prompts) != 1:
        raise ArgumentError(f"one prompt is streamed, got {len(prompts)}")
    if any(not text for text in stop):
        raise ArgumentError("--stop must not be empty")
    tokens = with_room(model, prompts, tokens)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(t, int)), 0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    stream = Stream(tokenizer, stop, emit)
    others = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            pad_token_id=pad,
            streamer=_Clock(stream),
            **others,
            **sampling,
        )
    seconds = time.perf_counter() - start
    stream.end()
    ends = _ends(model, tokenizer)
    rows = [_until(row[longest:].tolist(), ends, pad) for row in made.cpu()]
    texts = [before(tokenizer.decode(row, skip_special_tokens=True), stop) for row in rows]
    first = (stream.first or start + seconds) - start
    return Answers(tuple(texts), tuple(map(tuple, rows)), sum(map(len, prompts)), first, seconds)


def with_room(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """`tokens`, at most those that the model has positions for after the longest prompt; says so where these are fewer.

    Raises:
        ArgumentError: there is no room for one. (Learned positions would end in an index error, others in words without sense.)
    """
    longest = max(map(len, prompts))
    room = capped(model, longest + tokens) - longest
    if room < 1:
        raise ArgumentError(
            f"a prompt of {longest} tokens leaves no room in the {longest + room} that this model was made for: shorten it"
        )
    if room < tokens:
        log.warning(
            "%d new tokens at most, not %d: with the prompt they make up the %d that this model was made for",
            room, tokens, longest + room,
        )  # fmt: skip
    return room


def before(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of these.

    >>> from qkernels.generating.sampling import before
    >>> before("One. Two. Three.", ["Three", "Two"])
    'One. '
    """
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens after which a model says no more."""
    found = getattr(model.generation_config, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return {token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int)}


def _until(row: list[int], ends: set[int], pad: int) -> list[int]:
    """New tokens up to the one that ended them: what follows is padding."""
    for index, token in enumerate(row):
        if token in ends:
            return row[: index + 1]
    while row and row[-1] == pad and pad not in ends:
        row = row[:-1]
    return row


class Stream:
    """Text as its tokens come, whole characters at a time and nothing of what it stops at.

    A token may be a part of a character, and the beginning of a text to stop at may be the answer's own: such ends are held back
    until it is clear.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], emit: Emit | None) -> None:
        self._tokenizer, self._stop, self._emit = tokenizer, stop, emit
        self._ids: list[int] = []
        self._given = 0
        self.first: float | None = None

    def token(self, token: int) -> None:
        """One more token."""
        self.first = self.first or time.perf_counter()
        self._ids.append(token)
        if self._emit is not None:
            self._give(final=False)

    def end(self) -> None:
        """There are no more."""
        if self._emit is not None:
            self._give(final=True)

    def _give(self, final: bool) -> None:
        assert self._emit is not None
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        ready = before(text, self._stop)
        if not final and ready == text:
            ready = text[: len(text) - held_back(text, self._stop)]
        if len(ready) > self._given:
            self._emit(ready[self._given :])
            self._given = len(ready)


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may still turn out otherwise: parts of a character, the beginning of a stop.

    >>> from qkernels.generating.sampling import held_back
    >>> held_back("and then\\nUs", ["\\nUser:"]), held_back("na\\ufffd", []), held_back("done", ["x"])
    (3, 1, 0)
    """
    broken = len(text) - len(text.rstrip("\ufffd"))
    begun = (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return max([broken, *begun])


class _Clock:
    """What transformers calls a streamer: it is given the prompt first, then each token (of a batch, a row of them)."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._prompt = stream, True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist()[:1]:
            self._stream.token(int(token))

    def end(self) -> None:
        """The stream is ended by whoever made it."""
