"""Whole models: what they take, a row of them, and the comparison with llama.cpp, where that is installed the run itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks.method import envelope, environment
from benchmarks.models import gguf_file, gguf_whole, llama, llama_cpp, sweep
from benchmarks.models.llama import SIZES, Llama, predicted_memory
from benchmarks.peers import ggml
from qkernels import load, load_tokenizer
from qkernels.checkpoint import to_gguf
from qkernels.errors import ConversionError
from qkernels.nn import QuantLinear
from qkernels.scheme import QuantScheme
from tests.gguf_golden import FILES
from tests.gguf_written import FIELDS
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")
HERE = importlib.util.find_spec("llama_cpp") is not None
needs_llama_cpp = pytest.mark.skipif(not HERE, reason="SKIPPED: llama-cpp-python is not installed")


def test_predicted_memory_is_what_the_weights_take() -> None:
    g = SIZES["tiny"]
    for scheme in (None, QuantScheme.parse("w4a16_g128"), QuantScheme.parse("w8a16_g128")):
        model = Llama(g, scheme, 40, torch.bfloat16, CPU)
        taken = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        predicted = predicted_memory(g, scheme, 40, 32)
        # norms, rotary tables and positions are not in the arithmetic: less than 1 %
        assert predicted.total - predicted.activations == pytest.approx(taken, rel=0.01)


def test_the_model_decodes_as_it_prefills() -> None:
    torch.manual_seed(0)
    model = Llama(SIZES["tiny"], None, 8, torch.float32, CPU)
    tokens = torch.randint(0, 100, (1, 6))
    places = torch.arange(8)
    with torch.inference_mode():
        whole = model(tokens, places[:6])
        model(tokens[:, :4], places[:4])
        for i in (4, 5):
            last = model(tokens[:, i : i + 1], places[i : i + 1])
    assert torch.allclose(whole, last, rtol=1e-3, atol=1e-3 * float(whole.std()))


def test_rows_of_the_same_commit_stay_in_their_file(tmp_path: Path) -> None:
    row = sweep.measure("tiny", "int4", "eager", CPU, prompt=8, new_tokens=2, repeats=1)
    assert row.prefill_tokens_per_s > 0
    assert row.predicted_bytes > row.weight_bytes / 2
    where = environment.describe(CPU)
    sweep.write([row], where, tmp_path / "models-tiny.json")
    assert sweep.rows_of(tmp_path / "models-tiny.json", where["commit"]) == [row]
    assert sweep.rows_of(tmp_path / "models-tiny.json", "0123456789ab") == []
    assert "| tiny " in (tmp_path / "models-tiny.md").read_text()


# --- llama.cpp


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


def test_the_cpus_ops_are_the_operators_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt and of single tokens, in fp32."""
    model = Llama(SIZES["tiny"], None, 16, torch.float32, CPU)
    run = llama_cpp.our_logits(model, model)
    with torch.inference_mode():
        by_ops = llama_cpp.timed(run, list(range(1, 9)), [5, 6, 7])[2]
        monkeypatch.setattr(llama, "_by_ops", lambda x: False)
        torch.testing.assert_close(by_ops, llama_cpp.timed(run, list(range(1, 9)), [5, 6, 7])[2], rtol=1e-3, atol=1e-3)


def test_other_logits_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="no match, no number"):
        llama_cpp.check({"a": torch.randn(1000), "b": torch.randn(1000)}, "a")


@pytest.mark.skipif(HERE, reason="llama-cpp-python is installed")
def test_without_llama_cpp_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert llama_cpp.main(["--size", "tiny", "--out", str(tmp_path / "r.json")]) == 0
    assert "llama.cpp is not here" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_loaded_model_in_the_plain_decoder_is_the_same_model(tmp_path: Path) -> None:
    """Of a file in a mix: q, k and v in types of their own, an embedding that is packed; prompt and one token more."""
    torch.manual_seed(0)
    tiny_model("llama", **FIELDS).save_pretrained(tmp_path / "hf")
    load_tokenizer(FILES / "llama.gguf").save_pretrained(tmp_path / "hf")
    to_gguf(tmp_path / "hf", tmp_path / "m.gguf", "Q4_K_M")
    model = load(tmp_path / "m.gguf", dtype=torch.float32)
    tokens = torch.arange(1, 9)
    with torch.inference_mode():
        bare = gguf_whole.Loaded(model, 16)
        found = torch.cat([bare(tokens[None, :7], torch.arange(7)), bare(tokens[None, 7:], torch.tensor([7]))])
        expected = gguf_whole.hand_written(model, tokens[:7], tokens[7:])
    assert llama_cpp.logit_error(expected, found) < 1e-5


@pytest.mark.skipif(HERE, reason="llama-cpp-python is installed")
def test_whole_files_are_not_measured_without_llama_cpp(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gguf_whole.main(["speed", str(tmp_path / "none.gguf"), "--out", str(tmp_path / "r.json")]) == 0
    assert "llama.cpp is not here" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_comparison_keeps_its_rows_and_conditions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file and the page, without llama.cpp: what was compared is given."""
    row = llama_cpp.SpeedRow("llama.cpp Q4_0", 300.0, 75.0, 55.0, 0.01, [1.0, 1.0, 1.0], [1.0, 0.9, 1.1])
    given = llama_cpp.Comparison([row], ["w4a8_g32: no kernel"], 10**6, 1e-4)
    monkeypatch.setattr(llama_cpp, "compare", lambda *_: given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert llama_cpp.main(["--size", "tiny", "--prompt", "16", "--out", str(tmp_path / "r.json")]) == 0
    found = envelope.read(tmp_path / "r.json", "llama.cpp")
    assert [llama_cpp.SpeedRow(**fields) for fields in found.rows] == [row]
    kept = ("size", "prompt", "new_tokens", "reasons", "token_bytes", "reading")
    assert [found.conditions[name] for name in kept] == ["tiny", 16, 32, given.reasons, 10**6, 1e-4]
    assert "* unmeasured: w4a8_g32: no kernel" in (tmp_path / "r.md").read_text()


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
    rows = envelope.read(tmp_path / "r.json", "llama.cpp").rows
    assert [row["candidate"] for row in rows][:2] == ["llama.cpp Q4_0", "qkernels w4a16_g32"]
    assert all(row["logit_error"] < llama_cpp.SAME for row in rows)


@needs_llama_cpp
def test_a_wrong_rotation_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gguf_file, "paired", lambda rows, heads: rows)
    with pytest.raises(RuntimeError, match="no match, no number"):
        llama_cpp.main(
            ["--size", "tiny", "--prompt", "64", "--new-tokens", "2", "--rounds", "1", "--out", str(tmp_path / "r")]
        )
