"""Which type each tensor of a GGUF file gets: llama.cpp's mixes ("Q4_K_M") as data, and one function that reads them.

A mix has a type for most weights and rules for the kinds of tensors that suffer most. The rules count: the third attn_v of
28 may have another type than the fourth, in the order in which llama.cpp takes tensors. Facts: llama-quant.cpp of llama.cpp
(with ggml 0.25.3; MIT), and golden data that its own code made (tests/golden/gguf/make_mixes.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from ..errors import ArgumentError, ConversionError
from ..storage.gguf_types import FILE_TYPES, GGML_TYPES

When = Literal[
    "always",
    "first 2", "first 4",  # of its kind
    "first 1/16", "first 1/8",  # of the layers
    "first 1/8, no importance", "first 1/8, importance",
    "an eighth at either end and every third between",
    "four queries a key",  # or more
]  # fmt: skip
Rules = tuple[tuple[When, str], ...]  # the first that holds; none: the type of the mix


@dataclass(frozen=True)
class Mix:
    """A mix of types.

    Args:
        type: of what no rule names.
        rules: by kind of tensor ("attn_v", "ffn_down", "attn_output").
        eight_experts_output: the type of attn_output in a model of eight experts, instead of what the rules say; None: `type`.
    """

    type: str
    rules: Mapping[str, Rules] = field(default_factory=dict)
    eight_experts_output: str | None = None


_MORE: Final[Rules] = (("an eighth at either end and every third between", "Q6_K"),)
_SHARED_VALUES: Final[Rules] = (("four queries a key", "Q5_K"),)
_FIRST_DOWN: Final[Rules] = (("first 1/8, no importance", "Q5_K"),)
MIXES: Final[Mapping[str, Mix]] = {
    "F32": Mix("F32"),
    "F16": Mix("F16"),
    "BF16": Mix("BF16"),
    "Q4_0": Mix("Q4_0", {"ffn_down": (("first 1/8, importance", "Q4_1"),)}),
    "Q4_1": Mix("Q4_1"),
    "Q5_0": Mix("Q5_0", {"ffn_down": (("first 1/8, importance", "Q5_1"),)}),
    "Q5_1": Mix("Q5_1"),
    "Q8_0": Mix("Q8_0"),
    "MXFP4_MOE": Mix("MXFP4"),
    "Q2_K": Mix(
        "Q2_K",
        {
            "attn_v": (("four queries a key", "Q4_K"), ("always", "Q3_K")),
            "ffn_down": (("always", "Q3_K"),),
            "attn_output": (("always", "Q3_K"),),
        },
        "Q5_K",
    ),
    "Q3_K_S": Mix("Q3_K", {}, "Q5_K"),
    "Q3_K_M": Mix(
        "Q3_K",
        {
            "attn_v": (("first 2", "Q5_K"), ("always", "Q4_K")),
            "ffn_down": (("first 1/16", "Q5_K"), ("always", "Q4_K")),
            "attn_output": (("always", "Q4_K"),),
        },
        "Q5_K",
    ),
    "Q3_K_L": Mix("Q3_K", {kind: (("always", "Q5_K"),) for kind in ("attn_v", "ffn_down", "attn_output")}),
    "Q4_K_S": Mix("Q4_K", {"attn_v": (("first 4", "Q5_K"),), "ffn_down": (("first 1/8", "Q5_K"),)}, "Q5_K"),
    "Q4_K_M": Mix("Q4_K", {"attn_v": _MORE, "ffn_down": _MORE}, "Q5_K"),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", {"attn_v": _MORE, "ffn_down": _MORE}),
    "Q6_K": Mix("Q6_K"),
    "IQ4_NL": Mix("IQ4_NL", {"attn_v": _SHARED_VALUES, "ffn_down": _FIRST_DOWN}, "Q5_K"),
    "IQ4_XS": Mix("IQ4_XS", {"attn_v": _SHARED_VALUES, "ffn_down": _FIRST_DOWN}, "Q5_K"),
}
# general.file_type of a file.
FILE_TYPE_OF: Final = {name: number for number, name in FILE_TYPES.items()}
# What a type becomes where its blocks do not divide a row; then F16.
_SMALLER: Final = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
# The kinds by a piece of a name, the first that fits; attn_qkv holds the values, too.
_KINDS: Final = {
    "attn_qkv.weight": "attn_v", "attn_kv_b.weight": "attn_v", "attn_v.weight": "attn_v", "attn_k.weight": "attn_k",
    "attn_output.weight": "attn_output", "ffn_down": "ffn_down",
}  # fmt: skip
# Matrices that stay as they are, by a piece of a name: norms, and what tells tokens to experts.
_STAY: Final = ("_norm.weight", "ffn_gate_inp.weight")
_LAYER: Final = re.compile(r"blk\.(\d+)\.")


class Facts(NamedTuple):
    """What the rules ask of a model.

    Args:
        architecture: as in the file.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0


