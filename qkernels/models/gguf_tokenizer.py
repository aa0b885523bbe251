"""The tokenizer in the metadata of a GGUF file, through transformers' own converters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..errors import CheckpointError
from ..optional import need_transformers
from ..storage.gguf import GgufSource

_PREFIX: Final = "tokenizer.ggml."
# Metadata that transformers' converters take, and what they call it.
_GIVEN: Final = {
    "model": "tokenizer_type", "pre": "pre_tokenizer_type", "tokens": "tokens", "scores": "scores", "token_type": "token_type",
    "merges": "merges", "add_space_prefix": "add_prefix_space", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id", "padding_token_id": "pad_token_id",
}  # fmt: skip
_SPECIAL: Final = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id",
}  # fmt: skip
_KINDS: Final = ("gpt2", "llama")
_CONTROL, _USER_DEFINED = 3, 4  # of token_type
# Byte-level vocabularies split as GPT-2 did, which is what the converter does where it knows of no other way.
_AS_GPT2: Final = {"gpt-2", "default", "phi-2"}
# Those in which llama.cpp takes a word that is a token as that token, without merges, and begins with BOS unless told otherwise.
_WHOLE_WORDS: Final = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
}  # fmt: skip

# Those that take digits one by one and split the rest as GPT-2 did, which the converter does not know.
_DIGITS_APART: Final = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}

# Those that split by several patterns, one after the other, which the converter does not know either; as llama.cpp has them and,
# but for \\p{N}+ (digits one by one; no token of theirs has two), the tokenizer.json of the models that they are named after.
_LETTERS: Final = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ"
    "-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN: Final = "一-龥"
SPLITS_IN_TURN: Final[Mapping[str, tuple[str, ...]]] = {
    "deepseek-llm": (
        r"[\r\n]", rf"\s?[{_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", rf"[{_HAN}ࠀ-一가-퟿]+", r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"[{_HAN}ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        rf"[{_HAN}぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|""" r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}  # fmt: skip


def tokenizer_of(source: GgufSource) -> Any:
    """The tokenizer of a file, with its special tokens and chat template.

    Raises:
        CheckpointError: the file has none; its lists do not fit each other; or it is of a kind, or splits text in a way, that
            transformers' converter does not know.
    """
    need_transformers("reading a tokenizer")
    from transformers import PreTrainedTokenizerFast

    given = _given(source)
    kind, tokens, pre = given["tokenizer_type"], given["tokens"], given.get("pre_tokenizer_type")
    convert, splits = converter()
    known = {*splits, *_AS_GPT2, *_DIGITS_APART, *SPLITS_IN_TURN}
    if kind == "gpt2" and pre is not None and pre not in known:
        raise CheckpointError(
            f"{source.path} has a tokenizer that splits text as {pre!r:.40}, which transformers' converter does not know (it "
            f"knows {', '.join(sorted(known))}); load the tokenizer of the original checkpoint"
        )
    try:
        backend, _ = convert(source.get("general.architecture", ""), given)
    except Exception as error:  # a vocabulary that makes no sense fails in many ways
        raise CheckpointError(f"{source.path} has a tokenizer that transformers cannot rebuild: {error}") from error
    backend = _of_the_file(backend, len(tokens))
    if kind == "gpt2":
        backend = _spelled_as_they_are(backend, tokens, given.get("token_type") or ())
    if kind == "llama" and not str(source.get("general.architecture")).startswith("gemma"):
        _as_sentencepiece(backend, _flag(source, "add_space_prefix", True))
    if pre in _DIGITS_APART and pre not in splits:
        _split_digits(backend)
    if pre is not None and pre in SPLITS_IN_TURN and pre not in splits:
        _split_in_turn(backend, SPLITS_IN_TURN[pre])
    if pre in _WHOLE_WORDS:
        model = backend.model
        model.ignore_merges = True
        backend.model = model
    special = {
        name: tokens[number] for name, key in _SPECIAL.items() if (number := _id(source, key, tokens)) is not None
    }
    flags = {
        "add_bos_token": _flag(source, "add_bos_token", kind == "llama" or pre in _WHOLE_WORDS),
        "add_eos_token": _flag(source, "add_eos_token", False),
    }
    template = source.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=template if isinstance(template, str) else None,
        name_or_path=str(source.path),
        **special,
        **{name: flag for name, flag in flags.items() if name.replace("add_", "") in special},
    )


