"""GGUF files as models: those that gguf-py wrote compute transformers' logits, and what is not read is refused by name."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from qkernels import QuantLinear, inspect, load, save
from qkernels.checkpoint import convert, open_checkpoint
from qkernels.checkpoint.gguf import GgufCheckpoint
from qkernels.cli.main import main
from qkernels.errors import CheckpointError
from qkernels.formats.gguf import dequantize
from qkernels.models.gguf_config import llama3_factors, llama3_rope
from qkernels.models.gguf_names import GGUF_ARCHITECTURES
from qkernels.storage.gguf import GgufSource
from qkernels.storage.gguf_header import MetaValue
from qkernels.storage.gguf_writer import Planned, gguf_writer
from qkernels.texts import load_tokenizer
from tests.gguf_blocks import split_as

FILES = Path(__file__).parent / "golden" / "gguf"
GOLDEN = sorted(path.stem for path in FILES.glob("*.gguf"))
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


Change = Mapping[str, MetaValue | None]
Tensors = dict[str, tuple[str, Tensor]]  # name -> type and blocks or numbers


def tensors_of(source: GgufSource) -> Tensors:
    return {
        name: (entry.type.name, source.blocks(name) if entry.type.dtype is None else source.read(name))
        for name, entry in source.entries.items()
    }


def rewritten(
    name: str, path: Path, meta: Change = {}, change: Callable[[Tensors], object] | None = None, **options: Any  # noqa: B006
) -> Path:  # fmt: skip
    """A golden file with other metadata (None: without that key) and tensors."""
    source = GgufSource.open(FILES / f"{name}.gguf")
    tensors = tensors_of(source)
    if change is not None:
        change(tensors)
    metadata = {key: value for key, value in {**source.metadata, **meta}.items() if value is not None}
    shapes = {
        n: t.shape if k not in BLOCKS else (*t.shape[:-1], t.shape[-1] // BLOCKS[k][1] * BLOCKS[k][0])
        for n, (k, t) in tensors.items()
    }
    with gguf_writer(
        path, metadata, [Planned(n, k, tuple(shapes[n])) for n, (k, _) in tensors.items()], **options
    ) as writer:
        for key, (_, tensor) in tensors.items():
            writer.add(key, tensor)
    return path


BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}


def number(value: int) -> MetaValue:
    return MetaValue("u32", value)


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
    """Log-probabilities of every token after 12, which span 0.57 to 1.05: what this package and the script that made the files
    believe alike would show here. llama.cpp quantizes activations to 8 bits, and knows of no window in llama files."""
    path = FILES / f"{name}.gguf"
    if name == "mistral":
        path = rewritten(name, tmp_path / "m.gguf", {"llama.attention.sliding_window": None})
    found = torch.log_softmax(logits(load(path, dtype="float32"))[0, -1].double(), -1)
    expected = torch.tensor(LLAMA_CPP["logprobs"][name], dtype=torch.float64)
    packed = name in ("llama-mixed", "qwen3")
    assert float((found - expected).abs().max()) < (3e-3 if packed else 8e-4 if name == "gemma3" else 3e-4)


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
    assert {GgufSource.open(FILES / f"{name}.gguf").get("general.architecture") for name in GOLDEN} == {
        *GGUF_ARCHITECTURES
    }
    assert LOGITS.keys() == {*GOLDEN} and len(GOLDEN) == 9


@pytest.mark.parametrize("name", GOLDEN)
def test_tokenizers_are_those_of_the_original(name: str) -> None:
    tokenizer = load_tokenizer(FILES / f"{name}.gguf")
    assert tokenizer(TEXT)["input_ids"] == TEXT_IDS[name]
    assert tokenizer.decode(TEXT_IDS[name], skip_special_tokens=True) == TEXT
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
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
        "gate_proj": "w5a16_g32", "lm_head": "w4a16_g32",
    }  # fmt: skip
    assert (
        "MXFP4 has no kernel yet and is dequantized while loading: 2.12 KiB of MXFP4 become 8.00 KiB in 16 bits: 2 modules"
        in caplog.text
    )
    assert (
        "embeddings are dequantized while loading: 9.96 KiB of Q8_0 become 18.75 KiB in 16 bits: 1 module"
        in caplog.text
    )
    assert model.dtype == torch.bfloat16


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
        "MXFP4": 2,
    }
    assert [tensor.dtype for tensor in found.unquantized if tensor.name.endswith("0.mlp.down_proj.weight")] == [
        "bfloat16"
    ]
    assert {engine.name: engine.serves for engine in found.engines} == {
        "qkernels": True,
        "llama.cpp": True,
        "transformers": True,
        "vLLM": True,
    }
    assert 4 < (found.bits_per_weight or 0) < 9
    assert main(["inspect", str(FILES / "llama-mixed.gguf")]) == 0
    assert "| model.layers.0.mlp.up_proj | 64 x 32 | MXFP4" in re.sub(" +", " ", capsys.readouterr().out)
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


# --- values of the config ----------------------------------------------------------------------------------------------


def config_of(
    name: str, path: Path, change: Callable[[Tensors], object] | None = None, **meta: MetaValue | None
) -> Mapping[str, Any]:
    """`meta`: keys with __ for a dot."""
    changed = {key.replace("__", "."): value for key, value in meta.items()}
    return GgufCheckpoint.open(rewritten(name, path / "m.gguf", changed, change, overwrite=True)).config


def test_special_tokens(tmp_path: Path) -> None:
    assert config_of("qwen2", tmp_path)["eos_token_id"] == 1
    assert config_of("qwen2", tmp_path, tokenizer__ggml__eot_token_id=number(7))["eos_token_id"] == [1, 7]
    assert config_of("qwen2", tmp_path, tokenizer__ggml__eos_token_id=None)["eos_token_id"] is None
    with pytest.raises(CheckpointError, match="tokenizer.ggml.bos_token_id must be the number of a token, got 300"):
        config_of("qwen2", tmp_path, tokenizer__ggml__bos_token_id=number(300))


def test_numbers_have_their_shortest_form(tmp_path: Path) -> None:
    config = config_of(
        "llama", tmp_path, llama__attention__layer_norm_rms_epsilon=MetaValue("f32", 9.999999747378752e-06)
    )
    assert config["rms_norm_eps"] == 1e-5


def test_dtypes(tmp_path: Path) -> None:
    def all_f32(tensors: Tensors) -> None:
        tensors.update({name: ("F32", tensor.float()) for name, (_, tensor) in tensors.items()})

    assert config_of("llama", tmp_path)["dtype"] == "float16"
    assert config_of("gemma2", tmp_path)["dtype"] == "bfloat16"
    assert config_of("llama", tmp_path, all_f32)["dtype"] == "float32"
    assert config_of("llama-mixed", tmp_path)["dtype"] == "bfloat16"


def test_layers_with_a_window(tmp_path: Path) -> None:
    def windows(name: str, **meta: MetaValue | None) -> list[bool]:
        return [kind == "sliding_attention" for kind in config_of(name, tmp_path, **meta)["layer_types"]]

    assert windows("gemma2") == [True, False]
    assert windows("gemma3") == [True] * 5 + [False]
    assert windows("gemma3", gemma3__attention__sliding_window_pattern=number(2)) == [True, False] * 3
    listed = MetaValue("[bool]", array("B", [0, 1, 1, 0, 0, 1]))
    assert windows("gemma3", gemma3__attention__sliding_window_pattern=listed) == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    with pytest.raises(CheckpointError, match="sliding_window_pattern has 1 entries for 6 layers"):
        windows("gemma3", gemma3__attention__sliding_window_pattern=MetaValue("[bool]", [True]))


def test_the_largest_gemmas_divide_by_another_number(tmp_path: Path) -> None:
    def scalar(name: str, layers: int) -> int:
        keys = {
            "block_count": layers,
            "attention__key_length": 16,
            "attention__value_length": 16,
            "rope__dimension_count": 16,
        }
        found: int = config_of(name, tmp_path, **{f"{name}__{key}": number(value) for key, value in keys.items()})[
            "query_pre_attn_scalar"
        ]
        return found

    assert [scalar("gemma2", layers) for layers in (2, 42, 46)] == [16, 16, 8]  # 8 = 32 channels / 4 heads
    assert [scalar("gemma3", layers) for layers in (6, 46, 62)] == [16, 16, 8]


@pytest.mark.parametrize(
    ("low", "high", "old", "factor", "theta", "half"),
    [
        (1.0, 4.0, 8192, 8.0, 5e5, 64),
        (1.0, 4.0, 8192, 32.0, 5e5, 32),
        (2.0, 6.0, 4096, 16.0, 1e6, 64),
        (1.0, 4.0, 8192, 8.0, 5e5, 8),
    ],
)
def test_llama3_scaling_is_found_from_its_factors(
    low: float, high: float, old: int, factor: float, theta: float, half: int
) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": old,
    }
    turns = theta ** -(torch.arange(half, dtype=torch.float64) / half) / (2 * math.pi)
    factors = llama3_factors(scaling, turns).float()
    found = llama3_rope(factors, theta)
    assert torch.allclose(llama3_factors(found, turns).float(), factors, rtol=1e-4)
    assert found["factor"] == factor and found["high_freq_factor"] == pytest.approx(high / low, rel=1e-3)
    assert found["original_max_position_embeddings"] == pytest.approx(old / low, rel=1e-3)
    with pytest.raises(
        CheckpointError, match=r"the rope factors in rope_freqs\.weight are not those of a llama3 scaling"
    ):
        llama3_rope(factors.flip(0), theta)


# --- what is not read is refused ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Change, str]] = {
    "no architecture": ("llama", {"general.architecture": None}, "has no general.architecture, so it holds no model"),
    "unknown": (
        "llama",
        {"general.architecture": MetaValue("string", "rwkv7")},
        "architecture 'rwkv7'; GGUF files of llama, qwen2,",
    ),
    "experts": ("llama", {"llama.expert_count": number(8)}, "with 8 experts a layer, which are not read"),
    "layers": ("llama", {"llama.block_count": number(1)}, r"has blk\.1\..*, but says that it has 1 layers"),
    "no layers": (
        "llama",
        {"llama.block_count": None},
        r"llama\.block_count must be an integer of 1 … .*, got no such key",
    ),
    "zero heads": (
        "llama",
        {"llama.attention.head_count": number(0)},
        r"head_count must be an integer of 1 … 2\^31 - 1, got 0",
    ),
    "text": (
        "llama",
        {"llama.embedding_length": MetaValue("string", "x")},
        "llama.embedding_length must be an integer",
    ),
    "heads a layer": (
        "llama",
        {"llama.attention.head_count_kv": MetaValue("[u32]", array("I", [1, 2]))},
        "one for each layer, which differ",
    ),
    "heads": (
        "llama",
        {"llama.attention.head_count": number(3)},
        r"blk\.0\.attn_q\.weight has rows \[64\], which are no 3 heads of pairs",
    ),
    "values": ("qwen3", {"qwen3.attention.value_length": number(4)}, "has keys of 8 and values of 4 channels a head"),
    "epsilon": (
        "llama",
        {"llama.attention.layer_norm_rms_epsilon": MetaValue("f32", float("nan"))},
        "must be a positive number, got nan",
    ),
    "huge": (
        "llama",
        {"llama.rope.freq_base": MetaValue("f64", 1e300)},
        r"freq_base must be a positive number, got 1e\+300",
    ),
    "partial rope": (
        "qwen3",
        {"qwen3.rope.dimension_count": number(4)},
        "turns 4 of 8 channels a head by rope, which qwen3 models",
    ),
    "rope": (
        "llama-mixed",
        {"llama.rope.scaling.type": MetaValue("string", "ntk")},
        "scales rope by 'ntk'; none, linear and yarn are read",
    ),
    "rope twice": (
        "llama",
        {"llama.rope.scaling.type": MetaValue("string", "linear"), "llama.rope.scaling.factor": MetaValue("f32", 2.0)},
        "has rope_freqs.weight and rope scaling linear at once",
    ),
    "window": (
        "qwen2",
        {"qwen2.attention.sliding_window": number(4)},
        "has a sliding window but not the layers that it is for",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(case: str, tmp_path: Path) -> None:
    name, meta, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(rewritten(name, tmp_path / "m.gguf", meta))


def spoil(name: str, kind: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: (kind, tensor)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            spoil("blk.0.ffn_gate_exps.weight", "F32", torch.zeros(2, 2)),
            r"has a tensor blk\.0\.ffn_gate_exps\.weight \(F32 \[2, 2\]\)",
        ),
        (spoil("v.patch_embd.weight", "F32", torch.zeros(2)), r"has a tensor v\.patch_embd\.weight"),
        (
            spoil("blk.0.attn_q.scale", "F32", torch.zeros(2)),
            r"attn_q\.scale must be one F32 number beside blk\.0\.attn_q\.weight",
        ),
        (
            spoil("blk.0.attn_z.scale", "F32", torch.zeros(1)),
            r"must be one F32 number beside blk\.0\.attn_z\.weight, got F32 \[1\]",
        ),
        (
            spoil("rope_freqs.weight", "F32", torch.ones(5)),
            r"rope_freqs\.weight must be 8 positive F32 numbers, got F32 \[5\]",
        ),
        (
            lambda tensors: tensors.pop("blk.1.ffn_up.weight"),
            r"1 tensors it needs are missing, for example model\.layers\.1\.mlp\.up_proj",
        ),
        (
            spoil("blk.0.attn_v.bias", "F32", torch.ones(32)),
            r"1 tensors are unknown to it, for example blk\.0\.attn_v\.bias",
        ),
        (
            spoil("output_norm.weight", "F32", torch.ones(5)),
            r"model\.norm\.weight: the model needs a float tensor \[32\], got float32 \[5\]",
        ),
        (
            spoil("output_norm.weight", "I32", torch.ones(32, dtype=torch.int32)),
            r"needs a float tensor \[32\], got int32 \[32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(rewritten("llama", tmp_path / "m.gguf", change=change))


def test_blocks_that_are_no_numbers(tmp_path: Path) -> None:
    def infinite(name: str, at: int) -> Callable[[Tensors], object]:
        def change(tensors: Tensors) -> None:
            kind, blocks = tensors[name]
            blocks = blocks.clone()
            blocks[0, at : at + 2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
            tensors[name] = (kind, blocks)

        return change

    for name, message in (
        ("blk.0.attn_v.weight", "scales must be finite"),
        ("token_embd.weight", "weights are not finite"),
    ):
        path = rewritten("llama-mixed", tmp_path / "m.gguf", change=infinite(name, 0), overwrite=True)
        with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
            load(path)
        with pytest.raises(CheckpointError, match=rf"1 of 14 quantized modules are broken:\n  .*{name}.*{message}"):
            inspect(path)


def test_keys_that_are_not_understood_are_said(tmp_path: Path) -> None:
    path = rewritten("llama", tmp_path / "m.gguf", {"llama.attention.scale": MetaValue("f32", 0.5)})
    assert any(
        "metadata that is not understood: 1 module, first llama.attention.scale (0.5)" in line
        for line in inspect(path).oddities
    )


def test_nvfp4_has_a_number_beside_it(tmp_path: Path) -> None:
    def nvfp4(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        blocks = torch.randint(0, 256, (32, 36), generator=generator, dtype=torch.uint8)
        tensors["blk.0.ffn_down.weight"] = ("NVFP4", blocks)
        tensors["blk.0.ffn_down.scale"] = ("F32", torch.tensor([0.25]))
        tensors["blk.0.ffn_down.input_scale"] = ("F32", torch.tensor([3.0]))

    path = rewritten("llama", tmp_path / "m.gguf", change=nvfp4)
    checkpoint = GgufCheckpoint.open(path)
    weight = checkpoint.read("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(weight, dequantize(checkpoint.source.blocks("blk.0.ffn_down.weight"), "NVFP4") * 0.25)
    assert any("scales of activations are left aside" in line for line in inspect(path).oddities)
    assert load(path).model.layers[0].mlp.down_proj.weight.shape == (32, 64)