class Chosen(NamedTuple):
    """The type of a tensor; `instead_of`: the type that the mix wanted, whose blocks do not divide its rows."""

    type: str
    instead_of: str | None = None


def file_order(name: str) -> tuple[int, str]:
    """The key by which llama.cpp sorts tensors: those of no layer first, then by layer and name."""
    layer = _LAYER.match(name)
    return (-1 if layer is None else int(layer[1]), name)


def types_of(
    tensors: Mapping[str, tuple[int, ...]],
    mix: str,
    facts: Facts,
    pure: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
    importance: bool = False,
) -> dict[str, Chosen]:
    """The type of every tensor of a file, as llama.cpp's quantizer chooses it.

    Args:
        tensors: shapes as torch has them, in_features last, by name in the file.
        mix: a key of `MIXES`.
        pure: every matrix in the type of the mix, without its rules.
        overrides: (regular expression, type); the first that is found in a name decides, before the rules and `pure`. Unlike
            llama.cpp's, they also hold in a mix of floats.
        importance: whether importances are at hand, which some rules ask.

    Returns:
        In the order of the file (`file_order`). Vectors and norms are F32.

    Raises:
        ArgumentError: no such mix or type, an expression that is none, or that is found in no name.
        ConversionError: an override's blocks do not divide a row, and no other type stands for it.

    >>> from qkernels.models.gguf_mixes import Facts, types_of
    >>> types_of({"token_embd.weight": (64, 256), "blk.0.attn_v.weight": (256, 256)}, "Q4_K_M", Facts("llama", 1, 4, 4))
    {'token_embd.weight': Chosen(type='Q6_K', instead_of=None), 'blk.0.attn_v.weight': Chosen(type='Q6_K', instead_of=None)}
    """
    if mix not in MIXES:
        raise ArgumentError(f"the type of a file must be one of {', '.join(MIXES)}, got {mix!r:.40}")
    patterns = _compiled(overrides)
    names = sorted(tensors, key=file_order)
    values = sum(_kind(name) == "attn_v" for name in names)
    tied = "output.weight" not in tensors
    seen: dict[str, int] = {}
    found: set[str] = set()
    asked: list[str] = []
    chosen: dict[str, Chosen] = {}
    for name in names:
        if len(tensors[name]) < 2 or not name.endswith("weight") or any(piece in name for piece in _STAY):
            chosen[name] = Chosen("F32")
            continue
        asked.append(name)
        matching = [(text, type) for text, pattern, type in patterns if pattern.search(name)]
        if matching:
            found.update(text for text, _ in matching)
            wanted = matching[0][1]
        elif pure or GGML_TYPES[MIXES[mix].type].dtype is not None:
            wanted = MIXES[mix].type
        else:
            wanted = _ruled(name, tensors[name], MIXES[mix], mix, facts, seen, values, tied, importance)
        chosen[name] = _fitting(wanted, tensors[name][-1])
    for text, _, type in patterns:
        if text not in found:
            raise ArgumentError(
                f"no tensor that is quantized has {text!r} in its name (--tensor-type {text}={type}); names are like "
                f"{', '.join(asked[:2] or names[:2])}"
            )
    return chosen