def _given(source: GgufSource) -> dict[str, Any]:
    """What the converter is told, checked."""
    found = {name: source.get(_PREFIX + key) for key, name in _GIVEN.items()}
    given = {name: value for name, value in found.items() if value is not None}
    kind = given.get("tokenizer_type")
    if kind is None or "tokens" not in given:
        raise CheckpointError(
            f"{source.path} has no tokenizer ({_PREFIX}model and {_PREFIX}tokens); load that of the original"
        )
    if kind not in _KINDS:
        raise CheckpointError(
            f"{source.path} has a tokenizer of kind {kind!r:.40}; {' and '.join(_KINDS)} are read; load that of the original "
            "checkpoint"
        )
    if not isinstance(given.get("pre_tokenizer_type", ""), str):
        raise CheckpointError(f"{source.path}: {_PREFIX}pre must be a string, got {given['pre_tokenizer_type']!r:.40}")
    tokens = given["tokens"]
    if not _is_strings(tokens) or not tokens:
        raise CheckpointError(f"{source.path}: {_PREFIX}tokens must be an array of strings")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise CheckpointError(f"{source.path}: {_PREFIX}tokens has {twice!r:.40} twice, so that ids have no meaning")
    for name, key in (("scores", "scores"), ("token_type", "token_type")):
        values = given.get(name)
        if values is not None:
            if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != len(tokens):
                raise CheckpointError(
                    f"{source.path}: {_PREFIX}{key} must have a number for each of {len(tokens)} tokens"
                )
            given[name] = list(values)
    merges = given.get("merges")
    if merges is not None and not (_is_strings(merges) and all(len(merge.split(" ")) == 2 for merge in merges)):
        raise CheckpointError(f"{source.path}: {_PREFIX}merges must be an array of pairs with a space between them")
    needed = "merges" if kind == "gpt2" else "scores"
    if needed not in given and "merges" not in given:
        raise CheckpointError(f"{source.path}: a tokenizer of kind {kind} needs {_PREFIX}{needed}")
    return given


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _id(source: GgufSource, key: str, tokens: Sequence[str]) -> int | None:
    value = source.get(_PREFIX + key)
    if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
        raise CheckpointError(
            f"{source.path}: {_PREFIX}{key} must be the number of one of {len(tokens)} tokens, got {value!r:.40}"
        )
    return value


def _flag(source: GgufSource, key: str, default: bool) -> bool:
    value = source.get(_PREFIX + key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{source.path}: {_PREFIX}{key} must be true or false, got {value!r:.40}")
    return default if value is None else value


def converter() -> tuple[Any, Mapping[str, str]]:
    """transformers' function, and the patterns of the ways to split text that it knows by name."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
            convert_gguf_tokenizer,
        )
    except ImportError:  # before 5.2x
        from transformers.integrations.ggml import convert_gguf_tokenizer

        return convert_gguf_tokenizer, {}
    return convert_gguf_tokenizer, GGUF_PRE_TOKENIZER_SPLITS


def _of_the_file(backend: Any, count: int) -> Any:
    """The same without the special tokens that the converter's classes have by default (GPT-2's <|endoftext|>) and the file has
    not: their ids lie beyond the embedding."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < count]
    return (
        backend
        if len(kept) == len(state["added_tokens"])
        else Tokenizer.from_str(json.dumps(state | {"added_tokens": kept}))
    )


def _spelled_as_they_are(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> Any:
    """The same with the special and added tokens that the converter leaves aside or spells byte by byte, because they hold other
    letters than those that stand for bytes (DeepSeek's <｜User｜>): llama.cpp finds them in text as they are."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    there = {token["content"] for token in state["added_tokens"]}
    vocabulary = {number: token for token, number in state["model"]["vocab"].items()}
    changed = False
    for number, (token, type) in enumerate(zip(tokens, types)):
        if type in (_CONTROL, _USER_DEFINED) and token not in there and vocabulary.get(number) != token:
            vocabulary[number], changed = token, True
            added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            state["added_tokens"].append({"id": number, "content": token, **added, "special": type == _CONTROL})
    if not changed:
        return backend
    state["model"]["vocab"] = {token: number for number, token in vocabulary.items()}
    state["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(state))


def _split_in_turn(backend: Any, patterns: Sequence[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _split_digits(backend: Any) -> None:
    from tokenizers import pre_tokenizers

    apart = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(apart)


def _as_sentencepiece(backend: Any, prefix: bool) -> None:
    """Put a space before a text, or before none, as sentencepiece and llama.cpp do: before " a" too, and again behind a special
    token. The converter does so for phi3 alone; its other sentencepiece tokenizers leave it out where there is a space
    already, and put one where the file says that there is to be none."""
    from tokenizers import decoders, normalizers

    replaced = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefix else replaced
    backend.pre_tokenizer = None
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)] if prefix else parts)
