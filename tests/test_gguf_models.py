"""GGUF files as models: those that gguf-py wrote compute transformers' logits, and what is not read is refused by name."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qkernels import QuantLinear, QuantTensor, inspect, load, save
from qkernels.checkpoint import convert, gguf, open_checkpoint, to_gguf
from qkernels.cli.main import main
from qkernels.errors import ArgumentError, CheckpointError, UnsupportedProblem
from qkernels.formats.gguf import dequantize
from qkernels.models.gguf_names import GGUF_ARCHITECTURES, GGUF_MIXTURES
from qkernels.storage.gguf import GgufSource
from qkernels.texts import load_tokenizer
from tests.gguf_blocks import split_as
from tests.gguf_golden import FILES, rewritten
from tests.gguf_golden import MODELS as GOLDEN
from tests.gguf_written import FIELDS
from tests.tiny_models import tiny_model

IDS = torch.arange(12)[None] * 7 % 64

with safe_open(FILES / "logits.safetensors", "pt") as _file:
    LOGITS: dict[str, Tensor] = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118
    TEXT: str = _file.metadata()["text"]
    TEXT_IDS: dict[str, list[int]] = json.loads(_file.metadata()["ids"])

LLAMA_CPP = json.loads((FILES / "ggml.json").read_text(encoding="utf-8"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def off(model: Any, name: str) -> float:
    """The largest error of the logits, of their largest value."""
    return float((logits(model) - LOGITS[name]).abs().max() / LOGITS[name].abs().max())


def test_large_layers_are_packed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers, turned rows of q and k, biases and a head of its own included; a broken scale is told of in any part."""
    for name in ("llama", "qwen2"):
        path = tmp_path / f"{name}.gguf"
        torch.manual_seed(0)
        tiny_model(name, **FIELDS).save_pretrained(tmp_path / name)
        load_tokenizer(FILES / f"{name}.gguf").save_pretrained(tmp_path / name)
        to_gguf(tmp_path / name, path, "Q4_K_M")
        whole = load(path).state_dict()
        monkeypatch.setattr(gguf, "_WEIGHTS_AT_ONCE", 2**14)
        checkpoint = open_checkpoint(path)
        counts = {m: len(list(parts)) for m in checkpoint.modules if (parts := checkpoint.weight_in_parts(m))}
        assert counts["model.layers.0.self_attn.q_proj"] == 4 and counts["lm_head"] == 5
        in_parts = load(path).state_dict()
        monkeypatch.undo()
        assert in_parts.keys() == whole.keys()
        assert all(torch.equal(in_parts[key], value) for key, value in whole.items())
    monkeypatch.setattr(gguf, "_WEIGHTS_AT_ONCE", 2**14)
    entry = GgufSource.open(path).entry("blk.0.ffn_down.weight")
    data = bytearray(path.read_bytes())
    last = entry.offset + entry.nbytes - entry.type.nbytes
    data[last : last + entry.type.nbytes] = b"\xff" * entry.type.nbytes
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="blk.0.ffn_down.weight"):
        load(path)