def _compiled(overrides: Sequence[tuple[str, str]]) -> list[tuple[str, re.Pattern[str], str]]:
    compiled = []
    for text, type in overrides:
        if type not in GGML_TYPES:
            raise ArgumentError(f"{text}={type}: there is no type {type!r:.40} of tensors in GGUF files")
        try:
            compiled.append((text, re.compile(text), type))
        except re.error as error:
            raise ArgumentError(f"{text!r:.60} is no regular expression: {error}") from error
    return compiled


def _kind(name: str) -> str:
    return next((kind for piece, kind in _KINDS.items() if piece in name), "")


def _ruled(
    name: str,
    shape: tuple[int, ...],
    mix: Mix,
    called: str,
    facts: Facts,
    seen: dict[str, int],
    values: int,
    tied: bool,
    importance: bool,
) -> str:
    """What a mix says; counts the tensors of each kind in `seen`."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        if called == "MXFP4_MOE" or mix.type == "Q8_0" or shape[-1] % GGML_TYPES[mix.type].elements:
            return "Q8_0"
        return "Q6_K"
    if called == "MXFP4_MOE":
        return "MXFP4" if len(shape) > 2 and shape[0] > 1 else "Q8_0"
    if name == "token_embd.weight":
        return mix.type
    kind = _kind(name)
    number, eight = seen.get(kind, 0), facts.experts == 8
    seen[kind] = number + 1
    if kind == "ffn_down" and facts.experts > 1:
        number = file_order(name)[0]
    if eight and kind in ("attn_v", "attn_k"):
        return "Q8_0"
    if eight and kind == "attn_output":
        return mix.eight_experts_output or mix.type
    total = values if kind == "attn_v" else facts.layers
    holds = (type for when, type in mix.rules.get(kind, ()) if _holds(when, number, total, facts, importance))
    wanted = next(holds, mix.type)
    return "Q5_K" if kind == "attn_v" and wanted in ("Q3_K", "Q4_K") and _is_70b(facts) else wanted


def _holds(when: When, number: int, total: int, facts: Facts, importance: bool) -> bool:
    """Whether a rule holds for the `number`-th of `total` tensors."""
    if when == "four queries a key":
        return facts.heads // facts.kv_heads >= 4
    if when == "an eighth at either end and every third between":
        return number < total // 8 or number >= 7 * total // 8 or (number - total // 8) % 3 == 2
    if when.endswith("importance"):
        return number < total // 8 and importance == (when == "first 1/8, importance")
    return {
        "always": True, "first 2": number < 2, "first 4": number < 4, "first 1/16": number < total // 16,
        "first 1/8": number < total // 8,
    }[when]  # fmt: skip


def _is_70b(facts: Facts) -> bool:
    """Models of 80 layers whose attn_v is so much smaller than attn_q that better values cost next to nothing."""
    shared = facts.architecture == "qwen2" or facts.heads != facts.kv_heads
    return facts.layers == 80 and facts.architecture in ("llama", "qwen2") and shared


def _fitting(wanted: str, columns: int) -> Chosen:
    """The type, or the smaller one that llama.cpp takes where its blocks do not divide a row."""
    if columns % GGML_TYPES[wanted].elements == 0:
        return Chosen(wanted)
    smaller = _SMALLER.get(wanted, wanted)
    if GGML_TYPES[smaller].elements > 32:
        raise ConversionError(
            f"rows of {columns} are no multiple of the blocks of {wanted}, and no other type stands for it"
        )
    return Chosen(smaller if columns % GGML_TYPES[smaller].elements == 0 else "F16", wanted)
