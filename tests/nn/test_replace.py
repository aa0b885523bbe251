"""`replace_linear`: what it swaps, what it leaves and says so, patterns, refusals that change nothing."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qkernels import GPTQ, NF4, RTN, QuantLinear, UnsupportedProblem, load, quantize, replace_linear, save
from qkernels.calibrate import preview
from qkernels.errors import ArgumentError, SchemeError
from qkernels.layouts import LAYOUTS
from qkernels.nn import model_bytes
from qkernels.nn.selection import A_HEAD
from qkernels.storage import TensorSource
from qkernels.tensor import QuantTensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Model(nn.Module):
    """A little of everything: blocks, an embedding tied to the head, a convolution, stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.convolution = nn.Conv1d(4, 4, 3)
        self.experts = nn.Parameter(torch.zeros(2, 8, 64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def untouched(model: nn.Module, before: nn.Module) -> bool:
    return not any(isinstance(m, QuantLinear) for m in model.modules()) and all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values())
    )


def test_replaces_in_place_and_accounts_for_everything(model: Model) -> None:
    before = copy.deepcopy(model)
    report = replace_linear(model, "w8a16_g32", progress=False)
    assert list(report.replaced) == [f"layers.{i}.{name}" for i in range(2) for name in ("up_proj", "down_proj")]
    assert report.skipped == {
        "lm_head": A_HEAD,
        "experts": "stacked experts ([2, 8, 64], 4,096 bytes) are not supported yet",
    }
    assert isinstance(model.layers[0].up_proj, QuantLinear)
    assert not model.layers[0].up_proj.training
    assert report.bytes_before == model_bytes(before)
    assert report.bytes_after == model_bytes(model) < report.bytes_before
    one = report.replaced["layers.0.up_proj"]
    assert one.bytes_before == 64 * 96 * 4
    assert one.bytes_after == 64 * 96 + 2 * 96 * 2  # codes, and fp16 scales of two groups
    assert "replaced 4 linear layers (w8a16_g32), skipped 2" in str(report)
    assert f"skipped lm_head: {A_HEAD}" in str(report)


def test_the_model_still_computes_nearly_the_same(model: Model) -> None:
    ids = torch.arange(20)
    expected = model(ids)
    replace_linear(model, "w8a16_g32", progress=False)
    # 8-bit rounding moves each weight by at most half a step of 1/127 of its group's largest
    assert (model(ids) - expected).norm() <= 0.01 * expected.norm()


def test_include_exclude_and_overrides(model: Model) -> None:
    report = replace_linear(
        model,
        "w4a16_g32",
        include="layers.*",
        exclude=("layers.1.*",),
        overrides={"*.down_proj": "w8a16_channel"},
        progress=False,
    )
    assert {name: str(r.scheme) for name, r in report.replaced.items()} == {
        "layers.0.up_proj": "w4a16_g32",
        "layers.0.down_proj": "w8a16_channel",
    }
    assert report.skipped["layers.1.up_proj"] == "excluded"
    assert report.skipped["lm_head"] == "not in include"


def test_patterns_match_the_last_part_of_a_name_too(model: Model) -> None:
    report = replace_linear(model, "w4a16_g32", exclude=("up_proj", "lm_head"), progress=False)
    assert all(name.endswith("down_proj") for name in report.replaced)


def test_shared_weights_stay_shared(model: Model) -> None:
    report = replace_linear(model, "w4a16_g32", exclude=(), progress=False)
    assert report.skipped["lm_head"] == "its weight is shared with embedding"
    assert model.lm_head.weight is model.embedding.weight


def test_a_second_run_says_that_layers_are_quantized(model: Model) -> None:
    replace_linear(model, "w4a16_g32", include="layers.0.*", progress=False)
    report = replace_linear(model, "w4a16_g32", progress=False)
    assert report.skipped["layers.0.up_proj"] == "already quantized"
    with pytest.raises(ArgumentError, match="(?s)found no layer to replace:.*layers.0.up_proj: already quantized"):
        replace_linear(model, "w4a16_g32", progress=False)


def test_a_subclass_with_a_forward_of_its_own_is_left_alone(model: Model) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.layers[0].up_proj = Scaled(64, 96)
    report = replace_linear(model, "w4a16_g32", progress=False)
    assert report.skipped["layers.0.up_proj"] == "Scaled is a subclass of nn.Linear with a forward of its own"


