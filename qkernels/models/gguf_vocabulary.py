"""The metadata of a GGUF file out of a tokenizer: the way back from `gguf_tokenizer.py`.

llama.cpp knows two kinds of vocabularies of interest here: byte-level BPE ("gpt2"), whose way to split text has a name and no
pattern, and sentencepiece with byte fallback ("llama"), which merges by the scores of tokens. `check_tokenizer` holds what a
reader rebuilds of the metadata against the tokenizer, on texts that show how they differ.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..errors import ConversionError
from ..storage.gguf_header import MetaValue
from .gguf_tokenizer import SPLITS_IN_TURN, converter

log = logging.getLogger(__name__)

_PREFIX: Final = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# One name for each way to split text; of ways with several names (which differ in where text begins, or in what a whole word is)
# the one of the model that it is best known from. The first whose pattern fits, and whose ids do.
_NAMES: Final = ("llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")
_IDS: Final = {
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}  # fmt: skip
# Of a token that nothing merges to: below all ranks of merges.
_LEAST: Final = -1e9
# Words and their contractions, numbers of many digits, runs of spaces and newlines, letters with marks, other scripts, emoji.
TEXTS: Final = (
    "Hello, world! The year is 2026.", "  two  spaces\n\nand\tmore   ", "naïve café — 日本語 😀", "don't I'll WE'VE 1234567 3.14",
    " leading", "HTTPServer's ÉCOLE x_1 -- \r\n\t  moon\n  moon", "", "a", "हिन्दी العربية русский",
    "def f(x):\n    return x**2  # ½",
)  # fmt: skip


def vocabulary_of(tokenizer: Any, rows: int, stops: Sequence[int] = ()) -> list[dict[str, MetaValue]]:
    """The metadata of a tokenizer; of one whose way to split text has several names, for each of them, the likeliest first.

    Args:
        tokenizer: of transformers, with a backend of the `tokenizers` library.
        rows: of the embedding; ids that the tokenizer does not have become unused tokens.
        stops: ids that end a text besides the tokenizer's own (generation_config.json); the first is the end of a turn.

    Raises:
        ConversionError: the tokenizer is of another kind, splits text in a way that has no name, or has ids beyond `rows`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConversionError(
            f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json; save it with its fast class first"
        )
    parsed = json.loads(backend.to_str())
    model = parsed["model"]
    kind = _kind(parsed, model)
    vocabulary: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in parsed.get("added_tokens") or ()}
    vocabulary |= {content: token["id"] for content, token in added.items()}
    beyond = {token for token, number in vocabulary.items() if number >= rows}
    needed = {tokenizer.bos_token, tokenizer.eos_token, *vocabulary} - (
        added.keys() - {tokenizer.bos_token, tokenizer.eos_token}
    )
    if beyond & needed:
        raise ConversionError(
            f"the tokenizer has ids up to {max(vocabulary.values())}, the embedding {rows} rows; make it larger "
            "(model.resize_token_embeddings), or take the tokenizer that belongs to the model"
        )
    if beyond:  # the model has no way to take them; transformers' classes add some by default
        log.warning("tokens beyond the embedding's %d rows are left out: %s", rows, ", ".join(sorted(beyond)[:4]))
        vocabulary = {token: number for token, number in vocabulary.items() if number < rows}
    tokens, types = _tokens(vocabulary, added, model, kind, rows)
    found = {
        "model": MetaValue("string", kind),
        "tokens": MetaValue("[string]", tokens),
        "token_type": MetaValue("[i32]", types),
    }
    if kind == "gpt2":
        found["merges"] = MetaValue("[string]", [" ".join(pair) for pair in _merges(model)])
    else:
        found["scores"] = MetaValue("[f32]", _scores(tokens, types, model))
        found["add_space_prefix"] = MetaValue("bool", _prefixes(parsed))
    found |= _special(tokenizer, rows, stops)
    named = [{"pre": MetaValue("string", pre)} for pre in _splits(parsed, kind)]
    template = _template(tokenizer)
    return [{f"{_PREFIX}{key}": value for key, value in {**pre, **found}.items()} | template for pre in named]


def check_tokenizer(rebuilt: Any, tokenizer: Any, metadata: Mapping[str, MetaValue]) -> None:
    """Raise unless a tokenizer that was rebuilt of the metadata gives the same ids.

    Texts that begin with a space are left out where a space comes before each: sentencepiece, llama.cpp and the rebuilt one put
    it there, too, while transformers' Llama class does not, whatever tokenizer.json says.

    Raises:
        ConversionError: names the text, and the ids.
    """
    prefixes = metadata.get(f"{_PREFIX}add_space_prefix", MetaValue("bool", False)).value
    for text in (text for text in TEXTS if not (prefixes and text.startswith(" "))):
        expected, got = (list(t(text)["input_ids"]) for t in (tokenizer, rebuilt))
        if got != expected:
            raise ConversionError(
                f"the tokenizer gives other ids when it is rebuilt from GGUF metadata: for {text!r} {got[:8]}, expected "
                f"{expected[:8]}; its normalizer, pre-tokenizer or post-processor is one that such files have no words for"
            )


