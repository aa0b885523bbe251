"""What decoder models look like inside: one table, one entry per architecture.

No method needs an entry: which norm or linear layer feeds which linear layers is found on each layer and proved, for AWQ and
SmoothQuant (`layerwise.tracing`). The table says what is expected of known architectures: a run warns where it does not come
true, a dry run tells it, and the tests hold tracing against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import ArgumentError
from .linears import is_conv1d


@dataclass(frozen=True)
class Fold:
    """A scale on the input channels of `targets` can be taken out of the output channels of `source`.

    Names are relative to a block, that is a decoder layer. `source` feeds `targets` and nothing else, with nothing between them
    that does not let a positive scale per channel through.

    Args:
        source: a norm, or a linear layer.
        targets: linear layers that read it.
        parent: the block whose output error judges a scale ("" is the decoder layer); None where there is one target, and
            its own output is as good.
    """

    source: str
    targets: tuple[str, ...]
    parent: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Where things are in a model of these `config.model_type`s.

    Args:
        layers, embeddings, final_norm, head: module names.
        folds: see `Fold`, in the order of the forward pass. A layer has those whose modules it has; of several with one source,
            the first.
        requires: config fields with the values that the folds are for.
    """

    model_types: tuple[str, ...]
    folds: tuple[Fold, ...]
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    requires: tuple[tuple[str, Any], ...] = ()


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_VALUES = Fold("self_attn.v_proj", ("self_attn.o_proj",))
_UP = Fold("mlp.up_proj", ("mlp.down_proj",))

_LLAMA = Architecture(
    model_types=("llama", "mistral", "ministral3", "qwen2", "qwen3", "granite", "gemma", "smollm3"),
    folds=(
        Fold("input_layernorm", _QKV, "self_attn"),
        _VALUES,
        Fold("post_attention_layernorm", _GATE_UP, "mlp"),
        _UP,
    ),
)

