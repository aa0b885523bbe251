"""Calibration runs what the model runs: every block of every kind of model is fed with what the model itself feeds it with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels import AWQ, GPTQ, QuantLinear, load
from qkernels.calibrate import preview
from qkernels.errors import ArgumentError, CalibrationError
from qkernels.layerwise.capturing import Progress, capture
from qkernels.layerwise.hollow import check_calibratable
from qkernels.layerwise.running import LayerInputs, Place, propagate
from qkernels.quantizers import InputStatistics, Options
from tests.tiny_models import VOCABULARY, run, token_windows

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
BART = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip
GEMMA3N = SIZES | dict(
    num_hidden_layers=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, sliding_window=8, laurel_rank=8,
    vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2, altup_num_inputs=2,
    activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
VISION = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")} | dict(
    num_hidden_layers=3, image_size=32, patch_size=16
)
TEXT = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": True}

# class, config class, fields; and how many chains its blocks make: T5's first block of a stack computes a bias for the others
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "base class": ("LlamaModel", "LlamaConfig", SIZES, 1),
    "tuples": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), 1),
    "encoder": ("BertForMaskedLM", "BertConfig", SIZES, 1),
    "encoder and decoder": ("BartForConditionalGeneration", "BartConfig", BART, 2),
    "a head that is an embedding": (
        "FSMTForConditionalGeneration", "FSMTConfig",
        BART | dict(src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, bos_token_id=0, pad_token_id=1, eos_token_id=2), 2,
    ),
    "a bias from the first block": ("T5ForConditionalGeneration", "T5Config", T5, 4),
    "inputs of each layer, shared keys": ("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N, 1),
    "two lists": (
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        dict(text_config=TEXT | {"sliding_window": 8}, vision_config=VISION, image_token_id=60, mm_tokens_per_image=4), 1,
    ),
    "text beside vision that wants pixels": ("CLIPTextModel", "CLIPTextConfig", SIZES, 1),
    "two classes": (
        "JambaForCausalLM", "JambaConfig",
        SIZES | dict(
            num_key_value_heads=2, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
            expert_layer_period=2, expert_layer_offset=1, num_experts_per_tok=1,
        ), 1,
    ),
}  # fmt: skip


def made(kind: str, config_kind: str, fields: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config_kind)(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return model


def walked(model: Any, batches: list[Tensor]) -> tuple[dict[str, list[Tensor]], int]:
    """What a run feeds each block with, by its name, when nothing is quantized; and the number of chains."""
    place, progress, fed, chains = Place(torch.device("cpu")), Progress.of(model), {}, 0
    with torch.no_grad():
        while (chain := capture(model, progress, batches, torch.float32, place, plain_run(place))).names:
            chains, outputs = chains + 1, []
            for name in chain.names:
                fed[name] = list(chain.hidden)
                inputs = LayerInputs(chain.hidden, chain.calls[name])
                outputs = propagate(model.get_submodule(name), inputs, place, name, keep=True)
            progress.finish(chain, outputs)
            if not chain.follows:
                break
    return fed, chains


def plain_run(place: Place) -> Callable[..., Any]:
    return lambda name, block, hidden, call: call.run(block, hidden, place)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_fed_with_what_the_model_feeds_them_with(name: str) -> None:
    """Bit for bit, for two batches of different lengths."""
    kind, config, fields, chains = MODELS[name]
    model = made(kind, config, fields)
    batches = [token_windows(2, 16), token_windows(3, 12, seed=1)]
    fed, counted = walked(model, batches)
    seen: dict[str, list[Tensor]] = {name: [] for name in fed}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append((*args, kwargs.get("hidden_states"))[0].clone()),
            with_kwargs=True,
        )
        for name in fed
    ]
    with torch.no_grad():
        for batch in batches:
            # without a cache: with one, FSMT masks nothing in one pass
            both = {"decoder_input_ids": batch, "use_cache": False} if model.config.is_encoder_decoder else {}
            model(input_ids=batch, **both)
    for handle in handles:
        handle.remove()
    assert counted == chains
    assert len(fed) >= 2
    for block, expected in seen.items():
        assert len(expected) == 2
        for got, want in zip(fed[block], expected, strict=True):
            assert torch.equal(got, want), block


def test_a_model_that_wants_pixels_too_is_run_on_its_text_part() -> None:
    model = made("CLIPModel", "CLIPConfig", {"text_config": SIZES, "vision_config": VISION})
    report = run(model, GPTQ(4, 16))
    calibrated = {module.name for module in report.modules if not module.fallback}
    assert calibrated and all(name.startswith("text_model.encoder.layers") for name in calibrated)
    reason = report.fallbacks["vision_model.encoder.layers.0.self_attn.q_proj"]
    assert reason == "token ids do not run through vision_model.encoder.layers.0, and calibration is on token ids"


@pytest.mark.parametrize("method", [GPTQ(3, 16), AWQ(3, 16, grid=4)], ids=lambda method: method.name)
def test_the_text_part_of_a_multimodal_model_gets_the_codes_of_the_text_model(method: Options) -> None:
    """The vision tower is the deeper one, and is rounded to nearest, as the report says."""
    kind, config, fields, _ = MODELS["two lists"]
    whole = made(kind, config, fields)
    alone = transformers.Gemma3ForCausalLM(whole.config.text_config).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    report = run(whole, method)
    expected = run(alone, method)
    assert not expected.unscaled
    errors = {m.name.removeprefix("model."): m.error for m in expected.modules}
    text = [m for m in report.modules if ".language_model." in m.name]
    assert {m.name.removeprefix("model.language_model."): m.error for m in text} == errors
    assert not any(m.fallback for m in text)
    assert all(
        "token ids do not run through" in report.fallbacks[n] for n in report.fallbacks if "vision_tower.enc" in n
    )
    for name, module in alone.model.named_modules():
        if isinstance(module, QuantLinear):
            other = whole.model.language_model.get_submodule(name).quant_tensor()
            assert torch.equal(module.quant_tensor().codes, other.codes), name
            assert torch.equal(module.quant_tensor().scales, other.scales), name


@pytest.mark.parametrize(
    ("kind", "config", "fields", "message"),
    [
        ("AlbertModel", "AlbertConfig", SIZES | {"embedding_size": 16}, r"runs encoder\.albert_layer_groups\.0 several times"),
        (
            "XLMWithLMHeadModel", "XLMConfig", dict(vocab_size=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4),
            r"transformer\.ffns\.1 of XLMWithLMHeadModel reads what blocks long before it put out",
        ),
        (
            "RwkvForCausalLM", "RwkvConfig", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
            r"rwkv\.blocks\.0\.attention\.output cannot be calibrated: RwkvModel scales its weight in place",
        ),
        (
            "ZambaForCausalLM", "ZambaConfig",
            SIZES | dict(
                num_hidden_layers=4, num_key_value_heads=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8,
                use_mamba_kernels=False, n_mamba_heads=2, attention_hidden_size=64,
            ),
            r"uses one block in several places \(model\.layers\.1\.shared_transf\..* is model\.layers\.3\.",
        ),
        ("ViTModel", "ViTConfig", VISION, r"ViTModel takes pixel_values, not input_ids"),
        (
            "WhisperForConditionalGeneration", "WhisperConfig",
            BART | dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1),
            r"takes input_features, not input_ids",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_refused_untouched(
    kind: str, config: str, fields: Any, message: str, tmp_path: Path
) -> None:
    """And a dry run says the same of its directory."""
    fields = {k: v for k, v in fields.items() if kind[:7] != "Whisper" or k != "max_position_embeddings"}
    model = made(kind, config, fields)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ArgumentError, CalibrationError), match=message + r".*use RTN, HQQ or NF4"):
        run(model, GPTQ(4, 16))
    model.save_pretrained(tmp_path / "float")
    with pytest.raises((ArgumentError, CalibrationError), match=message + r".*use RTN, HQQ or NF4"):
        preview(tmp_path / "float", GPTQ(4, 16), on_unsupported="reference")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


class Skipping(nn.Module):
    """Its last block also reads what its first put out."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3))
        self.skip = skip

    def forward(self, input_ids: Tensor) -> Tensor:
        x = first = self.blocks[0](self.embed(input_ids))
        x = self.blocks[1](x)
        return self.blocks[2](x + first if self.skip else x)


