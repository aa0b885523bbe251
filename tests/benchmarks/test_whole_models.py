"""The comparison with llama.cpp: the file it reads, the check before the clock, and the run itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gguf_file, llama, llama_cpp
from benchmarks.llama import SIZES, Llama
from benchmarks.peers import ggml
from qkernels.errors import ConversionError
from qkernels.nn import QuantLinear
from qkernels.scheme import QuantScheme

HERE = importlib.util.find_spec("llama_cpp") is not None
needs_llama_cpp = pytest.mark.skipif(not HERE, reason="SKIPPED: llama-cpp-python is not installed")


def tiny(scheme: str) -> Llama:
    torch.manual_seed(0)
    return Llama(SIZES["tiny"], QuantScheme.parse(scheme), 64, torch.bfloat16, torch.device("cpu"), quantized_head=True)


def test_q4_0_bytes_hold_the_same_weight() -> None:
    layer = tiny("w4a16_g32").head
    assert isinstance(layer, QuantLinear)
    weight = layer.quant_tensor()
    rows = gguf_file.q4_0_bytes(weight)
    assert torch.equal(ggml.meaning(ggml.Q4_0, rows.flatten(), weight.N, weight.K), weight.dequantize(torch.float32))


def test_a_weight_that_q4_0_cannot_hold_is_refused() -> None:
    layer = tiny("w4a16_g128").head
    assert isinstance(layer, QuantLinear)
    with pytest.raises(ConversionError, match="groups of 32"):
        gguf_file.q4_0_bytes(layer.quant_tensor())


def test_halves_become_pairs() -> None:
    """Heads of 4 rows: 0 and 2 turn together, 1 and 3 do."""
    assert gguf_file.paired(torch.arange(8)[:, None], 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_file_has_its_tensors_where_the_header_says(tmp_path: Path) -> None:
    model, path = tiny("w4a16_g32"), tmp_path / "m.gguf"
    gguf_file.write(model, path)
    raw = path.read_bytes()
    assert raw[:8] == b"GGUF\x03\0\0\0"
    assert int.from_bytes(raw[8:16], "little") == 3 + 9 * SIZES["tiny"].layers
    assert len(raw) % gguf_file.ALIGNMENT == 0
    *_, (_, _, _, last) = gguf_file.tensors(model)
    stored = last.numel() * last.element_size()
    padding = -stored % gguf_file.ALIGNMENT
    assert (
        raw[len(raw) - padding - stored : len(raw) - padding] == last.contiguous().view(torch.uint8).numpy().tobytes()
    )


def test_attention_written_out_is_attention() -> None:
    """fp32, so that nothing is rounded to 16 bits; positions after the token's are masked."""
    q, keys, values = (torch.randn(1, 2, n, 16) for n in (4, 32, 32))
    mask = torch.where(torch.arange(32) <= 20, 0.0, -torch.inf)[None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    torch.testing.assert_close(llama._written_out(q, keys, values, mask), expected)
    assert not torch.allclose(llama._written_out(q, keys, values, torch.zeros_like(mask)), expected)


def test_other_logits_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="no match, no number"):
        llama_cpp.check({"a": torch.randn(1000), "b": torch.randn(1000)}, "a")


@pytest.mark.skipif(HERE, reason="llama-cpp-python is installed")
def test_without_llama_cpp_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert llama_cpp.main(["--size", "tiny", "--out", str(tmp_path / "r.json")]) == 0
    assert "llama.cpp is not here" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@needs_llama_cpp
def test_the_same_model_runs_in_both(tmp_path: Path) -> None:
    options = [
        "--size",
        "tiny",
        "--prompt",
        "16",
        "--new-tokens",
        "2",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert llama_cpp.main(options) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["candidate"] for row in rows][:2] == ["llama.cpp Q4_0", "qkernels w4a16_g32"]
    assert all(row["logit_error"] < llama_cpp.SAME for row in rows)


@needs_llama_cpp
def test_a_wrong_rotation_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gguf_file, "paired", lambda rows, heads: rows)
    with pytest.raises(RuntimeError, match="no match, no number"):
        llama_cpp.main(
            ["--size", "tiny", "--prompt", "64", "--new-tokens", "2", "--rounds", "1", "--out", str(tmp_path / "r")]
        )
