"""`pack` to GGUF files and back: quantized checkpoints of other formats, without loss or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import RTN, load, load_tokenizer, quantize
from qkernels.checkpoint import convert, plan_gguf, to_gguf
from qkernels.cli.main import main
from qkernels.errors import ConversionError
from qkernels.storage.gguf import GgufSource
from tests.gguf_golden import FILES
from tests.gguf_written import weights_of
from tests.tiny_models import tiny_model

pytest.importorskip("transformers")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 300}


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "hf"
    tiny_model("llama", **WIDE).half().save_pretrained(path)
    load_tokenizer(FILES / "llama.gguf").save_pretrained(path)
    return path


def made(floats: Path, out: Path, method: Any, format: str, **options: Any) -> Path:
    quantize(floats, method, save_to=out, format=format, progress=False, **options)
    return out


def same(a: Path, b: Path) -> bool:
    first, second = (weights_of(load(path, dtype="float32")) for path in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("method", "format", "type"),
    [
        (RTN(bits=4, group_size=32), "gptq", "Q4_0"),
        (RTN(bits=4, group_size=64, symmetric=False), "awq", "Q5_0"),
        (RTN(bits=8, group_size="channel"), "compressed-tensors", "Q8_0"),
        (RTN(bits=3, group_size=32), "native", "Q4_0"),
    ],
)
def test_quantized_checkpoints_become_files_of_the_same_weights(
    method: RTN, format: str, type: str, floats: Path, tmp_path: Path
) -> None:
    source = made(floats, tmp_path / "q", method, format)
    assert main(["pack", str(source), str(tmp_path / "m.gguf")]) == 0
    written = GgufSource.open(tmp_path / "m.gguf")
    assert {e.type.name for n, e in written.entries.items() if "attn_q.w" in n or ("ffn" in n and "norm" not in n)} == {
        type
    }
    assert written.entry("token_embd.weight").type.name == "F16"
    assert same(source, tmp_path / "m.gguf")


def test_and_the_way_back(floats: Path, tmp_path: Path) -> None:
    source = made(floats, tmp_path / "q", RTN(bits=4, group_size=32), "gptq")
    to_gguf(source, tmp_path / "m.gguf")
    for format in ("gptq", "native", "compressed-tensors"):
        convert(tmp_path / "m.gguf", tmp_path / format, format)
        assert same(tmp_path / "m.gguf", tmp_path / format)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    to_gguf(floats, tmp_path / "k.gguf", "Q4_1")
    with pytest.raises(
        ConversionError, match="self_attn.k_proj: gptq cannot store this weight: zero points must be integers"
    ):
        convert(tmp_path / "k.gguf", tmp_path / "no", "gptq")
    convert(tmp_path / "k.gguf", tmp_path / "yes", "native")
    assert same(tmp_path / "k.gguf", tmp_path / "yes")


def test_what_would_lose_something_is_refused_with_the_way_out(floats: Path, tmp_path: Path) -> None:
    source = made(floats, tmp_path / "q", RTN(bits=4, group_size=16), "native")
    message = "model.layers.0.self_attn.q_proj: no GGUF type holds .*groups of 16 .*qkernels quantize .*q OUT.gguf --type Q4_K_M"
    with pytest.raises(ConversionError, match=message):
        to_gguf(source, tmp_path / "m.gguf")
    assert main(["quantize", str(source), str(tmp_path / "m.gguf"), "--type", "Q8_0"]) == 0
    assert main(["pack", str(tmp_path / "m.gguf"), str(tmp_path / "n.gguf"), "--format", "gguf"]) == 1
    assert not (tmp_path / "n.gguf").exists()


def test_quantizing_again_keeps_what_the_type_holds(
    floats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GPTQ's codes are better than a new search of the dequantized weight: where the type holds them they stay."""
    source = made(floats, tmp_path / "q", RTN(bits=4, group_size=32), "gptq")
    to_gguf(source, tmp_path / "m.gguf", "Q4_0", tensor_types=[("^output|token_embd", "F16")])
    assert "is quantized already" in caplog.text
    assert same(source, tmp_path / "m.gguf")
    assert plan_gguf(source, "Q4_0").entries["output.weight"].chosen.type == "Q8_0"