def tiny_gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_conv1d_of_gpt2_becomes_a_quant_linear(tmp_path: Path) -> None:
    """Its weight is [K, N]. The result holds the rounding of the transposed weight, bit for bit, runs, and loads again."""
    model, ids = tiny_gpt2(), torch.arange(20)[None]
    original = copy.deepcopy(model)
    report = replace_linear(model, "w8a16_g32", progress=False)
    assert list(report.replaced) == [
        f"transformer.h.{i}.{leaf}" for i in (0, 1) for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert report.skipped == {"lm_head": A_HEAD}
    assert report.replaced["transformer.h.0.attn.c_attn"].bytes_before == 32 * 96 * 4
    layer, before = model.transformer.h[0].attn.c_attn, original.transformer.h[0].attn.c_attn
    expected = RTN(8, 32).quantize(before.weight.detach().T.contiguous())
    assert (layer.out_features, layer.in_features) == (96, 32)
    assert torch.equal(layer.quant_tensor().codes, expected.codes)
    assert torch.equal(layer.bias, before.bias)
    with torch.no_grad():
        truth, got = original(ids).logits, model(ids).logits
    assert (got - truth).norm() <= 0.02 * truth.norm()  # half a step of 1/127 a weight, through eight layers
    save(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids).logits, got)


def test_gpt2_as_it_lies_on_the_hub(tmp_path: Path) -> None:
    """Saved without its head: names lack the prefix, and old masks lie among the tensors."""
    tiny_gpt2().save_pretrained(tmp_path / "plain")
    (tmp_path / "hub").mkdir()
    source = TensorSource.open(tmp_path / "plain")
    tensors = {name.removeprefix("transformer."): source.read(name) for name in source.names()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in (0, 1)}
    save_file(tensors, tmp_path / "hub" / "model.safetensors")
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "hub")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "hub")(ids).logits, load(tmp_path / "plain")(ids).logits)
        logits = []
        for name in ("plain", "hub"):
            quantize(tmp_path / name, GPTQ(4, 32), ids.repeat(4, 1), tmp_path / f"{name}4", seq_len=20, progress=False)
            logits.append(load(tmp_path / f"{name}4")(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("stored", [False, True])
def test_quantize_rounds_conv1d_as_replace_linear_does(stored: bool, tmp_path: Path) -> None:
    """In memory and from a directory: the same codes, and bytes as the preview says."""
    expected, model = tiny_gpt2(), tiny_gpt2()
    replace_linear(expected, "w4a16_g32", progress=False)
    if stored:
        model.save_pretrained(tmp_path / "plain")
        planned = preview(tmp_path / "plain", RTN(4, 32))
        report = quantize(tmp_path / "plain", RTN(4, 32), save_to=tmp_path / "out", progress=False)
        assert [(m.shape, m.bytes_after) for m in planned.modules[:1]] == [((96, 32), report.modules[0].bytes_after)]
        model = load(tmp_path / "out")
    else:
        report = quantize(model, RTN(4, 32), progress=False)
    assert report.skipped == {"lm_head": A_HEAD}
    assert len(report.modules) == 8
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("call", ["replace_linear", "quantize"])
def test_experts_and_routers_are_named_with_their_bytes(kind: str, call: str) -> None:
    """Every matrix of the model is replaced, an embedding, or in the report with the reason."""
    transformers = pytest.importorskip("transformers")
    shared = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # fmt: skip
    own = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
    }
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**shared, **own[kind]))
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1}
    if call == "quantize":
        report = quantize(model, RTN(4, 32), progress=False)
        replaced, skipped = {m.name for m in report.modules}, dict(report.skipped)
    else:
        made = replace_linear(model, "w4a16_g32", progress=False)
        replaced, skipped = set(made.replaced), made.skipped
    named = replaced | {name.removesuffix(".weight") for name in skipped}
    assert matrices - named == {"model.embed_tokens"}
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    assert experts in replaced
    assert skipped["model.layers.1.mlp.gate.weight"].startswith(
        "a router ([4, 32], 512 bytes): which experts a token gets"
    )


def test_unsupported_layers_raise_before_anything_changes(model: Model) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(UnsupportedProblem, match="layers.0.down_proj: no kernel for w4a16_g12, N=64 K=96"):
        replace_linear(model, "w4a16_g32", overrides={"*.down_proj": "w4a16_g12"}, progress=False)
    assert untouched(model, before)


