"""GGUF files that are written: what llama.cpp said of them, what our reader makes of them, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import load, load_tokenizer, save
from qkernels.checkpoint import plan_gguf, to_gguf
from qkernels.cli.main import main
from qkernels.errors import ArgumentError, CheckpointError, ConversionError
from qkernels.formats.gguf import dequantize, gguf_blocks, write_importance
from qkernels.models.gguf_mixes import MIXES
from qkernels.models.gguf_names import GGUF_ARCHITECTURES, GGUF_MIXTURES
from qkernels.nn import QuantEmbedding
from qkernels.storage.gguf import GgufSource
from tests.gguf_golden import FILES, MODELS
from tests.gguf_written import FIELDS, IDS, importance_of_model, model_directory, tensors_digest, weights_of
from tests.llama_cpp import library, llama_cpp_logits
from tests.tiny_models import tiny_model

pytest.importorskip("transformers")
GOLDEN = json.loads((FILES / "written.json").read_text(encoding="utf-8"))["mixes"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("written") / "tiny")


# --- every mix ---------------------------------------------------------------------------------------------------------


QUICK = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q8_0",
    "Q2_K",
    "Q3_K_M",
    "Q4_K_M",
    "IQ4_XS",
)  # each type's blocks are tested elsewhere
ROUNDED = {"F32": 1e-4, "F16": 1e-3, "BF16": 1e-2}  # the least error that llama.cpp's activations allow; else 8 bits


@pytest.mark.parametrize("mix", [mix if mix in QUICK else pytest.param(mix, marks=pytest.mark.large) for mix in MIXES])
def test_files_are_those_that_llama_cpp_loaded_and_makes_itself(mix: str, source: Path, tmp_path: Path) -> None:
    """To the bit; how far its logits were from ours, with its activations in 8 bits, is in the golden data."""
    to_gguf(source, tmp_path / "m.gguf", mix)
    golden = GOLDEN[mix]["plain"]
    assert tensors_digest(tmp_path / "m.gguf") == golden["ours"] == golden["theirs"]
    assert golden["logits_error"] < ROUNDED.get(mix, 3e-2)


@pytest.mark.parametrize("mix", ["Q4_0", "Q3_K_M", "Q4_K_M"])
def test_with_importance_too(mix: str, source: Path, tmp_path: Path) -> None:
    """As a user has it: from a file."""
    write_importance(tmp_path / "i.gguf", importance_of_model())
    arguments = [str(source), str(tmp_path / "m.gguf"), "--type", mix.lower(), "--imatrix", str(tmp_path / "i.gguf")]
    assert main(["quantize", *arguments]) == 0
    golden = GOLDEN[mix]["importance"]
    assert tensors_digest(tmp_path / "m.gguf") == golden["ours"] == golden["theirs"] != GOLDEN[mix]["plain"]["ours"]
    written = GgufSource.open(tmp_path / "m.gguf")
    assert (written.get("quantize.imatrix.dataset"), written.get("quantize.imatrix.chunks_count")) == ("moon", 2)


def test_golden_data_covers_every_mix_both_ways() -> None:
    assert GOLDEN.keys() == MIXES.keys()
    for row in GOLDEN.values():
        assert all(way["differ"] == 0 and way["logits_error"] < 3e-2 for way in row.values())


@pytest.mark.parametrize("mix", ["F32", "F16", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS"])
def test_llama_cpp_computes_our_logits(mix: str, source: Path, tmp_path: Path) -> None:
    """And the dequantized file's, where it rounds no activations, to the last bits."""
    library()
    to_gguf(source, tmp_path / "m.gguf", mix)
    to_gguf(tmp_path / "m.gguf", tmp_path / "floats.gguf", "F32")
    with torch.no_grad():
        ours = load(tmp_path / "m.gguf", dtype="float32")(IDS[None]).logits[0]
    for name, bound in (("m", ROUNDED.get(mix, 3e-2)), ("floats", 1e-4)):
        theirs = llama_cpp_logits(tmp_path / f"{name}.gguf", IDS, FIELDS["vocab_size"])
        assert float(((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).max()) < bound, name


def test_what_is_read_back_is_what_was_made(source: Path, tmp_path: Path) -> None:
    """Rows of q and k are turned on the way there and back; the search is asked for each row alone."""
    plan = to_gguf(source, tmp_path / "m.gguf", "Q4_K_M")
    model, before = load(tmp_path / "m.gguf", dtype="float32"), load(source, dtype="float32").state_dict()
    for name, entry in plan.entries.items():
        weight = before[entry.place.name]
        if weight.dim() == 2:
            expected = dequantize(gguf_blocks(weight, entry.chosen.type), entry.chosen.type)
            module = model.get_submodule(entry.place.name.removesuffix(".weight"))
            embeds = isinstance(module, (torch.nn.Embedding, QuantEmbedding))
            found = module.weight if embeds else module.dequantize(torch.float32)
            assert torch.equal(found, expected), name
        else:
            assert torch.equal(model.get_parameter(entry.place.name), weight), name
    assert model.config.max_position_embeddings == 64
    text = "the moon, 1234 times; don't ask"
    assert load_tokenizer(tmp_path / "m.gguf")(text)["input_ids"] == load_tokenizer(source)(text)["input_ids"]


def test_a_better_search_has_less_error(source: Path, tmp_path: Path) -> None:
    before = load(source, dtype="float32").state_dict()
    errors = []
    for search in ("plain", "best"):
        path = tmp_path / f"{search}.gguf"
        assert main(["quantize", str(source), str(path), "--type", "Q3_K_S", "--search", search]) == 0
        made = weights_of(load(path, dtype="float32"))
        errors.append(sum(float((made[name] - weight).square().sum()) for name, weight in before.items()))
    assert errors[1] < 0.97 * errors[0]


def test_pure_and_overrides(source: Path, tmp_path: Path) -> None:
    to_gguf(source, tmp_path / "m.gguf", "Q4_0", pure=True, tensor_types=[("ffn_down", "Q8_0")])
    types = {name: entry.type.name for name, entry in GgufSource.open(tmp_path / "m.gguf").entries.items()}
    assert (types["output.weight"], types["blk.1.ffn_down.weight"], types["blk.1.attn_norm.weight"]) == (
        "Q4_0",
        "Q8_0",
        "F32",
    )
    assert GgufSource.open(tmp_path / "m.gguf").get("general.file_type") == 2


# --- architectures: back to what gguf-py wrote ---------------------------------------------------------------------------


def directory_of(name: str, path: Path) -> Path:
    """A golden file as a directory in float32."""
    load(FILES / f"{name}.gguf", dtype="float32").save_pretrained(path)
    load_tokenizer(FILES / f"{name}.gguf").save_pretrained(path)
    return path


MIXTURES = ("mixtral", "olmoe", "qwen2moe", "qwen3moe", "deepseek2", "deepseek3", "gpt-oss")
PACKED = ("llama-k", "llama-mixed", "qwen3", "mixtral", "qwen2moe", "qwen3moe", "deepseek3", "gpt-oss")
FLOATS = [name for name in MODELS if name not in PACKED]
# Said by default; ranks of merges instead of scores; what the golden files do not have.
DEFAULTS = (
    "key_length",
    "value_length",
    "freq_base_swa",
    "add_eos_token",
    "add_space_prefix",
    "general.type",
    "quantization_version",
    "general.size_label",
    "add_sep_token",
)


@pytest.mark.parametrize("name", FLOATS)
def test_metadata_and_tensors_are_those_of_gguf_py(name: str, tmp_path: Path) -> None:
    to_gguf(directory_of(name, tmp_path / "hf"), tmp_path / "m.gguf", "F16")
    golden, ours = GgufSource.open(FILES / f"{name}.gguf"), GgufSource.open(tmp_path / "m.gguf")
    assert golden.entries.keys() == ours.entries.keys()
    for tensor, entry in golden.entries.items():
        assert (entry.type, entry.shape) == (ours.entry(tensor).type, ours.entry(tensor).shape), tensor
        assert torch.equal(golden.read(tensor), ours.read(tensor)), tensor
    differing = {
        key for key in {*golden.metadata, *ours.metadata} if golden.metadata.get(key) != ours.metadata.get(key)
    }
    unexplained = {key for key in differing if not key.endswith((*DEFAULTS, "general.name", "ggml.scores"))}
    # transformers' Qwen2 class splits text its own way; its Llama class says that <pad> is a token like others
    assert unexplained <= {"tokenizer.ggml.pre", "tokenizer.ggml.token_type"}
    assert ("tokenizer.ggml.pre" in unexplained) == (name == "qwen2")


def test_every_architecture_is_written() -> None:
    ran = [*FLOATS, "qwen3", *MIXTURES]
    named = {GgufSource.open(FILES / f"{name}.gguf").get("general.architecture") for name in ran}
    assert named == {*GGUF_ARCHITECTURES, *GGUF_MIXTURES}


@pytest.mark.parametrize("name", sorted({*FLOATS, "qwen3", *MIXTURES}))
def test_llama_cpp_runs_every_architecture_in_float32(name: str, tmp_path: Path) -> None:
    """Within the window of Mistral's, which llama.cpp does not know; its GELU comes from a table of float16."""
    library()
    to_gguf(FILES / f"{name}.gguf", tmp_path / "m.gguf", "F32")
    ids = torch.arange(4 if name == "mistral" else 24) * 7 % 64
    with torch.no_grad():
        ours = load(tmp_path / "m.gguf", dtype="float32")(ids[None]).logits[0]
    theirs = llama_cpp_logits(tmp_path / "m.gguf", ids, ours.shape[1])
    assert float((ours - theirs).norm() / ours.norm()) < (1e-3 if name.startswith("gemma") else 1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_any_source_are_stacked(name: str, tmp_path: Path) -> None:
    """Gate apart from up, in one type or another; from files in blocks, and from directories of one expert after the other."""
    to_gguf(FILES / f"{name}.gguf", tmp_path / "m.gguf", "F32")
    original, again = (
        weights_of(load(path, dtype="float32")) for path in (FILES / f"{name}.gguf", tmp_path / "m.gguf")
    )
    assert original.keys() == again.keys()
    assert all(torch.equal(original[key], again[key]) for key in original)
    plan = to_gguf(FILES / f"{name}.gguf", tmp_path / "q.gguf", "MXFP4_MOE")
    types = {key.rpartition(".")[0][6:]: entry.chosen.type for key, entry in plan.entries.items() if "blk.1" in key}
    types = types or {key.rpartition(".")[0][6:]: e.chosen.type for key, e in plan.entries.items() if "blk.0" in key}
    assert (types["ffn_up_exps"], types["ffn_gate_inp"], types["attn_output"]) == ("MXFP4", "F32", "Q8_0")
    save(load(tmp_path / "q.gguf", dtype="float32"), tmp_path / "native")
    load_tokenizer(tmp_path / "q.gguf").save_pretrained(tmp_path / "native")
    to_gguf(tmp_path / "native", tmp_path / "r.gguf", "MXFP4_MOE")
    assert tensors_digest(tmp_path / "r.gguf") == tensors_digest(tmp_path / "q.gguf")
    plan = to_gguf(tmp_path / "native", tmp_path / "s.gguf")
    chosen = {entry.chosen.type for key, entry in plan.entries.items() if "ffn_up_exps.weight" in key}
    assert chosen == {"MXFP4"}
    packed, before = (weights_of(load(tmp_path / path, dtype="float32")) for path in ("s.gguf", "native"))
    assert all(torch.equal(packed[key], before[key]) for key in before)


# --- what is refused -----------------------------------------------------------------------------------------------------


def saved(path: Path, model: Any, tokenizer: bool = True) -> Path:
    model.save_pretrained(path)
    if tokenizer:
        load_tokenizer(FILES / "llama.gguf").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("opt", {}, "GGUF files are written of deepseek_v2, .* models, got 'opt'"),
        ("granitemoe", {"num_local_experts": 4}, "got 'granitemoe'"),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": False},
            "no way to say norm_topk_prob .False, read back as True",
        ),
        ("llama", {"hidden_act": "gelu"}, "architecture llama has no way to say hidden_act .'gelu', read back as 'silu'"),
        ("gemma", {"hidden_act": "relu"}, "no way to say hidden_act"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "no way to say query_pre_attn_scalar .100, read back as 8"),
        ("gemma2", {"attn_logit_softcapping": None}, "no way to say attn_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping of a gemma3 model has no key"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "has a sliding window but not the layers that it is for",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "no keys for rope scaled by 'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
                                 "attention_factor": 1.5}},
            "no way to say rope_parameters",
        ),
    ],
)  # fmt: skip
def test_models_that_would_be_read_as_others(
    model_type: str, fields: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    directory = saved(tmp_path / "hf", tiny_model(model_type, vocab_size=300, **fields))
    with pytest.raises((ConversionError, CheckpointError), match=message):
        to_gguf(directory, tmp_path / "m.gguf", "F16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _other(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change tokenizer.json."""

    def apply(directory: Path) -> None:
        path = directory / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return apply


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda directory: (directory / "tokenizer.json").unlink(), "has no readable tokenizer"),
        (_other(lambda t: t.update(pre_tokenizer=_split(r"\d"))), r"splits text by \['.*d'\], for which GGUF files have no name"),
        (_other(lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), "neither byte-level BPE nor BPE with byte fallback"),
        (_other(lambda t: t.update(normalizer={"type": "Lowercase"})), "gives other ids when it is rebuilt .* for 'Hello"),
        (_other(lambda t: t["model"]["vocab"].update(moon=400)), "has ids up to 400, the embedding 300 rows"),
    ],
)  # fmt: skip
def test_tokenizers_that_cannot_be_written(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "hf", tiny_model("llama", vocab_size=300))
    spoil(directory)
    with pytest.raises((ConversionError, CheckpointError), match=message):
        plan_gguf(directory, "F16")