def test_a_skip_over_a_block_is_noticed() -> None:
    """A pass of stand-ins would give the last block a sum of the wrong tensors, of the right shape."""
    batches = [token_windows(2, 8)]
    model = Skipping(skip=False)
    fed, chains = walked(model, batches)
    with torch.no_grad():
        assert torch.equal(fed["blocks.2"][0], model.blocks[1](model.blocks[0](model.embed(batches[0]))))
    assert chains == 1
    with pytest.raises(CalibrationError, match=r"blocks\.2 of Skipping reads what blocks long before it put out"):
        walked(Skipping(skip=True), batches)


def test_a_hollow_model_gets_its_weights_back() -> None:
    """Experts in one tensor among it, and tied weights."""
    model = made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", TEXT | EXPERTS).train()
    before = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check_calibratable(model)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)] == before
    assert model.training and all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    with pytest.raises(CalibrationError, match="reads what blocks long before"):
        check_calibratable(skipping := Skipping(skip=True).to("meta"))
    assert all(parameter.is_meta for parameter in skipping.parameters())


def test_hooks_and_forwards_that_others_put_on_layers_stay() -> None:
    model = made("LlamaForCausalLM", "LlamaConfig", SIZES)
    layer, calls = model.model.layers[0], []
    plain = layer.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return plain(*args, **kwargs)

    layer.forward = patched
    layer.register_forward_pre_hook(lambda module, args: (calls.append("hook"), (args[0] * 2, *args[1:]))[1])
    seen: dict[str, Tensor] = {}
    hessian = InputStatistics.hessian

    def watched(statistics: InputStatistics, name: str = "") -> Tensor:
        return seen.setdefault(name, hessian(statistics, name))

    reference = copy.deepcopy(model)  # deepcopy binds the old forward; only the hook counts there
    reference.model.layers[0].forward = type(layer).forward.__get__(reference.model.layers[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputStatistics, "hessian", watched)
        run(model, GPTQ(8, 16))
    assert vars(layer)["forward"] is patched
    assert all("_call_impl" not in vars(module) for module in model.modules())
    calls.clear()
    with torch.no_grad():
        model(input_ids=token_windows(1))
    assert calls == ["hook", "forward"]
    # the hook doubles the input once, not once more for the stand-in
    collected = InputStatistics(32)
    handle = reference.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda m, args: collected.update(args[0])
    )
    with torch.no_grad():
        reference(input_ids=token_windows())
    handle.remove()
    torch.testing.assert_close(seen["model.layers.0.self_attn.q_proj"], collected.hessian(), rtol=1e-5, atol=1e-5)


