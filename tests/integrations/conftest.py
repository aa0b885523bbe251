"""The vLLM plug-in beside a vLLM that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integrations import fake_vllm


@pytest.fixture
def ranks() -> SimpleNamespace:
    return SimpleNamespace(world=1, rank=0)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, ranks: SimpleNamespace) -> Iterator[Any]:
    yield fake_vllm.plugin_beside(monkeypatch, ranks)
    fake_vllm.forget()
