"""Every example at the end of every command's --help runs, in a folder that has what it names."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qkernels import load, load_tokenizer, replace_linear, save
from qkernels.checkpoint import to_gguf
from qkernels.cli.main import main, parser
from qkernels.formats.gguf import write_importance
from qkernels.integrations import serving
from qkernels.sizing import importance_of
from tests.hub_server import answers, ask, free_port, hub_of

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo_model"
HUB = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")
ON_A_GPU = ("--device cuda:0", "--tune")
SLOW = ("qkernels bench", "--method awq")  # seconds to a minute


def examples() -> list[str]:
    """Each as one line, without what stands behind it for readers."""
    commands: Any = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    found: list[str] = []
    for command in commands.choices.values():
        text = re.sub(r"\\\n\s*", "", command.epilog.partition("examples:\n")[2])
        found += [re.split(r" {3,}(?![-'])| #", line.strip())[0].strip() for line in text.splitlines() if line.strip()]
    return found


EXAMPLES = examples()


def test_all_examples_are_found() -> None:
    assert len(EXAMPLES) > 50
    assert all(line.startswith(("qkernels ", "cat letter.txt | qkernels ", "curl ")) for line in EXAMPLES), EXAMPLES
    used = {line.split("qkernels ")[-1].split()[0] for line in EXAMPLES if "qkernels " in line}
    assert used == {"bench", "doctor", "eval", "generate", "inspect", "pack", "plan", "quantize", "serve"}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that examples name: a Llama of one layer with the bundled model's tokenizer, quantized in several ways, and texts."""
    here = tmp_path_factory.mktemp("things")
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(here / "my-llama")
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(here / "my-llama")
    for name, scheme, format in (
        ("out", "w4a16_g128", "native"), ("some-gptq-model", "w4a16_g128", "gptq"), ("some-awq-model", "w4a16_g128_asym", "awq"),
    ):  # fmt: skip
        model = load(here / "my-llama")
        replace_linear(model, scheme)
        save(model, here / name, format=format)  # type: ignore[arg-type]
        tokenizer.save_pretrained(here / name)
    for mix in ("Q4_K_M", "Q4_0"):
        to_gguf(here / "my-llama", here / f"model-{mix}.gguf", mix)
    text = (DEMO / "calibration.txt").read_text()
    (here / "text.txt").write_text(text[:8000])
    (here / "held-out.txt").write_text((DEMO / "eval.txt").read_text()[:2000])
    (here / "letter.txt").write_text("My dear sir,")
    (here / "prompts.txt").write_text("It was\nOnce upon\n")
    measured = importance_of(here / "my-llama", calibration=[text[:4000]], samples=2, seq_len=64, dataset="text.txt")
    write_importance(here / "my-llama.imatrix", measured)
    return here


@pytest.fixture
def here(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own with all these things in it, and a Hub that has the float model."""
    for thing in things.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    monkeypatch.chdir(tmp_path)
    with hub_of(dict.fromkeys(HUB, things / "my-llama"), []) as address:
        ask(address, tmp_path / "cache", monkeypatch)
        yield tmp_path


def runs(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of an example, in this process."""
    if line.startswith("cat "):
        fed, _, line = line.partition(" | ")
        monkeypatch.setattr("sys.stdin", io.StringIO(Path(fed.split()[1]).read_text()))
    words, _, target = line.partition(" > ")
    arguments = shlex.split(words)[1:]
    if arguments[0] in ("quantize", "pack") and Path(arguments[2]).is_symlink():
        Path(arguments[2]).unlink()  # what it is to write
    if target:
        with Path(target).open("w") as out:
            monkeypatch.setattr("sys.stdout", out)
            return main(arguments)
    return main(arguments)


def marked(line: str) -> Any:
    marks = []
    if any(words in line for words in SLOW):
        marks.append(pytest.mark.large)
    if any(words in line for words in ON_A_GPU):
        marks.append(pytest.mark.gpu)
    return pytest.param(line, marks=marks)


@pytest.mark.parametrize(
    "line",
    [marked(line) for line in EXAMPLES if not line.startswith(("qkernels serve", "curl")) and "--compare" not in line],
)
def test_example(line: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(line, monkeypatch) == 0
    words = shlex.split(line)
    if words[1] in ("quantize", "pack") and "--dry-run" not in words:
        assert os.path.lexists(words[3]) and not Path(words[3]).is_symlink()


@pytest.mark.large
def test_example_that_compares(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the example before it writes."""
    writes, compares = (
        next(line for line in EXAMPLES if word in line) for word in ("> before.json", "--compare before")
    )
    with monkeypatch.context() as patched:
        assert runs(writes, patched) == 0
    assert runs(compares, monkeypatch) in (0, 3)  # 3: a kernel became slower


@pytest.mark.skipif(not serving.there(), reason=f"serving needs {', '.join(serving.NEEDED)}: {serving.INSTALL}")
@pytest.mark.parametrize("line", [line for line in EXAMPLES if line.startswith("qkernels serve")])
def test_server_of_an_example(line: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what asks it: the curl line, as far as a client without curl can say the same."""
    started: list[Any] = []
    here_now = free_port()

    def beside(path: Path, name: str, host: str, port: int, *args: Any, **options: Any) -> None:
        ports.append(port)
        started.append(original(path, name, host, here_now, *args, **options, non_blocking=True))

    ports: list[int] = []
    original = serving.serve
    monkeypatch.setattr(serving, "serve", beside)
    assert runs(line, monkeypatch) == 0
    words = shlex.split(line)
    assert ports == [int(words[words.index("--port") + 1]) if "--port" in words else 8000]
    name = words[words.index("--name") + 1] if "--name" in words else words[2]
    curl = shlex.split(next(line for line in EXAMPLES if line.startswith("curl")))
    header, value = curl[curl.index("-H") + 1].split(": ")
    body = curl[curl.index("-d") + 1].replace('"out/"', f'"{name}"').encode()
    address = curl[1].replace(":8000", f":{here_now}")
    request = urllib.request.Request(address, body, {header: value})
    try:
        answers(f"http://127.0.0.1:{here_now}/health", 20)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200 and b'"text"' in answer.read()
    finally:
        for server in started:
            server.kill_server()