def test_offloaded_weights_are_refused_by_name() -> None:
    model = made("LlamaForCausalLM", "LlamaConfig", SIZES)
    model.model.layers[1].to("meta")
    with pytest.raises(
        ArgumentError, match=r"model\.layers\.1\.\S+ is on meta: it is offloaded, .*quantize its directory"
    ):
        run(model, GPTQ(4, 16))


def test_inputs_that_accelerate_moves_elsewhere_are_refused() -> None:
    model = made("LlamaForCausalLM", "LlamaConfig", SIZES)
    model.model.layers[1]._hf_hook = type("Hook", (), {"execution_device": "cuda:1"})()
    with pytest.raises(ArgumentError, match=r"moves the inputs of model\.layers\.1 to cuda:1, .* computed on cpu"):
        run(model, GPTQ(4, 16))


def test_stored_buffers_of_layers_are_read_from_the_directory(tmp_path: Path) -> None:
    """Gemma 4 scales each layer by a buffer."""
    fields = TEXT | dict(global_head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0, sliding_window=8)
    model = made(
        "Gemma4ForCausalLM", "Gemma4TextConfig", fields | {"layer_types": ["sliding_attention", "full_attention"]}
    )
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.25)
    model.save_pretrained(tmp_path / "source")
    run(tmp_path / "source", GPTQ(3, 16), save_to=tmp_path / "out")
    run(model, GPTQ(3, 16))
    streamed = load(tmp_path / "out", on_unsupported="reference")
    expected, got = model.state_dict(), streamed.state_dict()
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_encoder_decoder_goes_on_to_the_same_bits(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the encoder, and in the decoder, which needs what the finished encoder puts out."""
    made("BartForConditionalGeneration", "BartConfig", BART).save_pretrained(tmp_path / "source")
    original = GPTQ.for_inputs
    units = tmp_path / ".out.qkernels-work"

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        if (units / f"unit-{stop - 1:05d}").is_dir():
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "for_inputs", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "source", GPTQ(4, 16), save_to=tmp_path / "out")
    assert len(list(units.glob("unit-*"))) == stop
    run(tmp_path / "source", GPTQ(4, 16), save_to=tmp_path / "out", resume=True)
    run(tmp_path / "source", GPTQ(4, 16), save_to=tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
