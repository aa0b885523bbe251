"""Models by their id on the Hub, from a server of our own that says what was asked of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qkernels import QuantLinear, inspect, load, load_tokenizer, replace_linear, save
from qkernels.cli.main import main
from qkernels.errors import CheckpointError, MissingPackage
from qkernels.hub import HubId, hub_id, local_copy
from qkernels.planning import plan
from tests.hub_server import ask, hub_of

GOLDEN = Path(__file__).parent / "golden"
NEVER = ("pytorch_model.bin", "modeling_evil.py", "original/params.json", "consolidated.safetensors", "onnx/model.onnx")


@pytest.fixture
def asked(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server with a model of safetensors, a quantized one and one of two GGUF files, and an empty cache."""
    floats, small, blocks = (tmp_path / "hub" / name for name in ("floats", "small", "blocks"))
    shutil.copytree(tiny_llama_dir, floats)
    for name in NEVER:
        (floats / name).parent.mkdir(exist_ok=True)
        (floats / name).write_bytes(b"do not read me")
    model = load(tiny_llama_dir)
    replace_linear(model, "w4a16_g32")
    save(model, small, format="gptq")
    blocks.mkdir()
    for name in ("llama", "llama-k"):
        shutil.copy(GOLDEN / "gguf" / f"{name}.gguf", blocks)
    (blocks / "README.md").write_text("two files")
    requests: list[str] = []
    with hub_of({"me/floats": floats, "me/small": small, "me/blocks": blocks}, requests) as address:
        ask(address, tmp_path / "cache", monkeypatch)
        yield requests


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("me/floats", HubId("me/floats")),
        ("me/blocks:Q4_K_M", HubId("me/blocks", "Q4_K_M")),
        ("me/blocks:a-b.gguf", HubId("me/blocks", "a-b.gguf")),
        ("tests/nothing-there", None),  # its folder is here: a path that was misspelled
        ("./me/floats", None),
        ("/me/floats", None),
        ("me", None),
        ("me/floats/more", None),
        ("me/../floats", None),
        ("me/model.gguf", None),
    ],
)
def test_what_an_id_is(text: str, found: HubId | None) -> None:
    assert hub_id(text) == found
    assert hub_id(Path(text)) is None


def test_loaded_once_and_never_what_runs(asked: list[str], tiny_llama_dir: Path) -> None:
    ids = torch.arange(8)[None]
    model = load("me/floats")
    assert torch.equal(model(ids).logits, load(tiny_llama_dir)(ids).logits)
    assert load_tokenizer("me/floats")("the cat")["input_ids"]
    fetched = [line for line in asked if line.startswith("GET") and "/resolve/" in line]
    assert any("model.safetensors" in line for line in fetched)
    assert not any(name in line for line in asked for name in NEVER)
    load("me/floats")
    assert [line for line in asked if line.startswith("GET") and "/resolve/" in line] == fetched


def test_revisions(asked: list[str]) -> None:
    assert Path(local_copy("me/floats", "v1")).name == Path(local_copy("me/floats")).name
    load("me/small", revision="v1")
    with pytest.raises(CheckpointError, match="me/floats has no revision 'v9'"):
        local_copy("me/floats", "v9")
    with pytest.raises(CheckpointError, match=r"revision 'v1' is of models on the Hub .* got the path /tmp"):
        local_copy("/tmp", "v1")


def test_offline_is_offline(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    load("me/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked.clear()
    assert load("me/small").config.model_type == "llama"
    assert inspect("me/small").format == "gptq"
    with pytest.raises(CheckpointError, match=r"me/floats is not in the cache of the Hub.*HF_HUB_OFFLINE is set"):
        load("me/floats")
    assert asked == []


def test_gguf_files_by_name_or_type(asked: list[str]) -> None:
    with pytest.raises(CheckpointError, match="me/blocks holds 2 GGUF files; name one: me/blocks:llama-k.gguf"):
        load("me/blocks")
    assert load("me/blocks:llama-k.gguf").config.model_type == "llama"
    assert not any("llama.gguf" in line for line in asked)
    assert str(local_copy("me/blocks:llama-k")).endswith("llama-k.gguf")
    with pytest.raises(CheckpointError, match="has no safetensors or GGUF file 'Q9'"):
        local_copy("me/blocks:Q9")


def test_headers_alone_make_a_plan(asked: list[str], tmp_path: Path) -> None:
    """The same plan as of the files, and no more read of them than their headers."""
    sources = {"me/floats": "floats", "me/small": "small", "me/blocks:llama-k.gguf": "blocks/llama-k.gguf"}
    for name, path in sources.items():
        here, there = plan(str(tmp_path / "hub" / path), context=16), plan(name, context=16)
        assert [(r.scheme, r.file) for r in there.rows] == [(r.scheme, r.file) for r in here.rows]
        if name != "me/small":
            assert [r.weights for r in there.rows] == [r.weights for r in here.rows]
        else:  # whether zero points are all the same takes their values: 4 bits for each group of 32 are allowed for
            layers = [m for m in load(tmp_path / "hub" / path).modules() if isinstance(m, QuantLinear)]
            groups = sum(m.in_features * m.out_features // 32 for m in layers)
            assert here.rows[0].weights < there.rows[0].weights <= here.rows[0].weights + groups
    whole = [line for line in asked if line.startswith("GET") and line.endswith((".safetensors", ".gguf"))]
    assert whole == []
    ranged = [line for line in asked if "bytes=" in line]
    assert ranged and not (tmp_path / "cache" / "models--me--blocks").exists()


def test_commands_take_ids(asked: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", "me/small", "--revision", "v1"]) == 0
    assert "w4a16_g32" in capsys.readouterr().out
    assert main(["generate", "me/small", "--prompt", "the cat", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert main(["quantize", "me/floats", str(tmp_path / "q"), "--method", "rtn", "--group-size", "32"]) == 0
    assert (tmp_path / "q" / "tokenizer.json").is_file()
    assert main(["pack", "me/small", str(tmp_path / "p"), "--format", "native"]) == 0
    assert main(["plan", "me/floats", "--device", "24GiB", "--json"]) == 0
    capsys.readouterr()
    assert main(["inspect", "me/nothing"]) == 1
    assert "there is no me/nothing here and none on the Hub" in capsys.readouterr().err
    assert main(["inspect", "gated/model"]) == 1
    assert "gated/model is gated" in capsys.readouterr().err


def test_a_hub_that_is_gone_is_said(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", (), raising=False)
    with pytest.raises(CheckpointError, match="me/floats"):
        load("me/floats")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match="pip install huggingface_hub"):
        local_copy("me/floats")