def test_int8_activations_are_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Every layer whose values are integers, a tied head and one that comes in parts; the rest stays, and is named."""
    path = tmp_path / "m.gguf"
    torch.manual_seed(0)
    tiny_model("llama", **FIELDS, tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    load_tokenizer(FILES / "llama.gguf").save_pretrained(tmp_path / "hf")
    to_gguf(tmp_path / "hf", path, "Q4_K_M", tensor_types=[("blk.1.ffn_down", "IQ4_NL")])
    plain, fast = load(path), load(path, activations="int8")
    schemes = {n: str(m.scheme) for n, m in fast.named_modules(remove_duplicate=False) if isinstance(m, QuantLinear)}
    assert schemes["lm_head"] == "q6_k_a8" and schemes["model.layers.0.mlp.up_proj"] == "q4_k_a8"
    assert all(scheme.endswith("_a8") for scheme in schemes.values()), schemes
    assert fast.lm_head is fast.model.embed_tokens.table
    assert not [m for m in plain.modules() if isinstance(m, QuantLinear) and m.scheme.act]
    a, b = logits(plain), logits(fast)
    assert 1e-4 < float((a - b).norm() / a.norm()) < 0.1
    assert torch.equal(fast.model.embed_tokens(IDS), plain.model.embed_tokens(IDS))
    monkeypatch.setattr(gguf, "_WEIGHTS_AT_ONCE", 2**14)
    assert torch.equal(logits(load(path, activations="int8")), b)
    caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr("qkernels.checkpoint.activations.select", _refusing)
        kept = load(path, activations="int8")
    assert "int8 activations were asked for, which no kernel here has" in caplog.text
    assert torch.equal(logits(kept), a)
    with pytest.raises(ArgumentError, match='"file", "16bit", "int8" or None, got'):
        load(path, activations="int4")  # type: ignore[arg-type]


def _refusing(problem: Any, on_unsupported: Any) -> Any:
    raise UnsupportedProblem("no")


# --- files of gguf-py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_transformers(name: str) -> None:
    """Float models alike to the last bits; where some layers are quantized, their products are summed in another order."""
    model = load(FILES / f"{name}.gguf", dtype=torch.float32)
    assert off(model, name) < 2e-6
    model = load(FILES / f"{name}.gguf")
    assert off(model, name) < 0.05  # 16 bits: eight times 2^-8 for six layers


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Log-probabilities of every token after 12, relative to what they span: what this package and the script that made the files
    believe alike would show here. llama.cpp quantizes activations to 8 bits, and knows of no window in llama files."""
    path = FILES / f"{name}.gguf"
    if name == "mistral":
        path = rewritten(name, tmp_path / "m.gguf", {"llama.attention.sliding_window": None})
    found = torch.log_softmax(logits(load(path, dtype="float32"))[0, -1].double(), -1)
    expected = torch.tensor(LLAMA_CPP["logprobs"][name], dtype=torch.float64)
    spread = float(expected.max() - expected.min())
    allowed = {
        "llama-mixed": 5e-3, "llama-k": 1e-2, "qwen3": 2e-3, "gemma3": 2e-3, "mixtral": 2e-2, "qwen2moe": 2e-2, "qwen3moe": 2e-2,
        "deepseek3": 5e-2, "gpt-oss": 2e-2,
    }.get(name, 5e-4)  # fmt: skip
    assert float((found - expected).abs().max()) < allowed * spread


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    tokenizer = load_tokenizer(FILES / f"{name}.gguf")
    assert [tokenizer(text)["input_ids"] for text in LLAMA_CPP["texts"]] == LLAMA_CPP["ids"][name]


@pytest.mark.parametrize("pre", LLAMA_CPP["ids_by_pre"])
def test_text_is_split_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    path = rewritten("llama", tmp_path / "m.gguf", split_as(pre, GgufSource.open(FILES / "llama.gguf")))
    tokenizer = load_tokenizer(path)
    assert [tokenizer(text)["input_ids"] for text in LLAMA_CPP["texts"]] == LLAMA_CPP["ids_by_pre"][pre]


def test_every_architecture_has_a_file() -> None:
    files = {name: GgufSource.open(FILES / f"{name}.gguf") for name in GOLDEN}
    named = {name: str(file.get("general.architecture")) for name, file in files.items()}
    mixtures = {named[name] for name, file in files.items() if file.get(f"{named[name]}.expert_count")}
    assert {*named.values()} == {*GGUF_ARCHITECTURES, *GGUF_MIXTURES}
    assert mixtures == {*GGUF_MIXTURES}
    assert LOGITS.keys() == {*GOLDEN} and len(GOLDEN) == 17
    assert load(FILES / "deepseek2.gguf").config.model_type == "deepseek_v2"
    assert load(FILES / "deepseek3.gguf").config.model_type == "deepseek_v3"  # of the same name in files