def test_unsupported_layers_can_be_skipped_or_run_on_the_reference(model: Model) -> None:
    twin = copy.deepcopy(model)
    overrides = {"*.down_proj": "w4a16_g12"}
    report = replace_linear(model, "w4a16_g32", overrides=overrides, on_unsupported="skip", progress=False)
    assert "group_size 12 is not a multiple of 8" in report.skipped["layers.0.down_proj"]
    report = replace_linear(twin, "w4a16_g32", overrides=overrides, on_unsupported="reference", progress=False)
    assert report.replaced["layers.0.down_proj"].layout == "reference"
    assert report.replaced["layers.0.up_proj"].layout == "cpu_tile_a16"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", ["nf4_g64", "fp4_g32"])
def test_a_float_model_goes_straight_into_a_codebook(model: Model, scheme: str, double_quant: bool) -> None:
    """No calibration; the kernels compute what the rounded weights would, to fp32's rounding of sums."""
    rounded = copy.deepcopy(model)
    method = NF4(double_quant=double_quant) if double_quant else None
    report = replace_linear(model, scheme, method=method, progress=False)
    assert [str(replaced.scheme) for replaced in report.replaced.values()] == [scheme] * 4
    assert report.bytes_after < report.bytes_before
    rounding = NF4(double_quant=double_quant).with_scheme(scheme)
    with torch.no_grad():
        for name in report.replaced:
            linear, layer = rounded.get_submodule(name), model.get_submodule(name)
            weight = rounding.quantize(linear.weight)
            packed = layer.quant_tensor()
            assert packed.scales.shape == (linear.out_features, -(-linear.in_features // rounding.group_size))
            assert not torch.equal(linear.weight, weight.dequantize())
            linear.weight.copy_(weight.dequantize())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids), rounded(ids), rtol=1e-5, atol=1e-5)


def test_what_no_kernel_takes_needs_to_be_told_that_it_is_slow(model: Model) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(UnsupportedProblem, match="reference"):
        replace_linear(model, "nf4_g4", progress=False)
    assert untouched(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": NF4()}, SchemeError, r"NF4 needs a codebook \(nf4_g64, fp4_g64\), got w4a16_g128"),
        ({"scheme": "int4"}, SchemeError, "a scheme looks like w4a16_g128"),
        ({"scheme": "w4a16_g0"}, SchemeError, "group_size must be a positive integer"),
        (
            {"include": "layer.*"},
            ArgumentError,
            "pattern 'layer.\\*' matches no linear layer; names look like layers.0.up_proj",
        ),
        ({"overrides": {"*.gate": "w8a16_g32"}}, ArgumentError, "pattern '\\*.gate' matches no linear layer"),
        (
            {"on_unsupported": "ignore"},
            ArgumentError,
            "on_unsupported must be one of raise, skip, reference, got 'ignore'",
        ),
    ],
)
def test_wrong_arguments_change_nothing(
    model: Model, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        replace_linear(model, **arguments, progress=False)  # type: ignore[arg-type]
    assert untouched(model, before)


def test_nan_weights_are_named_before_anything_changes(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="layers.1.up_proj.weight"):
        replace_linear(model, "w4a16_g32", progress=False)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_an_encoder_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = transformers.BertModel(config).eval()
    ids = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(1))
    expected = encoder(ids).last_hidden_state
    report = replace_linear(encoder, "w8a16_g32", progress=False)
    assert len(report.replaced) == 2 * 6 + 1  # q, k, v, output, up, down in each layer, and the pooler
    cosine = torch.cosine_similarity(encoder(ids).last_hidden_state.flatten(1), expected.flatten(1))
    assert (cosine > 0.999).all()


def test_float_weights_are_kept_until_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what an error would leave in place. Of the quantized ones, unpacked, one is alive at a time."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    floats = [weakref.ref(layer.weight) for layer in model]
    unpacked: list[weakref.ref[torch.Tensor]] = []
    alive: list[tuple[int, int]] = []
    layout = LAYOUTS["cpu_tile_a16"]

    def counting(weight: QuantTensor) -> dict[str, torch.Tensor | None]:
        if not weight.codes.is_meta:
            unpacked.append(weakref.ref(weight.codes))
            alive.append((sum(ref() is not None for ref in floats), sum(ref() is not None for ref in unpacked)))
        return layout.arrange(weight)

    monkeypatch.setitem(LAYOUTS, layout.name, dataclasses.replace(layout, arrange=counting))
    replace_linear(model, "w4a16_g32", progress=False)
    assert alive == [(4, 1)] * 4
    assert not any(ref() is not None for ref in (*floats, *unpacked))
