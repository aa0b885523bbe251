"""What a user of the `openai` package may expect of a server: python openai_checks.py ADDRESS MODEL CONTEXT

Prints a line for each expectation, JSON at the end: {name: why it failed}. Needs the package openai and nothing of ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PROMPTS = (
    "It was a dark night", "The captain of the ship", "She looked at him", "There was once a king", "My dear sir,",
    "In the garden", "He said nothing", "When the war was over",
)  # fmt: skip


# What engines do not do, by the names of `failing`; docs/serving.md says it in words.
_TRANSFORMERS = {
    "echo", "list of prompts", "logprobs", "n", "response format", "responses", "stop", "token ids", "too long prompt is refused",
}  # fmt: skip
GAPS: dict[str, set[str]] = {
    "transformers": _TRANSFORMERS,
    "transformers, batching": {*_TRANSFORMERS, "temperature"},  # the sampling of the first request holds for all
    "vLLM": set(),
}


class Asked:
    """A server, and what is expected of it: each method named `expect_…` raises AssertionError where it is not so."""

    def __init__(self, address: str, model: str, context: int) -> None:
        from openai import OpenAI

        # A connection may be closed after an error, which is no other one: that is what the retry is for.
        self.client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=1, timeout=120)
        self.model, self.context = model, context

    def complete(self, prompt: Any = PROMPTS[0], **fields: Any) -> Any:
        given = {"model": self.model, "prompt": prompt, "max_tokens": 12, "temperature": 0} | fields
        return self.client.completions.create(**given)

    def chat(self, **fields: Any) -> Any:
        messages = [{"role": "user", "content": "Hello"}]
        given = {"model": self.model, "messages": messages, "max_tokens": 12, "temperature": 0} | fields
        return self.client.chat.completions.create(**given)

    def expect_models(self) -> None:
        assert self.model in [model.id for model in self.client.models.list().data]

    def expect_tokens_counted(self) -> None:
        usage = self.complete().usage
        assert usage.completion_tokens == 12 and usage.prompt_tokens > 0

    def expect_stream(self) -> None:
        chunks = list(self.complete(stream=True, stream_options={"include_usage": True}))
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
        assert "".join(pieces) == self.complete().choices[0].text, pieces
        assert len([piece for piece in pieces if piece]) > 1
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12

    def expect_eight_clients(self) -> None:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(self.complete, PROMPTS))
        assert [answer.usage.completion_tokens for answer in answers] == [12] * 8

    def expect_next_after_a_stream_that_was_left(self) -> None:
        stream = self.complete(PROMPTS[1], max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
        assert self.complete(max_tokens=1).usage.completion_tokens == 1

    def expect_stop(self) -> None:
        whole = self.complete(max_tokens=32).choices[0].text
        letter = next(c for c in whole[3:] if c.isalpha())
        choice = self.complete(max_tokens=32, stop=[letter]).choices[0]
        assert choice.text == whole.partition(letter)[0], (choice.text, letter)
        assert choice.finish_reason == "stop"

    def expect_seed(self) -> None:
        first, second = (self.complete(seed=1, temperature=1).choices[0].text for _ in range(2))
        assert first == second

    def expect_temperature(self) -> None:
        assert len({self.complete(temperature=1.5, max_tokens=24).choices[0].text for _ in range(4)}) > 1

    def expect_n(self) -> None:
        assert len(self.complete(n=2, temperature=1).choices) == 2

    def expect_list_of_prompts(self) -> None:
        assert len(self.complete(list(PROMPTS[:2])).choices) == 2

    def expect_token_ids(self) -> None:
        assert self.complete([5, 6, 7]).usage.prompt_tokens == 3

    def expect_logprobs(self) -> None:
        found = self.complete(logprobs=2).choices[0].logprobs
        assert found is not None and len(found.token_logprobs) == 12

    def expect_echo(self) -> None:
        assert self.complete(echo=True).choices[0].text.startswith(PROMPTS[0])

    def expect_chat(self) -> None:
        assert self.chat().choices[0].message.role == "assistant"

    def expect_chat_stream(self) -> None:
        pieces = [c.choices[0].delta.content or "" for c in self.chat(stream=True) if c.choices]
        assert "".join(pieces) == self.chat().choices[0].message.content

    def expect_response_format(self) -> None:
        text = self.chat(response_format={"type": "json_object"}, max_tokens=40).choices[0].message.content
        assert text.strip().startswith("{"), text

    def expect_responses(self) -> None:
        assert self.client.responses.create(model=self.model, input="Hello", max_output_tokens=8).output_text

    def expect_too_long_prompt_is_refused(self) -> None:
        from openai import BadRequestError

        try:
            self.complete("word " * 2 * self.context, max_tokens=1)
        except BadRequestError:
            return
        raise AssertionError("it was answered")


def failing(address: str, model: str, context: int) -> dict[str, str]:
    """What is not as expected, and why."""
    asked = Asked(address, model, context)
    found = {}
    for name in [name for name in dir(Asked) if name.startswith("expect_")]:
        check: Callable[[], None] = getattr(asked, name)
        called = name.removeprefix("expect_").replace("_", " ")
        try:
            check()
            print(f"{called}: as expected", file=sys.stderr)
        except Exception as error:  # whatever a client meets
            found[called] = f"{type(error).__name__}: {str(error)[:120]}"
            print(f"{called}: {found[called]}", file=sys.stderr)
    return found


if __name__ == "__main__":
    print(json.dumps(failing(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