def _kind(parsed: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model.get("type") == "BPE" and _parts(parsed.get("pre_tokenizer"), "ByteLevel"):
        return "gpt2"
    raise ConversionError(
        f"the tokenizer is {model.get('type')!r} and neither byte-level BPE nor BPE with byte fallback (sentencepiece), which "
        "are the kinds that are written to GGUF files"
    )


def _parts(step: Any, type: str) -> list[Mapping[str, Any]]:
    """The steps of a kind in a normalizer or pre-tokenizer, which may be a sequence."""
    if not isinstance(step, dict):
        return []
    inner = step.get("pretokenizers") or step.get("normalizers") or ()
    return [step] * (step.get("type") == type) + [found for part in inner for found in _parts(part, type)]


def _splits(parsed: Mapping[str, Any], kind: str) -> list[str]:
    """The names that a way to split text may have in files."""
    if kind == "llama":
        return ["default"]
    steps = parsed["pre_tokenizer"]
    patterns = [split["pattern"].get("Regex") for split in _parts(steps, "Split")]
    alone = any(digits.get("individual_digits") for digits in _parts(steps, "Digits"))
    if not patterns:
        return ["smollm" if alone else "gpt-2"]
    _, splits = converter()
    named = [name for name in _NAMES if patterns == [splits.get(name)]]
    in_turn = [str(pattern).replace("\r", r"\r").replace("\n", r"\n") for pattern in patterns] + [r"\p{N}+"] * alone
    named += [name for name, known in SPLITS_IN_TURN.items() if in_turn == [*known]]
    if not named:
        raise ConversionError(
            f"the tokenizer splits text by {patterns!r:.200}, for which GGUF files have no name that is known here"
        )
    return named


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _tokens(
    vocabulary: Mapping[str, int], added: Mapping[str, Any], model: Mapping[str, Any], kind: str, rows: int
) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, number in vocabulary.items():
        type, spelled = NORMAL, token
        if token in added:
            type = CONTROL if added[token]["special"] else USER_DEFINED
            spelled = token if added[token]["special"] else token.replace("▁", " ")
        if kind == "llama":
            if token == model.get("unk_token"):
                type = UNKNOWN
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                type = BYTE
        tokens[number], types[number] = spelled, type
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise ConversionError(f"the tokenizer has {twice!r:.40} at two ids when it is spelled as in GGUF files")
    return tokens, types


def _scores(tokens: Sequence[str], types: Sequence[int], model: Mapping[str, Any]) -> list[float]:
    """What llama.cpp merges by, the highest first: the order of merges, of a token with several pairs that of the first."""
    ranks: dict[str, int] = {}
    for first, second in _merges(model):
        ranks.setdefault(first + second, len(ranks))
    plain = (NORMAL, USER_DEFINED)
    spelled = (token.replace(" ", "▁") for token in tokens)
    return [
        -float(ranks[token]) if token in ranks else (_LEAST if type in plain else 0.0)
        for token, type in zip(spelled, types)
    ]


def _prefixes(parsed: Mapping[str, Any]) -> bool:
    """Whether a space comes before a text."""
    spaces = _parts(parsed.get("pre_tokenizer"), "Metaspace")
    return bool(_parts(parsed.get("normalizer"), "Prepend")) or any(
        space.get("prepend_scheme", "always") != "never" for space in spaces
    )


def _special(tokenizer: Any, rows: int, stops: Sequence[int]) -> dict[str, MetaValue]:
    named = {key: getattr(tokenizer, name, None) for key, name in _IDS.items()}
    ids = {key: number if number is not None and number < rows else None for key, number in named.items()}
    found = {key: MetaValue("u32", int(number)) for key, number in ids.items() if number is not None}
    others = [number for number in stops if number != ids["eos_token_id"]]
    if others and ids["eos_token_id"] is not None:
        found["eot_token_id"] = MetaValue("u32", int(others[0]))
    given = list(tokenizer("a")["input_ids"])
    for key, position in (("bos", 0), ("eos", -1)):
        number = ids[f"{key}_token_id"]
        found[f"add_{key}_token"] = MetaValue("bool", number is not None and given[position] == number)
    return found


def _template(tokenizer: Any) -> dict[str, MetaValue]:
    """The chat template, or several by name."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return {"tokenizer.chat_template": MetaValue("string", template)}
    if not isinstance(template, Mapping):
        return {}
    named = {name: text for name, text in template.items() if name != "default"}
    found = {f"tokenizer.chat_template.{name}": MetaValue("string", text) for name, text in named.items()}
    if named:
        found["tokenizer.chat_templates"] = MetaValue("[string]", list(named))
    if "default" in template:
        found["tokenizer.chat_template"] = MetaValue("string", template["default"])
    return found