def test_weights_that_a_type_cannot_hold(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    directory = saved(tmp_path / "hf", model)
    with pytest.raises(ConversionError, match="blk.1.ffn_up.weight: weights up to 1e.05 do not fit float16.*take BF16"):
        to_gguf(directory, tmp_path / "m.gguf", "F16")
    to_gguf(directory, tmp_path / "m.gguf", "BF16")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    saved(directory, model)
    with pytest.raises(ConversionError, match="blk.0.ffn_up.weight: weight for Q4_0 must be finite"):
        to_gguf(directory, tmp_path / "n.gguf", "Q4_0")
    assert not (tmp_path / "n.gguf").exists()


def test_ties_that_the_files_do_not_keep(tmp_path: Path) -> None:
    """Two equal tensors are one; two that differ are two, whatever config.json says of them."""
    model = tiny_model("llama", vocab_size=300)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    directory = saved(tmp_path / "hf", model)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "output.weight" not in plan_gguf(directory, "F16").entries
    model.lm_head.weight.data[0] += 1
    saved(directory, model)
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    to_gguf(directory, tmp_path / "m.gguf", "F32")
    assert torch.equal(load(tmp_path / "m.gguf").lm_head.weight, model.lm_head.weight)


def test_more_than_one_token_ends_a_text(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300)
    model.generation_config.eos_token_id = [1, 7]
    written = plan_gguf(saved(tmp_path / "hf", model), "F16").metadata
    assert (written["tokenizer.ggml.eos_token_id"].value, written["tokenizer.ggml.eot_token_id"].value) == (1, 7)


def test_a_space_before_a_text_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """transformers' Llama class puts none before one, against tokenizer.json, sentencepiece and llama.cpp."""
    directory = saved(tmp_path / "hf", tiny_model("llama", vocab_size=300), tokenizer=False)
    load_tokenizer(FILES / "mistral.gguf").save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))
    before = load_tokenizer(directory)
    to_gguf(directory, tmp_path / "m.gguf", "F16")
    after = load_tokenizer(tmp_path / "m.gguf")
    assert before("the moon")["input_ids"] == after("the moon")["input_ids"]
    assert before(" the moon")["input_ids"] != after(" the moon")["input_ids"]


