"""Where the tensors of a GGUF file belong in a model of transformers, and back: one table, one entry an architecture.

llama.cpp names tensors in its own way (`blk.3.attn_q.weight`), and its converter changes some of them: the rows of q and k of
"llama" come as rope wants neighbours to turn together there, and the norms of Gemma have their 1 added already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, ConversionError
from ..storage.gguf import GgufSource

# "plain" is read as numbers whatever it is in: a router; "row" is a vector there and a matrix of one row here; "parameter" is one
# with a name of its own, and "latent" a half of a matrix that is a weight here (`gguf_parts.py`).
Kind = Literal["linear", "embedding", "norm", "plain", "row", "experts", "parameter", "latent"]
_WHOLE_NAMES: Final = ("experts", "parameter", "latent")
_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<piece>[a-z0-9_]+)\.(?P<leaf>weight|bias)")
_IN_LAYER: Final = re.compile(r"model\.layers\.(?P<layer>\d{1,6})\.(?P<module>.+)")
# What the config is made of (`gguf_config.py`), not the model.
FOR_CONFIG: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# One number beside an NVFP4 weight, which multiplies it; and one for activations, which stay in 16 bits here.
SCALE: Final = ".scale"
INPUT_SCALE: Final = ".input_scale"


class Piece(NamedTuple):
    """A module that a tensor of a file belongs to; of a layer, relative to it. `rope`: which number of heads its rows have, where
    they are turned in pairs. `part`: of "experts", "parameter" and "latent", whose `module` is a parameter, which part of it.
    `read_only`: files that are written have it another way."""

    module: str
    kind: Kind = "linear"
    rope: str | None = None
    part: int = 0
    read_only: bool = False


@dataclass(frozen=True)
class GgufArchitecture:
    """What `general.architecture` means.

    Args:
        name: as the file has it.
        model_type, class_name: of transformers.
        layer: pieces of a layer, by name in the file with or without ".weight" or ".bias".
        paired_rope: rows of q and k are in llama.cpp's order.
        unit_offset_norms: the file's norm weights are 1 larger than the model's.
        turned_experts: experts of the model are transposed, and gate and up take turns.
    """

    name: str
    model_type: str
    class_name: str
    layer: Mapping[str, Piece]
    paired_rope: bool = False
    unit_offset_norms: bool = False
    turned_experts: bool = False
    outer: Mapping[str, Piece] = field(
        default_factory=lambda: {
            "token_embd": Piece("model.embed_tokens", "embedding"),
            "output_norm": Piece("model.norm", "norm"),
            "output": Piece("lm_head"),
        }
    )

    @property
    def latent(self) -> bool:
        """Whether keys and values come from a latent that all heads share."""
        return "attn_kv_a_mqa" in self.layer

    def parts(self, piece: Piece) -> int:
        """In how many tensors of a file the parameter of a piece lies."""
        same = [other for other in self.layer.values() if other.kind == piece.kind and other.module == piece.module]
        return len(same) if piece.kind in _WHOLE_NAMES else 1


_ATTENTION: Final = {
    "attn_q": Piece("self_attn.q_proj", rope="num_attention_heads"),
    "attn_k": Piece("self_attn.k_proj", rope="num_key_value_heads"),
    "attn_v": Piece("self_attn.v_proj"),
    "attn_output": Piece("self_attn.o_proj"),
}
_HEAD_NORMS: Final = {
    "attn_q_norm": Piece("self_attn.q_norm", "norm"),
    "attn_k_norm": Piece("self_attn.k_norm", "norm"),
}
_MLP: Final = {
    "ffn_gate": Piece("mlp.gate_proj"),
    "ffn_up": Piece("mlp.up_proj"),
    "ffn_down": Piece("mlp.down_proj"),
}
_NORMS: Final = {"attn_norm": Piece("input_layernorm", "norm"), "ffn_norm": Piece("post_attention_layernorm", "norm")}
_FOUR_NORMS: Final = {
    "attn_norm": Piece("input_layernorm", "norm"),
    "post_attention_norm": Piece("post_attention_layernorm", "norm"),
    "ffn_norm": Piece("pre_feedforward_layernorm", "norm"),
    "post_ffw_norm": Piece("post_feedforward_layernorm", "norm"),
}

_ALL: Final = (
    GgufArchitecture("llama", "llama", "LlamaForCausalLM", _NORMS | _ATTENTION | _MLP, paired_rope=True),  # and Mistral
    GgufArchitecture("qwen2", "qwen2", "Qwen2ForCausalLM", _NORMS | _ATTENTION | _MLP),
    GgufArchitecture("qwen3", "qwen3", "Qwen3ForCausalLM", _NORMS | _ATTENTION | _HEAD_NORMS | _MLP),
    GgufArchitecture("gemma", "gemma", "GemmaForCausalLM", _NORMS | _ATTENTION | _MLP, unit_offset_norms=True),
    GgufArchitecture("gemma2", "gemma2", "Gemma2ForCausalLM", _FOUR_NORMS | _ATTENTION | _MLP, unit_offset_norms=True),
    GgufArchitecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        _FOUR_NORMS | _ATTENTION | _HEAD_NORMS | _MLP,
        unit_offset_norms=True,
    ),
    GgufArchitecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        _NORMS
        | {
            "attn_qkv": Piece("self_attn.qkv_proj"),
            "attn_output": Piece("self_attn.o_proj"),
            "ffn_up": Piece("mlp.gate_up_proj"),
            "ffn_down": Piece("mlp.down_proj"),
        },
    ),
)
GGUF_ARCHITECTURES: Final = {architecture.name: architecture for architecture in _ALL}
# Another model_type of transformers that files have under the name of an architecture.
_AS_ANOTHER: Final = {"llama": "mistral"}

_EXPERTS: Final = {
    "ffn_gate_inp": Piece("mlp.gate", "plain"),
    "ffn_gate_exps": Piece("mlp.experts.gate_up_proj", "experts", part=0),
    "ffn_up_exps": Piece("mlp.experts.gate_up_proj", "experts", part=1),
    "ffn_down_exps": Piece("mlp.experts.down_proj", "experts"),
}
_SHARED_EXPERT: Final = {
    "ffn_gate_inp_shexp": Piece("mlp.shared_expert_gate", "row"),
    "ffn_gate_shexp": Piece("mlp.shared_expert.gate_proj"),
    "ffn_up_shexp": Piece("mlp.shared_expert.up_proj"),
    "ffn_down_shexp": Piece("mlp.shared_expert.down_proj"),
}
_SHARED_EXPERTS: Final = {
    name: piece._replace(module=piece.module.replace("shared_expert.", "shared_experts."))
    for name, piece in _SHARED_EXPERT.items()
    if piece.kind == "linear"
}
# Keys and values of a head lie apart, keys transposed; in older files as one, as in the model.
_LATENT_ATTENTION: Final = {
    "attn_q": Piece("self_attn.q_proj"),
    "attn_q_a": Piece("self_attn.q_a_proj"),
    "attn_q_a_norm": Piece("self_attn.q_a_layernorm", "norm"),
    "attn_q_b": Piece("self_attn.q_b_proj"),
    "attn_kv_a_mqa": Piece("self_attn.kv_a_proj_with_mqa"),
    "attn_kv_a_norm": Piece("self_attn.kv_a_layernorm", "norm"),
    "attn_kv_b": Piece("self_attn.kv_b_proj", read_only=True),
    "attn_k_b.weight": Piece("self_attn.kv_b_proj.weight", "latent", part=0),
    "attn_v_b.weight": Piece("self_attn.kv_b_proj.weight", "latent", part=1),
    "attn_output": Piece("self_attn.o_proj"),
}
_DEEPSEEK: Final = _NORMS | _LATENT_ATTENTION | _MLP | _EXPERTS | _SHARED_EXPERTS
_GPT_OSS: Final = (
    {"attn_norm": Piece("input_layernorm", "norm"), "post_attention_norm": Piece("post_attention_layernorm", "norm")}
    | {name: piece._replace(rope=None) for name, piece in _ATTENTION.items()}
    | _EXPERTS
    | {
        "attn_sinks.weight": Piece("self_attn.sinks", "parameter"),
        "ffn_gate_inp": Piece("mlp.router", "plain"),
        "ffn_gate_exps.bias": Piece("mlp.experts.gate_up_proj_bias", "parameter", part=0),
        "ffn_up_exps.bias": Piece("mlp.experts.gate_up_proj_bias", "parameter", part=1),
        "ffn_down_exps.bias": Piece("mlp.experts.down_proj_bias", "parameter"),
    }
)
_MIXTURES: Final = (
    GgufArchitecture("llama", "mixtral", "MixtralForCausalLM", _NORMS | _ATTENTION | _EXPERTS, paired_rope=True),
    GgufArchitecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", _NORMS | _ATTENTION | _EXPERTS | _SHARED_EXPERT),
    GgufArchitecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", _NORMS | _ATTENTION | _HEAD_NORMS | _EXPERTS),
    GgufArchitecture("olmoe", "olmoe", "OlmoeForCausalLM", _NORMS | _ATTENTION | _HEAD_NORMS | _EXPERTS),
    GgufArchitecture("deepseek2", "deepseek_v2", "DeepseekV2ForCausalLM", _DEEPSEEK),
    GgufArchitecture("gpt-oss", "gpt_oss", "GptOssForCausalLM", _GPT_OSS, turned_experts=True),
)
# Of files that hold experts.
GGUF_MIXTURES: Final = {architecture.name: architecture for architecture in _MIXTURES}
# Of a name that two models have, the one whose router is a sigmoid with a correction (arXiv 2412.19437, section 2.1.2).
_CORRECTION: Final = "exp_probs_b"
_SIGMOID: Final = GgufArchitecture(
    "deepseek2", "deepseek_v3", "DeepseekV3ForCausalLM",
    _DEEPSEEK | {f"{_CORRECTION}.bias": Piece("mlp.gate.e_score_correction_bias", "parameter")},
)  # fmt: skip
_SIGMOID_GATING: Final = 2  # of `expert_gating_func`; files without that key have a softmax, or the correction


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file belongs.

    Args:
        name: of the tensor in the model.
        heads: of a rope in pairs; 0 where the rows are in order.
        offset: what is to be subtracted.
        scale: the tensor of one number that multiplies it, if there is one.
        part: of a tensor that lies in `parts` tensors of the file, which of them it is: 0 for gate (and down), 1 for up.
        turned: stacked experts, or their biases, of a model whose own are transposed, gate and up taking turns.
        latent: of "latent", heads, and how many channels of keys (without rope) and of values a head has.
    """

    name: str
    kind: Kind
    heads: int = 0
    offset: float = 0.0
    scale: str | None = None
    part: int = 0
    parts: int = 1
    turned: bool = False
    latent: tuple[int, int, int] = (0, 0, 0)

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of the model, of a weight, a bias, or a weight in blocks, which run along a row."""
        if not self.heads:
            return tensor
        order = torch.arange(len(tensor)).view(self.heads, -1, 2).transpose(1, 2).reshape(-1)
        return tensor[order]

    def rows_in_file(self, tensor: Tensor) -> Tensor:
        """The way back from `rows`."""
        if not self.heads:
            return tensor
        order = torch.arange(len(tensor)).view(self.heads, 2, -1).transpose(1, 2).reshape(-1)
        return tensor[order]


def architecture_of(source: GgufSource) -> GgufArchitecture:
    """The table's entry for a file.

    Raises:
        CheckpointError: the file does not name an architecture, or one that is not in the table; or experts of one that is read
            without any.
    """
    name = source.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{source.path} has no general.architecture, so it holds no model")
    if source.get(f"{name}.expert_count", 0) and name in GGUF_MIXTURES:
        return _SIGMOID if name == _SIGMOID.name and _has_sigmoid(source) else GGUF_MIXTURES[name]
    if name not in GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"{source.path} holds a model of architecture {name!r:.40}; GGUF files of "
            f"{', '.join(GGUF_ARCHITECTURES | GGUF_MIXTURES)} are read (Mistral's and Mixtral's are llama); for another, "
            "load the original checkpoint, or add an entry to qkernels/models/gguf_names.py"
        )
    if source.get(f"{name}.expert_count", 0):
        raise CheckpointError(
            f"{source.path} holds a model with {source.get(f'{name}.expert_count')} experts a layer; GGUF files with "
            f"experts are read of {', '.join(GGUF_MIXTURES)} (Mixtral's are llama); load the original checkpoint"
        )
    return GGUF_ARCHITECTURES[name]


def _has_sigmoid(source: GgufSource) -> bool:
    gating = source.get(f"{_SIGMOID.name}.expert_gating_func")
    return gating == _SIGMOID_GATING or (gating is None and any(f".{_CORRECTION}." in name for name in source.entries))


def architecture_for(model_type: str) -> GgufArchitecture:
    """The table's entry for a model of transformers.

    Raises:
        ConversionError: there is none.
    """
    known = {architecture.model_type: architecture for architecture in (*_ALL, *_MIXTURES, _SIGMOID)}
    known |= {other: GGUF_ARCHITECTURES[name] for name, other in _AS_ANOTHER.items()}
    if model_type in known:
        return known[model_type]
    raise ConversionError(
        f"GGUF files are written of {', '.join(sorted(known))} models, got {model_type!r:.40}; for another, use llama.cpp's "
        "converter, or add an entry to qkernels/models/gguf_names.py"
    )


def places_for(names: Iterable[str], architecture: GgufArchitecture, config: Mapping[str, Any]) -> dict[str, Place]:
    """Where the tensors of a model belong in a file, by their names there: the way back from `places_of`.

    Args:
        names: of the model's tensors.
        config: numbers of heads, as config.json has them.

    Raises:
        ConversionError: the file has no place for a tensor.
    """
    pieces: dict[bool, dict[str, list[tuple[str, Piece]]]] = {True: {}, False: {}}  # of a layer or not, by module
    for inside, table in ((False, architecture.outer), (True, architecture.layer)):
        for spelled, piece in table.items():
            if not piece.read_only:
                pieces[inside].setdefault(piece.module, []).append((spelled, piece))
    places: dict[str, Place] = {}
    for name in names:
        match = _IN_LAYER.fullmatch(name)
        inner = name if match is None else match["module"]
        module, _, leaf = inner.rpartition(".")
        whole = [(s, p) for s, p in pieces[match is not None].get(inner, ()) if p.kind in _WHOLE_NAMES]
        found = [(s if "." in s else f"{s}.weight", piece) for s, piece in whole]
        if leaf in ("weight", "bias"):
            others = pieces[match is not None].get(module, ())
            found += [(f"{s}.{leaf}", p) for s, p in others if p.kind not in _WHOLE_NAMES]
        if not found:
            raise ConversionError(
                f"a GGUF file of architecture {architecture.name} has no place for {name}, so that it cannot hold this model"
            )
        prefix = "" if match is None else f"blk.{match['layer']}."
        places |= {f"{prefix}{spelled}": _place(name, piece, architecture, config) for spelled, piece in found}
    return places


def _place(name: str, piece: Piece, architecture: GgufArchitecture, config: Mapping[str, Any]) -> Place:
    """Where a tensor of a file belongs, whose name in the model this is."""
    latent = (
        (config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"])
        if piece.kind == "latent"
        else None
    )
    return Place(
        name,
        piece.kind,
        heads=int(config[piece.rope]) if piece.rope is not None and architecture.paired_rope else 0,
        offset=1.0 if piece.kind == "norm" and architecture.unit_offset_norms else 0.0,
        part=piece.part,
        parts=architecture.parts(piece),
        turned=architecture.turned_experts and ".experts." in f".{piece.module}",
        latent=latent or (0, 0, 0),
    )


def places_of(source: GgufSource, architecture: GgufArchitecture, config: Mapping[str, Any]) -> dict[str, Place]:
    """Where every tensor of a file belongs, by name in the file; those that the config is made of are left out.

    Args:
        config: numbers of layers and heads, as config.json has them.

    Raises:
        CheckpointError: a tensor that the table does not know, or with rows that its heads do not divide.
    """
    places: dict[str, Place] = {}
    for name, entry in source.entries.items():
        if name in FOR_CONFIG or name.endswith((SCALE, INPUT_SCALE)):
            continue
        match = _NAME.fullmatch(name)
        layer = None if match is None or match["layer"] is None else int(match["layer"])
        pieces = architecture.outer if layer is None else architecture.layer
        known = () if match is None else (f"{match['piece']}.{match['leaf']}", match["piece"])
        piece = next((pieces[spelled] for spelled in known if spelled in pieces), None)
        if match is None or piece is None:
            raise CheckpointError(
                f"{source.path} has a tensor {name} ({entry.type.name} {list(entry.shape)}), which no {architecture.name} model "
                "is known to have; load the original checkpoint"
            )
        if layer is not None and layer >= config["num_hidden_layers"]:
            raise CheckpointError(
                f"{source.path} has {name}, but says that it has {config['num_hidden_layers']} layers"
            )
        module = piece.module if layer is None else f"model.layers.{layer}.{piece.module}"
        place = _place(
            module if piece.kind in _WHOLE_NAMES else f"{module}.{match['leaf']}", piece, architecture, config
        )
        if place.heads and (not entry.shape or entry.shape[0] % (2 * place.heads)):
            raise CheckpointError(f"{name} has rows {list(entry.shape)[:1]}, which are no {place.heads} heads of pairs")
        scale = f"{name.rpartition('.')[0]}{SCALE}" if match["leaf"] == "weight" else None
        if piece.kind == "experts" and (match["leaf"] != "weight" or len(entry.shape) != 3):
            raise CheckpointError(
                f"{name} must be the weights [E, N, K] of stacked experts, got {entry.type.name} {list(entry.shape)}"
            )
        places[name] = replace(place, scale=scale if scale in source else None)
    _check_scales(source, places)
    return places


def _check_scales(source: GgufSource, places: Mapping[str, Place]) -> None:
    for name, entry in source.entries.items():
        if name.endswith((SCALE, INPUT_SCALE)):
            base = name.removesuffix(SCALE).removesuffix(INPUT_SCALE)
            if entry.shape != (1,) or entry.type.name != "F32" or f"{base}.weight" not in places:
                raise CheckpointError(
                    f"{source.path}: {name} must be one F32 number beside {base}.weight, got {entry.type.name} "
                    f"{list(entry.shape)}"
                )
