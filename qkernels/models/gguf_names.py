"""Where the tensors of a GGUF file belong in a model of transformers, and back: one table, one entry an architecture.

llama.cpp names tensors in its own way (`blk.3.attn_q.weight`), and its converter changes some of them: the rows of q and k of
"llama" come as rope wants neighbours to turn together there, and the norms of Gemma have their 1 added already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, ConversionError
from ..storage.gguf import GgufSource

# "plain" is read as numbers whatever it is in: a router; "row" is a vector there and a matrix of one row here.
Kind = Literal["linear", "embedding", "norm", "plain", "row", "experts"]
_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<piece>[a-z0-9_]+)\.(?P<leaf>weight|bias)")
_IN_LAYER: Final = re.compile(r"model\.layers\.(?P<layer>\d{1,6})\.(?P<module>.+)")
# What the config is made of (`gguf_config.py`), not the model.
FOR_CONFIG: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# One number beside an NVFP4 weight, which multiplies it; and one for activations, which stay in 16 bits here.
SCALE: Final = ".scale"
INPUT_SCALE: Final = ".input_scale"


class Piece(NamedTuple):
    """A module that a tensor of a file belongs to; of a layer, relative to it. `rope`: which number of heads its rows have, where
    they are turned in pairs. `part`: of stacked experts, whose `module` is a parameter, which part of their rows."""

    module: str
    kind: Kind = "linear"
    rope: str | None = None
    part: int = 0


@dataclass(frozen=True)
class GgufArchitecture:
    """What `general.architecture` means.

    Args:
        name: as the file has it.
        model_type, class_name: of transformers.
        layer: pieces of a layer.
        paired_rope: rows of q and k are in llama.cpp's order.
        unit_offset_norms: the file's norm weights are 1 larger than the model's.
    """

    name: str
    model_type: str
    class_name: str
    layer: Mapping[str, Piece]
    paired_rope: bool = False
    unit_offset_norms: bool = False
    outer: Mapping[str, Piece] = field(
        default_factory=lambda: {
            "token_embd": Piece("model.embed_tokens", "embedding"),
            "output_norm": Piece("model.norm", "norm"),
            "output": Piece("lm_head"),
        }
    )


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
_MIXTURES: Final = (
    GgufArchitecture("llama", "mixtral", "MixtralForCausalLM", _NORMS | _ATTENTION | _EXPERTS, paired_rope=True),
    GgufArchitecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", _NORMS | _ATTENTION | _EXPERTS | _SHARED_EXPERT),
    GgufArchitecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", _NORMS | _ATTENTION | _HEAD_NORMS | _EXPERTS),
    GgufArchitecture("olmoe", "olmoe", "OlmoeForCausalLM", _NORMS | _ATTENTION | _HEAD_NORMS | _EXPERTS),
)
# Of files that hold experts.
GGUF_MIXTURES: Final = {architecture.name: architecture for architecture in _MIXTURES}


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file belongs.

    Args:
        name: of the tensor in the model.
        heads: of a rope in pairs; 0 where the rows are in order.
        offset: what is to be subtracted.
        scale: the tensor of one number that multiplies it, if there is one.
        part: of stacked experts, which of the parts of `name` it is: 0 for gate (and down), 1 for up.
    """

    name: str
    kind: Kind
    heads: int = 0
    offset: float = 0.0
    scale: str | None = None
    part: int = 0

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
        return GGUF_MIXTURES[name]
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


def architecture_for(model_type: str) -> GgufArchitecture:
    """The table's entry for a model of transformers.

    Raises:
        ConversionError: there is none.
    """
    known = {architecture.model_type: architecture for architecture in (*_ALL, *_MIXTURES)}
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
            pieces[inside].setdefault(piece.module, []).append((spelled, piece))
    places: dict[str, Place] = {}
    for name in names:
        match = _IN_LAYER.fullmatch(name)
        inner = name if match is None else match["module"]
        module, _, leaf = inner.rpartition(".")
        found = [
            (s, piece, "weight") for s, piece in pieces[match is not None].get(inner, ()) if piece.kind == "experts"
        ]
        if leaf in ("weight", "bias"):
            found += [(s, p, leaf) for s, p in pieces[match is not None].get(module, ()) if p.kind != "experts"]
        if not found:
            raise ConversionError(
                f"a GGUF file of architecture {architecture.name} has no place for {name}, so that it cannot hold this model"
            )
        for spelled, piece, end in found:
            heads = int(config[piece.rope]) if piece.rope is not None and architecture.paired_rope else 0
            offset = 1.0 if piece.kind == "norm" and architecture.unit_offset_norms else 0.0
            prefix = "" if match is None else f"blk.{match['layer']}."
            places[f"{prefix}{spelled}.{end}"] = Place(name, piece.kind, heads, offset, part=piece.part)
    return places


def places_of(source: GgufSource, architecture: GgufArchitecture, config: Mapping[str, int]) -> dict[str, Place]:
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
        piece = pieces.get(match["piece"]) if match is not None else None
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
        heads = config[piece.rope] if piece.rope is not None and architecture.paired_rope else 0
        if heads and (not entry.shape or entry.shape[0] % (2 * heads)):
            raise CheckpointError(f"{name} has rows {list(entry.shape)[:1]}, which are no {heads} heads of pairs")
        scale = f"{name.rpartition('.')[0]}{SCALE}" if match["leaf"] == "weight" else None
        if piece.kind == "experts" and (match["leaf"] != "weight" or len(entry.shape) != 3):
            raise CheckpointError(
                f"{name} must be the weights [E, N, K] of stacked experts, got {entry.type.name} {list(entry.shape)}"
            )
        places[name] = Place(
            module if piece.kind == "experts" else f"{module}.{match['leaf']}",
            piece.kind,
            heads,
            1.0 if piece.kind == "norm" and architecture.unit_offset_norms else 0.0,
            scale if scale in source else None,
            piece.part,
        )
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