ARCHITECTURES: tuple[Architecture, ...] = (
    _LLAMA,
    replace(  # Gemma 2 and 3 also normalize what attention and MLP return: the norm before the MLP has another name
        _LLAMA,
        model_types=("gemma2", "gemma3_text"),
        folds=(
            Fold("input_layernorm", _QKV, "self_attn"),
            _VALUES,
            Fold("pre_feedforward_layernorm", _GATE_UP, "mlp"),
            _UP,
        ),
    ),
    replace(  # their norms follow attention and MLP, and feed the residual
        _LLAMA, model_types=("olmo2", "olmo3", "exaone4"), folds=(_VALUES, _UP)
    ),
    replace(  # attention and MLP read the same norm side by side
        _LLAMA, model_types=("cohere", "cohere2"), folds=(Fold("input_layernorm", (*_QKV, *_GATE_UP), ""), _VALUES, _UP)
    ),
    replace(  # the normed input is added to the residual, and values are normalized
        _LLAMA,
        model_types=("gemma3n_text",),
        folds=(
            Fold("altup.router_norm", ("altup.modality_router",)),
            Fold("laurel.linear_left", ("laurel.linear_right",)),
            Fold("pre_feedforward_layernorm", _GATE_UP, "mlp"),
            _UP,
        ),
    ),
    replace(  # values are normalized; some layers have no values of their own, some no keys either
        _LLAMA,
        model_types=("gemma4_text",),
        folds=(
            Fold("input_layernorm", _QKV, "self_attn"),
            Fold("input_layernorm", _QKV[:2], "self_attn"),
            Fold("input_layernorm", _QKV[:1], "self_attn"),
            Fold("pre_feedforward_layernorm", _GATE_UP, "mlp"),
            _UP,
            Fold("pre_feedforward_layernorm_2", ("experts.gate_up_proj",), "experts"),
        ),
    ),
    replace(  # layers of linear attention and of attention with a gate, which lets values through
        _LLAMA,
        model_types=("qwen3_5_text",),
        folds=(
            Fold("input_layernorm", _QKV, "self_attn"),
            _VALUES,
            Fold(
                "input_layernorm",
                tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
                "linear_attn",
            ),
            Fold("linear_attn.norm", ("linear_attn.out_proj",)),
            Fold("post_attention_layernorm", _GATE_UP, "mlp"),
            _UP,
        ),
    ),
    replace(  # in layers with experts only the shared one takes a scale: its norm feeds the router and the others as well
        _LLAMA,
        model_types=("llama4_text",),
        folds=(
            Fold("input_layernorm", _QKV, "self_attn"),
            _VALUES,
            Fold("post_attention_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward"),
            Fold(
                "post_attention_layernorm",
                (
                    "feed_forward.router",
                    "feed_forward.experts.gate_up_proj",
                    "feed_forward.shared_expert.gate_proj",
                    "feed_forward.shared_expert.up_proj",
                ),
                "feed_forward",
            ),
            Fold("feed_forward.up_proj", ("feed_forward.down_proj",)),
            Fold("feed_forward.shared_expert.up_proj", ("feed_forward.shared_expert.down_proj",)),
        ),
    ),
    replace(  # latent attention: keys and values are one matrix, so v -> o would need half a fold; experts as in Llama 4
        _LLAMA,
        model_types=("deepseek_v2", "deepseek_v3"),
        folds=(
            Fold("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn"),
            Fold("input_layernorm", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), "self_attn"),
            Fold("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), "self_attn"),
            Fold("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), "self_attn"),
            Fold("post_attention_layernorm", _GATE_UP, "mlp"),
            Fold(
                "post_attention_layernorm",
                ("mlp.gate", "mlp.experts.gate_up_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                "mlp",
            ),
            _UP,
            Fold("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
        ),
    ),
    replace(  # LayerNorm with 1 + weight; the square of ReLU squares a scale
        _LLAMA,
        model_types=("nemotron",),
        folds=(
            Fold("input_layernorm", _QKV, "self_attn"),
            _VALUES,
            Fold("post_attention_layernorm", ("mlp.up_proj",), "mlp"),
        ),
    ),
    replace(  # GELU between c_fc and c_proj
        _LLAMA,
        model_types=("starcoder2",),
        folds=(
            Fold("input_layernorm", _QKV, "self_attn"),
            _VALUES,
            Fold("post_attention_layernorm", ("mlp.c_fc",), "mlp"),
        ),
    ),
    replace(  # gate and up are one matrix
        _LLAMA,
        model_types=("glm", "glm4"),
        folds=(
            Fold("input_layernorm", _QKV, "self_attn"),
            _VALUES,
            Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
        ),
    ),
    Architecture(  # q, k, v in one matrix; one norm for attention and MLP, or one for each
        model_types=("falcon",),
        folds=(
            Fold("ln_attn", ("self_attention.query_key_value",), "self_attention"),
            Fold("ln_mlp", ("mlp.dense_h_to_4h",), "mlp"),
            Fold("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h"), ""),
        ),
        layers="transformer.h",
        embeddings="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        requires=(("parallel_attn", True),),
    ),
    Architecture(
        model_types=("bloom",),
        folds=(
            Fold("input_layernorm", ("self_attention.query_key_value",), "self_attention"),
            Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
        ),
        layers="transformer.h",
        embeddings="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        requires=(("apply_residual_connection_post_layernorm", False),),
    ),
    Architecture(  # q, k, v are one matrix, and so are gate and up: v -> o and up -> down would need half a fold
        model_types=("phi3",),
        folds=(
            Fold("input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
            Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
        ),
    ),
    Architecture(  # attention and MLP read the same norm side by side; GELU lets no scale through from fc1 to fc2
        model_types=("phi",),
        folds=(Fold("input_layernorm", (*_QKV, "mlp.fc1"), ""), Fold("self_attn.v_proj", ("self_attn.dense",))),
        final_norm="model.final_layernorm",
    ),
    Architecture(  # ReLU does let a positive scale through
        model_types=("opt",),
        folds=(
            Fold("self_attn_layer_norm", _QKV, "self_attn"),
            Fold("self_attn.v_proj", ("self_attn.out_proj",)),
            Fold("final_layer_norm", ("fc1",), ""),
            Fold("fc1", ("fc2",)),
        ),
        layers="model.decoder.layers",
        embeddings="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        requires=(
            ("do_layer_norm_before", True),
            ("activation_function", "relu"),
            ("layer_norm_elementwise_affine", True),
        ),
    ),
    Architecture(  # q, k, v interleaved per head in one matrix
        model_types=("gpt_neox",),
        folds=(
            Fold("input_layernorm", ("attention.query_key_value",), "attention"),
            Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
        ),
        layers="gpt_neox.layers",
        embeddings="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
    ),
    Architecture(  # q, k, v in one matrix, GELU between c_fc and c_proj
        model_types=("gpt2",),
        folds=(Fold("ln_1", ("attn.c_attn",), "attn"), Fold("ln_2", ("mlp.c_fc",), "mlp")),
        layers="transformer.h",
        embeddings="transformer.wte",
        final_norm="transformer.ln_f",
    ),
)


def find_architecture(model_type: str | None) -> Architecture | None:
    """The table's entry for a `config.model_type`, or None."""
    return next((a for a in ARCHITECTURES if model_type in a.model_types), None)


def expected_folds(model: nn.Module) -> tuple[Fold, ...]:
    """The folds that the table has for a model; () where it has no entry, or the entry is for models with other settings."""
    config = text_config(model)
    architecture = find_architecture(getattr(config, "model_type", None))
    if architecture is None or any(getattr(config, name, value) != value for name, value in architecture.requires):
        return ()
    return architecture.folds


def folds_of_layer(folds: Sequence[Fold], layer: nn.Module) -> tuple[Fold, ...]:
    """Of the folds of an architecture those of one layer: it has all their modules, and no fold of their source stands before."""
    names = {name for name, _ in (*layer.named_modules(), *layer.named_parameters())}  # stacked experts are parameters
    found: dict[str, Fold] = {}
    for fold in folds:
        if names.issuperset((fold.source, *fold.targets)):
            found.setdefault(fold.source, fold)
    return tuple(found.values())


def text_config(model: nn.Module) -> Any:
    """The config of a model's text part, which is the whole config where there is only text; None for a model without one."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    if getter is None:
        return config
    try:
        return getter()
    except ValueError:  # several text parts: none of them speaks for the model
        return config


def text_part(model: nn.Module) -> nn.Module:
    """The text decoder inside a model, as transformers' `get_decoder` finds it: the language model of a multimodal model, the
    decoder of an encoder-decoder; the model itself where it has no such parts."""
    part = model
    while (getter := getattr(part, "get_decoder", None)) is not None:
        inner = getter()
        if inner is part or not isinstance(inner, nn.Module):
            break
        part = inner
    return part


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every outermost list of blocks with linear layers in them, by name: a decoder's, an encoder's, a vision tower's. Which of
    them run on text, and in which order, only running the model tells (`layerwise.capturing`).

    Raises:
        ArgumentError: there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # parents come first: experts inside a layer are not layers
        inside_another = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside_another and _holds_blocks(module):
            found[name] = module
    if not found:
        raise ArgumentError(
            f"{type(model).__name__} has no list of decoder layers that could be calibrated one by one; "
            f"use replace_linear, which needs no calibration"
        )
    return found


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: from the table; else the list of blocks in the text part, and where that has several,
    the one of the classes that transformers never splits between devices.

    Raises:
        ArgumentError: there is no such list, or there are several.
    """
    lists = block_lists(model)
    architecture = find_architecture(getattr(text_config(model), "model_type", None))
    if architecture is not None and architecture.layers in lists:
        return architecture.layers, lists[architecture.layers]
    part = text_part(model)
    prefix = next(f"{name}." for name, module in model.named_modules() if module is part).lstrip(".")
    inside = {name: blocks for name, blocks in lists.items() if name.startswith(prefix)}
    whole = set(getattr(part, "_no_split_modules", None) or ())
    named = {name: blocks for name, blocks in inside.items() if any(type(block).__name__ in whole for block in blocks)}
    for candidates in (inside, named):
        if len(candidates) == 1:
            return next(iter(candidates.items()))
    raise ArgumentError(
        f"{type(model).__name__} has several lists of layers ({', '.join(inside or lists)}) and does not say which is its decoder"
    )


def shared_blocks(model: nn.Module) -> tuple[str, str] | None:
    """Two names of one parameter that two blocks use, if there is such a parameter: quantizing one block would change the
    other. Also where the parameters are on meta, and transformers ties them later."""
    owner: dict[str, str] = {}
    first: dict[int, str] = {}
    for prefix, blocks in block_lists(model).items():
        for index, block in enumerate(blocks):
            for leaf, parameter in block.named_parameters(remove_duplicate=False):
                name = f"{prefix}.{index}.{leaf}"
                owner[name] = f"{prefix}.{index}"
                other = first.setdefault(id(parameter), name)
                if owner[other] != owner[name]:
                    return other, name
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return next(((b, a) for a, b in tied.items() if a in owner and b in owner and owner[a] != owner[b]), None)


def _holds_blocks(blocks: nn.ModuleList) -> bool:
    """Whether these are blocks with linear layers in them: not linear layers themselves, and not lists of something."""
    bare = any(_is_linear(block) or isinstance(block, (nn.ModuleList, nn.ModuleDict)) for block in blocks)
    return not bare and any(_is_linear(module) for block in blocks for module in block.modules())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)
