"""Names in files and names in modules: every class of model, and tensors that are stacked or cut while they load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer

import qkernels.integrations.transformers  # noqa: F401  (save_pretrained writes our format)
from qkernels import RTN, load, quantize, replace_linear, save
from qkernels.errors import CheckpointError, ConversionError
from qkernels.integrations.transformers import QKernelsConfig, enable
from qkernels.nn import QuantExperts, QuantLinear, pretrained
from qkernels.nn.selection import heads

from ..tiny_models import stir

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = TEXT | {
    "num_experts": 11,
    "num_local_experts": 11,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}  # 10 after 9
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
BERT: dict[str, Any] = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True,
}  # fmt: skip


class Kind(NamedTuple):
    """A class of model, its config, what `from_pretrained` reads it with, and how a file names one of its linear layers."""

    model: Any
    config: Callable[[], Any]
    auto: Any
    in_file: str


KINDS = {
    "llava": Kind(
        tf.LlavaForConditionalGeneration,
        lambda: tf.LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_index=60,
        ),
        tf.AutoModelForImageTextToText,
        "language_model.model.layers.1.mlp.up_proj",
    ),
    "qwen2_vl": Kind(
        tf.Qwen2VLForConditionalGeneration,
        lambda: tf.Qwen2VLConfig(
            text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
            image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
        ),
        tf.AutoModelForImageTextToText,
        "model.layers.1.mlp.up_proj",
    ),
    "gpt_neox": Kind(
        tf.GPTNeoXForCausalLM, lambda: tf.GPTNeoXConfig(**BERT), tf.AutoModelForCausalLM, "gpt_neox.layers.1.mlp.dense_h_to_4h"
    ),
    "mixtral": Kind(
        tf.MixtralForCausalLM, lambda: tf.MixtralConfig(**EXPERTS), tf.AutoModelForCausalLM, "model.layers.1.self_attn.q_proj"
    ),
    "qwen3_moe": Kind(
        tf.Qwen3MoeForCausalLM, lambda: tf.Qwen3MoeConfig(**EXPERTS), tf.AutoModelForCausalLM, "model.layers.1.self_attn.q_proj"
    ),
    "bert_masked": Kind(
        tf.BertForMaskedLM, lambda: tf.BertConfig(**BERT), tf.AutoModelForMaskedLM, "bert.encoder.layer.1.output.dense"
    ),
    "bert_classes": Kind(
        tf.BertForSequenceClassification,
        lambda: tf.BertConfig(**BERT, num_labels=3),
        tf.AutoModelForSequenceClassification,
        "bert.encoder.layer.1.output.dense",
    ),
    "t5": Kind(
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(**T5),
        tf.AutoModelForSeq2SeqLM,
        "decoder.block.1.layer.0.SelfAttention.q",
    ),
    "qwen3_base": Kind(tf.Qwen3Model, lambda: tf.Qwen3Config(**TEXT), tf.AutoModel, "layers.1.mlp.up_proj"),
    "llama_classes": Kind(
        tf.LlamaForSequenceClassification,
        lambda: tf.LlamaConfig(**TEXT, num_labels=3),
        tf.AutoModelForSequenceClassification,
        "model.layers.1.mlp.up_proj",
    ),
}  # fmt: skip
SCHEME = "w8a16_g32"


def tiny(kind: Kind) -> Any:
    torch.manual_seed(0)
    model = kind.model(kind.config()).eval()
    stir(model)
    return model


@torch.no_grad()
def answer(model: Any) -> Tensor:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    fields = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids, **fields)[0]
    return found


def close(model: Any, expected: Tensor) -> bool:
    return torch.allclose(answer(model), expected, atol=1e-5, rtol=0)


def quantized(model: nn.Module) -> set[str]:
    found = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    experts = {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}
    return found | {f"{name}.{p}" for name, module in experts.items() for p in module.stacks}


def stored(directory: Path) -> set[str]:
    return {name for path in directory.glob("*.safetensors") for name in load_file(path)}


@pytest.mark.parametrize("name", KINDS)
def test_every_way_through_files(name: str, tmp_path: Path) -> None:
    """Float directory -> load; quantize (stored, in memory, in from_pretrained) -> save -> both loaders: the same answers."""
    kind = KINDS[name]
    model = tiny(kind)
    model.save_pretrained(tmp_path / "float")
    assert f"{kind.in_file}.weight" in stored(tmp_path / "float")
    assert close(load(tmp_path / "float"), answer(model))

    exclude = tuple(heads(model))
    config = QKernelsConfig(SCHEME, exclude=exclude)
    while_loading = kind.auto.from_pretrained(tmp_path / "float", quantization_config=config)
    report = replace_linear(model, SCHEME, exclude=exclude, progress=False)
    expected, chosen = answer(model), set(report.replaced)
    assert quantized(while_loading) == chosen and close(while_loading, expected)
    quantize(tmp_path / "float", RTN(8, 32), save_to=tmp_path / "stored", exclude=exclude, progress=False)
    save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "theirs")
    while_loading.save_pretrained(tmp_path / "again")
    load(tmp_path / "saved").save_pretrained(tmp_path / "loaded")
    names = stored(tmp_path / "saved")
    assert f"{kind.in_file}.qweight" in names
    for directory in ("stored", "saved", "theirs", "again", "loaded"):
        assert stored(tmp_path / directory) == names, directory
    for directory in ("stored", "loaded"):
        theirs, info = kind.auto.from_pretrained(tmp_path / directory, output_loading_info=True)
        assert not info["unexpected_keys"] and not info["missing_keys"]
        for back in (load(tmp_path / directory), theirs):
            assert type(back) is kind.model and quantized(back) == chosen
            assert close(back, expected), directory


def rewrite(directory: Path, rename: Callable[[str], str], **config: Any) -> None:
    """Other names in the files of a directory, and other fields in its config."""
    path = directory / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    fields = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("llava", lambda n: n.replace("language_model.model", "model.language_model", 1)),
        ("qwen2_vl", lambda n: n if "visual" in n else n.replace("model.", "model.language_model.", 1)),
    ],
)
def test_names_of_a_directory_are_kept(name: str, rename: Callable[[str], str], tmp_path: Path) -> None:
    """What is quantized from files with other names than transformers writes has those, everywhere."""
    kind = KINDS[name]
    model = tiny(kind)
    model.save_pretrained(tmp_path / "float")
    rewrite(tmp_path / "float", rename)
    before = stored(tmp_path / "float")
    quantize(tmp_path / "float", RTN(8, 32), save_to=tmp_path / "out", progress=False)
    back = load(tmp_path / "out")
    assert rel(answer(back), answer(model)) < 0.05 and quantized(back)
    weights = {name.replace(".qweight", ".weight") for name in stored(tmp_path / "out")}
    assert before <= weights and {n for n in weights - before if not n.endswith((".scales", ".weight_shape"))} == set()
    kind.auto.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "out")


def rel(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_model_saved_without_its_head(tied: bool, tmp_path: Path) -> None:
    """Qwen3-Embedding: config.json names a causal model, the files hold its base. With a head to tie it is one."""
    base = tiny(KINDS["qwen3_base"])
    base.save_pretrained(tmp_path / "float")
    rewrite(tmp_path / "float", str, architectures=["Qwen3ForCausalLM"], tie_word_embeddings=tied)
    quantize(tmp_path / "float", RTN(8, 32), save_to=tmp_path / "out", progress=False)
    for directory, limit in (("float", 1e-6), ("out", 0.05)):
        model = load(tmp_path / directory)
        assert type(model) is (tf.Qwen3ForCausalLM if tied else tf.Qwen3Model)
        assert rel(answer(model.base_model), answer(base)) < limit
    again = tf.AutoModel.from_pretrained(tmp_path / "out")
    assert quantized(again) and rel(answer(again), answer(base)) < 0.05
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert torch.equal(answer(load(tmp_path / "again").base_model), answer(again))


def test_other_classes_read_a_quantized_causal_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base model and one with a new head have no place for a quantized lm_head, and say so."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).eval()
    replace_linear(model, SCHEME, exclude=(), progress=False)
    model.save_pretrained(tmp_path / "out")
    base = tf.AutoModel.from_pretrained(tmp_path / "out")
    assert "LlamaModel has no place for lm_head of the checkpoint" in caplog.text
    assert torch.equal(answer(base), answer(model.model))
    classes = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert torch.equal(answer(classes.model), answer(model.model)) and type(classes.score) is nn.Linear


def causal(directory: Path, **fields: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(directory, **fields)


@pytest.mark.parametrize("loader", [load, causal])
@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda n: n.replace("layers.1.mlp.up_proj", "layers.1.mlp.upper_proj"),
            r"quantized model\.layers\.1\.mlp\.upper_proj, which LlamaForCausalLM does not; its nearest linear layer is model\.",
        ),
        (lambda n: n.replace("1.mlp.up_proj.weight_shape", "1.mlp.up_proj.input_scale"), "up_proj lacks weight_shape"),
    ],
)  # fmt: skip
def test_a_quantized_module_without_a_place(loader: Any, rename: Any, message: str, tmp_path: Path) -> None:
    quantized_llama(tmp_path)
    rewrite(tmp_path, rename)
    with pytest.raises(CheckpointError, match=message):
        loader(tmp_path)


@pytest.mark.parametrize("loader", [load, causal])
@pytest.mark.parametrize(
    ("stray", "message"),
    [
        (
            "model.layers.1.mlp.up_proj.input_scale",
            r"up_proj\.input_scale lies under the quantized module model\.layers\.1\.mlp\.up_proj and is none of its format's",
        ),
        (
            "model.layers.1.mlp.scales",
            r"does not fit LlamaForCausalLM: .*unknown to it, for example model\.layers\.1\.mlp\.scales",
        ),
    ],
)
def test_a_scale_without_a_place(loader: Any, stray: str, message: str, tmp_path: Path) -> None:
    quantized_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {stray: torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        loader(tmp_path)


def quantized_llama(directory: Path) -> tf.LlamaForCausalLM:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).eval()
    replace_linear(model, SCHEME, progress=False)
    save(model, directory, overwrite=True)
    return model


@pytest.mark.parametrize("loader", [load, causal])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda n: ".1.w3." not in n,
            r"11 experts; the files lack 1 of .*first model\.layers\.0\.mlp\.experts\.1\.up_proj",
        ),
        (
            lambda n: ".1.w2." not in n,
            r"11 experts; the files lack 1 of .*first model\.layers\.0\.mlp\.experts\.1\.down_proj",
        ),
        (lambda n: "w2" not in n, r"gate_up_proj of .* is quantized in the files and .*down_proj is not"),
    ],
)
def test_a_lacking_expert_is_an_error(loader: Any, spoil: Any, message: str, tmp_path: Path) -> None:
    model = tiny(KINDS["mixtral"])
    replace_linear(model, SCHEME, progress=False)
    save(model, tmp_path, format="gptq")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    kept = {name: t for name, t in tensors.items() if "experts" not in name or spoil(name)}
    assert len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})
    enable()
    with pytest.raises(CheckpointError, match=message):
        loader(tmp_path)


def test_one_place_is_not_for_two(tmp_path: Path) -> None:
    tiny(KINDS["llava"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    other = {"lm_head.weight": tensors["language_model.lm_head.weight"] + 1}
    save_file(tensors | other, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"language_model\.lm_head\.weight and lm_head\.weight are both lm_head\.weight of LlavaFor",
    ):
        load(tmp_path)


def test_names_of_a_key_mapping(tmp_path: Path) -> None:
    model = quantized_llama(tmp_path)
    rewrite(tmp_path, lambda n: n.replace("model.layers", "decoder.blocks"))
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"].get("modules", {})
    config["quantization_config"]["modules"] = {
        n.replace("model.layers", "decoder.blocks"): s for n, s in modules.items()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = causal(tmp_path, key_mapping={"^decoder.blocks": "model.layers"})
    assert torch.equal(answer(back), answer(model))


@pytest.mark.parametrize("exclude", [(), ("*.q_proj",), ("*.q_proj", "*.k_proj", "*.v_proj")])
def test_a_projection_that_is_cut_while_it_loads(exclude: tuple[str, ...], tmp_path: Path) -> None:
    """Files of nomic_bert have q, k and v in one tensor. Where one of them is quantized, the others lie beside it."""
    torch.manual_seed(0)
    model = tf.NomicBertModel(tf.NomicBertConfig(**BERT)).eval()
    model.save_pretrained(tmp_path / "float")
    assert "encoder.layers.0.attn.Wqkv.weight" in stored(tmp_path / "float")
    assert close(load(tmp_path / "float"), answer(model))
    quantize(tmp_path / "float", RTN(8, 32), save_to=tmp_path / "out", exclude=exclude, progress=False)
    replace_linear(model, SCHEME, exclude=exclude, progress=False)
    model.save_pretrained(tmp_path / "theirs")
    assert stored(tmp_path / "theirs") == stored(tmp_path / "out")
    assert ("encoder.layers.0.attn.Wqkv.weight" in stored(tmp_path / "out")) == (len(exclude) == 3)
    while_loading = tf.AutoModel.from_pretrained(
        tmp_path / "float", quantization_config=QKernelsConfig(SCHEME, exclude=exclude)
    )
    for back in (load(tmp_path / "out"), tf.AutoModel.from_pretrained(tmp_path / "out"), while_loading):
        assert quantized(back) == quantized(model) and close(back, answer(model))


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Twice the same names, and none of a quantizer where there was none; then dequantized, the names of a float model."""
    kind = KINDS["llava"]
    tiny(kind).save_pretrained(tmp_path / "float")
    model = kind.auto.from_pretrained(tmp_path / "float")
    replace_linear(model, SCHEME, progress=False)
    conversions = model._weight_conversions
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
        assert model._weight_conversions is conversions
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    back = kind.auto.from_pretrained(tmp_path / "a")
    back.save_pretrained(tmp_path / "c")
    back.dequantize().save_pretrained(tmp_path / "plain")
    assert stored(tmp_path / "c") == stored(tmp_path / "a") and stored(tmp_path / "plain") == stored(tmp_path / "float")


def test_a_part_of_a_model_was_quantized(tmp_path: Path) -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).eval()
    replace_linear(model.model.layers[1], SCHEME, progress=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(causal(tmp_path)), answer(model))


def test_save_pretrained_refuses_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT))
    replace_linear(model, SCHEME, progress=False)
    monkeypatch.setattr(pretrained, "_prepare", None)
    with pytest.raises(
        ConversionError, match=r"14 QuantLinear modules of LlamaForCausalLM .*qkernels\.save\(model, directory\)"
    ):
        model.save_pretrained(tmp_path / "out")
    monkeypatch.undo()
    model.hf_quantizer = type(
        "Foreign", (HfQuantizer,), dict.fromkeys(("is_serializable", "is_trainable"), lambda self: True)
    )(QKernelsConfig())
    with pytest.raises(ConversionError, match="QuantLinear modules and modules of Foreign"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