def test_a_vocabulary_may_be_smaller_than_the_embedding(tmp_path: Path) -> None:
    plan = plan_gguf(saved(tmp_path / "hf", tiny_model("llama", vocab_size=320)), "F16")
    assert plan.metadata["tokenizer.ggml.tokens"].value[-1] == "[PAD319]"
    assert plan.metadata["tokenizer.ggml.token_type"].value[-1] == 5


def test_targets_and_arguments(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match="a GGUF file is called something.gguf, got 'm.bin'"):
        to_gguf(source, tmp_path / "m.bin", "F16")
    with pytest.raises(ArgumentError, match="blk.0.attn_k.weight was to be IQ2_S, which is only read; written are"):
        to_gguf(source, tmp_path / "m.gguf", "Q4_0", tensor_types=[("attn_k", "IQ2_S")])
    with pytest.raises(ArgumentError, match="name a type such as Q4_K_M"):
        to_gguf(source, tmp_path / "m.gguf", pure=True)
    with pytest.raises(ConversionError, match="holds no quantized weights; name the type"):
        to_gguf(source, tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF something")
    with pytest.raises(CheckpointError, match="m.gguf"):
        to_gguf(source, tmp_path / "m.gguf", "F16")
    for extra, message in (
        (["--type", "Q4_0", "--bits", "4"], "leave out --bits, or leave out --type"),
        (["--type", "Q4_0", "--scheme", "w4a16_g32"], "leave out --scheme"),
        (["--type", "Q4_0", "--routing", "all"], "leave out --routing"),
        (
            ["--type", "Q4_0", "--method", "rtn"],
            "--method gptq, by --method awq, or without --method by a search; got rtn",
        ),
        (["--type", "Q4_0", "--format", "gptq"], "leave out --format"),
        (["--pure"], "--pure belongs to GGUF files: name a type"),
        (["--search", "best"], "--search belongs to GGUF files: name a type"),
        ([], "for a GGUF file name a type, such as --type Q4_K_M"),
        (["--type", "Q9_K"], "the type of a file must be one of F32, .*, got 'Q9_K'"),
        (["--type", "Q4_0", "--tensor-type", "moon=Q8_0"], "no tensor that is quantized has 'moon' in its name"),
        (["--type", "Q4_0", "--imatrix", str(source / "config.json")], "is no importance file"),
    ):
        assert main(["quantize", str(source), str(tmp_path / "new.gguf"), *extra]) == 1
        assert re.search(message, capsys.readouterr().err), extra
    assert not (tmp_path / "new.gguf").exists()


def test_importance_of_another_model_is_refused(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    measured = importance_of_model()
    other = {f"x.{name}": entry for name, entry in measured.entries.items()}
    with pytest.raises(ArgumentError, match="is of none of this model's tensors"):
        plan_gguf(source, "Q4_0", importance=type(measured)(other))
    some = {name: entry for name, entry in measured.entries.items() if "attn_q" in name}
    with caplog.at_level(logging.WARNING):
        plan_gguf(source, "Q4_0", importance=type(measured)(some))
    assert "18 weights have no importance and are made without, for example blk.0" in caplog.text


def test_dry_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(source), str(tmp_path / "m.gguf"), "--type", "Q4_K_M", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "| attn_v.weight      | 3     | Q4_K 2, Q6_K 1 |" in printed
    assert not (tmp_path / "m.gguf").exists()
    model = saved(tmp_path / "hf", tiny_model("llama", vocab_size=300))
    assert main(["quantize", str(model), str(tmp_path / "m.gguf"), "--type", "Q4_K_M", "--dry-run"]) == 0
    assert "ffn_down.weight: F16 instead of Q6_K, whose blocks do not divide rows of 48" in capsys.readouterr().out