@pytest.mark.parametrize("name", GOLDEN)
def test_tokenizers_are_those_of_the_original(name: str) -> None:
    tokenizer = load_tokenizer(FILES / f"{name}.gguf")
    assert tokenizer(TEXT)["input_ids"] == TEXT_IDS[name]
    assert tokenizer.decode(TEXT_IDS[name], skip_special_tokens=True) == TEXT
    special = {
        "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
        "gpt-oss": ("<|startoftext|>", "<|return|>", "<|endoftext|>"),
    }.get(name.rstrip("23"), ("<s>", "</s>", "<pad>"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == special
    assert tokenizer(special[1], add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 300
    chat = [{"role": "user", "content": "the moon"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "the moon"


def test_blocks_that_schemes_hold_run_packed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(FILES / "llama-mixed.gguf")
    schemes = {
        name.rpartition(".")[2]: str(m.scheme) for name, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    assert schemes == {
        "q_proj": "w4a16_g32", "k_proj": "w5a16_g32_offset", "v_proj": "w8a16_g32", "o_proj": "w4a16_g32_offset",
        "gate_proj": "w5a16_g32", "up_proj": "mxfp4_g32", "lm_head": "w4a16_g32", "table": "w8a16_g32",
    }  # fmt: skip
    assert "embeddings are dequantized" not in caplog.text
    assert model.dtype == torch.bfloat16


def test_blocks_without_a_kernel_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """They are dequantized, with a line; a quantized directory, whose scheme somebody chose, is refused as before."""
    make = QuantLinear.from_quant_tensor

    def five_bits_only(weight: QuantTensor, *others: Any) -> QuantLinear:
        if weight.scheme.bits != 5:
            raise UnsupportedProblem("no kernel")
        return make(weight, *others)

    convert(FILES / "llama-mixed.gguf", tmp_path / "native")
    monkeypatch.setattr(QuantLinear, "from_quant_tensor", five_bits_only)
    monkeypatch.setattr(QuantLinear, "from_parts", lambda parts, *others: five_bits_only(next(iter(parts))))
    with caplog.at_level(logging.WARNING):
        model = load(FILES / "llama-mixed.gguf", dtype="float32")
    assert {str(m.scheme) for m in model.modules() if isinstance(m, QuantLinear)} == {"w5a16_g32", "w5a16_g32_offset"}
    assert off(model, "llama-mixed") < 2e-6
    assert (
        "w8a16_g32 has no kernel for float32 on this cpu and is dequantized: 2 modules, first model.layers.0"
        in caplog.text
    )
    with pytest.raises(UnsupportedProblem, match="no kernel"):
        load(tmp_path / "native")


def test_blocks_are_decoded_in_the_dtype_of_the_model() -> None:
    """One rounding, and no copy in float32 on the way; in float32 where no model asks."""
    checkpoint = open_checkpoint(FILES / "llama-k.gguf")
    model = load(FILES / "llama-k.gguf")
    named = checkpoint.named_as_in(model)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        exact = checkpoint.read(name)
        assert (exact.dtype, checkpoint.dtype(name)) == (torch.float32, torch.float32)
        rounded = named.read(name)
        assert (rounded.dtype, named.dtype(name)) == (torch.bfloat16, torch.bfloat16)
        assert torch.equal(rounded, exact.bfloat16())
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight, rounded)


def test_packed_rows_are_those_of_the_model() -> None:
    """Rope pairs: rows of packed blocks are put in the order of transformers before anything is decoded."""
    checkpoint = open_checkpoint(FILES / "llama-mixed.gguf")
    for file, module, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):
        source = GgufSource.open(FILES / "llama-mixed.gguf")
        rows = dequantize(source.blocks(f"blk.1.{file}.weight"), source.entry(f"blk.1.{file}.weight").type.name)
        if heads:
            rows = rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        weight, oddities = checkpoint.weight(f"model.layers.1.self_attn.{module}")
        assert torch.equal(weight.dequantize(), rows) and not oddities


def test_a_folder_and_parts(tmp_path: Path) -> None:
    shutil.copy(FILES / "qwen3.gguf", tmp_path / "model.gguf")
    assert off(load(tmp_path, dtype="float32"), "qwen3") < 2e-6
    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == TEXT_IDS["qwen3"]
    (tmp_path / "parts").mkdir()
    rewritten("qwen3", tmp_path / "parts" / "m.gguf", max_part_bytes=20000)
    assert len(list((tmp_path / "parts").iterdir())) == 3
    assert off(load(tmp_path / "parts", dtype="float32"), "qwen3") < 2e-6
    assert load_tokenizer(tmp_path / "parts" / "m-00003-of-00003.gguf").eos_token == "</s>"


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(FILES / "llama-mixed.gguf")
    assert (found.architecture, found.method, found.version, found.format) == (
        "LlamaForCausalLM",
        "gguf",
        "Q8_0",
        "gguf",
    )
    assert found.schemes == {
        "w4a16_g32": 3,
        "w5a16_g32_offset": 2,
        "w8a16_g32": 2,
        "w4a16_g32_offset": 2,
        "w5a16_g32": 2,
        "Q8_0": 1,
        "mxfp4_g32": 2,
    }
    assert [tensor.dtype for tensor in found.unquantized if tensor.name.endswith("0.mlp.down_proj.weight")] == [
        "bfloat16"
    ]
    assert {engine.name: engine.serves for engine in found.engines} == {
        "qkernels": True,
        "llama.cpp": True,
        "transformers": True,
        "vLLM": True,
        "vLLM with qkernels": False,
        "SGLang": True,
        "Ollama": True,
    }
    assert 4 < (found.bits_per_weight or 0) < 9
    assert main(["inspect", str(FILES / "llama-mixed.gguf")]) == 0
    assert "| model.layers.0.mlp.up_proj | 64 x 32 | mxfp4_g32" in re.sub(" +", " ", capsys.readouterr().out)
    assert inspect(FILES / "llama.gguf").format is None


def test_generate_and_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", str(FILES / "llama-mixed.gguf"), "--prompt", "the cat", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    assert main(["eval", str(FILES / "qwen3.gguf"), "--text", str(tmp_path / "text.txt"), "--seq-len", "32"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_what_is_read_can_be_written(tmp_path: Path) -> None:
    """Every weight stays as it is, in our format; and in a folder of a model that was loaded from a file."""
    expected = load(FILES / "llama-mixed.gguf", dtype="float32")
    convert(FILES / "llama-mixed.gguf", tmp_path / "native")
    save(expected, tmp_path / "saved")
    for directory in (tmp_path / "native", tmp_path / "saved"):
        assert torch.equal(logits(load(directory, dtype="float32")), logits(expected))
        assert load_tokenizer(directory)(TEXT)["input_ids"] == TEXT_IDS["llama-mixed"]


def test_tied_and_separate_heads(tmp_path: Path) -> None:
    assert (
        load(FILES / "qwen3.gguf").config.tie_word_embeddings
        and not load(FILES / "llama.gguf").config.tie_word_embeddings
    )
    with_head = rewritten(
        "qwen3", tmp_path / "m.gguf", change=lambda t: t.update({"output.weight": t["token_embd.weight"]})
    )
    assert off(load(with_head, dtype="float32"), "qwen3") < 2e-6
    without = rewritten("llama", tmp_path / "n.gguf", change=lambda t: t.pop("token_embd.weight"))
    with pytest.raises(CheckpointError, match=r"has no token_embd\.weight, which tied embeddings and heads need too"):
        load(without)
