"""What config.json would say, out of the metadata of GGUF files; and what is not read is refused by name."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import inspect, load
from qkernels.checkpoint import open_checkpoint
from qkernels.checkpoint.gguf import GgufCheckpoint
from qkernels.errors import CheckpointError
from qkernels.formats.gguf import dequantize
from qkernels.models.gguf_config import llama3_factors, llama3_rope
from qkernels.storage.gguf_header import MetaValue
from tests.gguf_golden import Change, Tensors, number, rewritten


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
    "experts": (
        "gemma",
        {"gemma.expert_count": number(8)},
        "with 8 experts a layer; GGUF files with experts are read of",
    ),
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

    message = "scales must be finite"
    for name, inspected in (("blk.0.attn_v.weight", message), ("token_embd.weight", "weights are not finite")):
        path = rewritten("llama-mixed", tmp_path / "m.gguf", change=infinite(name, 0), overwrite=True)
        with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
            load(path)
        with pytest.raises(CheckpointError, match=rf"1 of 14 quantized modules are broken:\n  .*{name}.*{inspected}"):
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
    weight = checkpoint.weight("model.layers.0.mlp.down_proj").weight
    assert str(weight.scheme) == "nvfp4m_g16"
    assert torch.equal(
        weight.dequantize(), dequantize(checkpoint.source.blocks("blk.0.ffn_down.weight"), "NVFP4") * 0.25
    )
    assert any("scales of activations are left aside" in line for line in inspect(path).oddities)
    assert load(path).model.layers[0].mlp.down_proj.weight.shape == (32, 64)


def test_types_that_no_kernel_reads_are_said(tmp_path: Path) -> None:
    path = rewritten(
        "llama", tmp_path / "m.gguf", change=spoil("blk.0.ffn_down.weight", "Q1_0", torch.zeros(32, 18).byte())
    )
    said = "Q1_0 has no kernel yet and is dequantized while loading: 576 B of Q1_0 become 8.00 KiB in 16 bits: 1 module"
    found = inspect(path)
    assert any(said in line for line in found.oddities)
    assert [layer.scheme for layer in found.layers] == ["Q1_0"]
