"""`qkernels serve` with the clients that people have: `openai`, and plain HTTP."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qkernels import RTN, load, load_tokenizer, quantize
from qkernels.cli.main import main
from qkernels.errors import CheckpointError
from qkernels.integrations import serving
from tests.hub_server import answers, free_port
from tests.integrations.openai_checks import GAPS, failing

needs_server = pytest.mark.skipif(
    not serving.there(), reason=f"serving needs {', '.join(serving.NEEDED)}: {serving.INSTALL}"
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("served")
    for format in ("native", "gptq", "awq", "compressed-tensors"):
        asym = {"symmetric": False} if format == "awq" else {}
        quantize(
            tiny_llama_dir, RTN(bits=4, group_size=32, **asym), save_to=out / format, format=format, progress=False
        )
    return out


class Running:
    """A server of one model, and how to ask it."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.port = free_port()
        batching = options.pop("continuous_batching", False)
        self.server = serving.serve(
            path, "tiny", "127.0.0.1", self.port, torch.device("cpu"), None, batching, non_blocking=True, **options
        )
        answers(f"http://127.0.0.1:{self.port}/health", 20)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return json.load(answer)

    def post(self, **fields: Any) -> Any:
        body = json.dumps({"model": "tiny", "prompt": "the cat", "max_tokens": 8, "temperature": 0} | fields).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture
def running(quantized: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    started = Running(quantized / "native", **getattr(request, "param", {}))
    yield started
    started.server.kill_server()


def continuation(path: Path, tokens: int = 8) -> str:
    tokenizer, model = load_tokenizer(path), load(path)
    ids = tokenizer("the cat", return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0)
    text: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


GGUF = Path(__file__).parent.parent / "golden" / "gguf" / "llama-k.gguf"


@needs_server
@pytest.mark.parametrize("format", ["native", "gptq", "awq", "compressed-tensors", "gguf"])
def test_plain_http(quantized: Path, format: str) -> None:
    """What the server says is what the model says, not what random weights would."""
    source = GGUF if format == "gguf" else quantized / format
    started = Running(source)
    try:
        assert [model["id"] for model in started.get("/v1/models")["data"]] == ["tiny"]
        answer = started.post()
        assert answer["choices"][0]["text"].strip() == continuation(source).strip()
        assert answer["usage"]["completion_tokens"] == 8
    finally:
        started.server.kill_server()


@needs_server
@pytest.mark.parametrize("running", [{}, {"continuous_batching": True}], indirect=True, ids=["plain", "batching"])
def test_openai_client(running: Running) -> None:
    """Streamed and not, eight at once, and one that goes away in the middle."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(prompt: str, **fields: Any) -> Any:
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, **fields)

    whole = ask("the cat").choices[0].text
    pieces = [chunk.choices[0].text for chunk in ask("the cat", stream=True) if chunk.choices]
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, ["the cat"] * 8))
    assert all(answer.usage.completion_tokens == 8 for answer in answers)
    stream = client.completions.create(model="tiny", prompt="the moon", max_tokens=20, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    assert ask("the cat").choices[0].text == whole


@needs_server
def test_a_temperature_is_heeded(running: Running) -> None:
    """The model's generation_config does not sample, and the engine leaves it at that."""
    assert len({running.post(temperature=2.0)["choices"][0]["text"] for _ in range(4)}) > 1
    assert len({running.post()["choices"][0]["text"] for _ in range(2)}) == 1  # 0


@needs_server
@pytest.mark.large
@pytest.mark.parametrize("batching", [False, True])
def test_gaps_are_those_of_the_page(batching: bool, tmp_path: Path) -> None:
    """What docs/serving.md lists, and nothing else."""
    demo = Path(__file__).parent.parent.parent / "examples" / "demo_model"
    quantize(demo, RTN(), save_to=tmp_path / "out", progress=False)
    tokenizer = load_tokenizer(tmp_path / "out")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "out")
    started = Running(tmp_path / "out", continuous_batching=batching)
    try:
        found = failing(f"http://127.0.0.1:{started.port}", "tiny", 1024)
        assert set(found) == GAPS["transformers, batching" if batching else "transformers"], found
    finally:
        started.server.kill_server()


def test_what_the_server_does_not_do_is_said(quantized: Path) -> None:
    gaps = "\n".join(serving.check(quantized / "native", "tiny", False).gaps)
    for what in (
        "no chat template",
        "context of this model",
        "logprobs",
        "token ids",
        "stop string",
        "wait for one another",
    ):
        assert what in gaps
    assert "first request's sampling" in "\n".join(serving.check(quantized / "native", "tiny", True).gaps)


def test_a_model_without_text_is_refused(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SimpleNamespace(config={"architectures": ["BertForMaskedLM"]})
    monkeypatch.setattr(serving, "open_checkpoint", lambda path: encoder)
    with pytest.raises(CheckpointError, match="is a BertForMaskedLM; served are"):
        serving.check(quantized / "native", "tiny", False)


@needs_server
def test_an_address_is_tried_before_the_weights_are_read(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "serve", lambda *_, **others: pytest.fail("it served"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, why in (
            (["--port", port], f"cannot listen at 127.0.0.1:{port}: .*in use"),
            (["--port", "99999"], "--port must be 1 to 65535, got 99999"),
            (["--host", "300.1.2.3"], "cannot listen at 300.1.2.3:8000: "),
            (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1:8000: "),  # RFC 5737: nobody's
        ):
            assert main(["serve", str(quantized / "native"), *words]) == 1
            assert re.search(why, capsys.readouterr().err)
    serving.need_address("127.0.0.1", free_port())
    serving.need_address("localhost", free_port())


def test_a_missing_extra_is_named(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "NEEDED", ("fastapi_is_not_here",))
    assert main(["serve", str(quantized / "native")]) == 1
    assert "serving needs fastapi_is_not_here, not installed: pip install 'qkernels[serve]'" in capsys.readouterr().err
