"""Tokenizers in the metadata of GGUF files: what differs between kinds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qkernels.errors import CheckpointError
from qkernels.texts import load_tokenizer
from tests.gguf_files import Gguf

pytest.importorskip("transformers")
U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ"]
BYTE_LEVEL: dict[str, tuple[int, Any]] = {
    "model": (STRING, "gpt2"), "pre": (STRING, "gpt-2"),
    "tokens": (ARRAY, (STRING, ["<s>", "</s>", *LETTERS, "th", "the", "Ġthe", "moon"])),
    "token_type": (ARRAY, (5, [3, 3, *[1] * (len(LETTERS) + 4)])), "merges": (ARRAY, (STRING, ["t h", "th e", "Ġ the"])),
    "bos_token_id": (U32, 0), "eos_token_id": (U32, 1),
}  # fmt: skip
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS[:-1], "th", "the", "▁the"]
SENTENCES: dict[str, tuple[int, Any]] = {
    "model": (STRING, "llama"), "tokens": (ARRAY, (STRING, PIECES)),
    "scores": (ARRAY, (6, [0.0] * 259 + [-100.0] * 27 + [-1.0, -2.0, -3.0])),
    "token_type": (ARRAY, (5, [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259)])),
    "bos_token_id": (U32, 1), "eos_token_id": (U32, 2), "unknown_token_id": (U32, 0),
}  # fmt: skip


def loaded(
    path: Path, base: dict[str, tuple[int, Any]], architecture: str = "llama", **changes: tuple[int, Any] | None
) -> Any:
    given: dict[str, tuple[int, Any] | None] = {**base, **changes}
    keys: list[tuple[Any, int, Any]] = [("general.architecture", STRING, architecture)]
    keys += [(f"tokenizer.ggml.{key}", *value) for key, value in given.items() if value is not None]
    return load_tokenizer(Gguf(keys).write(path / "m.gguf"))


def tokens(tokenizer: Any, text: str) -> Sequence[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    return found


def test_byte_level(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, BYTE_LEVEL)
    assert tokens(tokenizer, "the the</s>") == ["the", "Ġthe", "</s>"]
    assert tokens(tokenizer, "moon") == ["m", "o", "o", "n"]  # no merges lead there
    assert len(tokenizer) == 33  # and none that a class of transformers has by default
    assert tokens(loaded(tmp_path, BYTE_LEVEL, add_bos_token=(BOOL, True)), "the") == ["<s>", "the"]
    assert tokens(loaded(tmp_path, BYTE_LEVEL, add_bos_token=(BOOL, True), add_eos_token=(BOOL, True)), "the") == [
        "<s>",
        "the",
        "</s>",
    ]


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_vocabularies_that_take_whole_words_and_begin_with_bos(pre: str, tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, BYTE_LEVEL, pre=(STRING, pre))
    assert tokens(tokenizer, "moon the") == ["<s>", "moon", "Ġthe"]
    assert tokens(loaded(tmp_path, BYTE_LEVEL, pre=(STRING, pre), add_bos_token=(BOOL, False)), "moon") == ["moon"]
    again = loaded(tmp_path, BYTE_LEVEL, pre=(STRING, pre))
    again.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["model"]["ignore_merges"] is True


def test_sentencepiece(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, SENTENCES)
    assert tokens(tokenizer, "the theé") == ["<s>", "▁the", "▁the", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("the theé")["input_ids"], skip_special_tokens=True) == "the theé"
    assert tokens(tokenizer, " the") == ["<s>", "▁", "▁the"]
    without = loaded(tmp_path, SENTENCES, add_space_prefix=(BOOL, False), add_bos_token=(BOOL, False))
    assert tokens(without, "the the") == ["the", "▁the"]
    assert without.decode(without(" the")["input_ids"]) == " the"
    gemma = loaded(tmp_path, SENTENCES, "gemma2", add_space_prefix=(BOOL, False))
    assert tokens(gemma, "the the") == ["<s>", "the", "▁the"]


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (BYTE_LEVEL, {"tokens": None}, "has no tokenizer .tokenizer.ggml.model and tokenizer.ggml.tokens"),
        (BYTE_LEVEL, {"model": None}, "has no tokenizer"),
        (BYTE_LEVEL, {"model": (STRING, "bert")}, "a tokenizer of kind 'bert'; gpt2 and llama are read"),
        (BYTE_LEVEL, {"tokens": (ARRAY, (U32, [1, 2]))}, "tokenizer.ggml.tokens must be an array of strings"),
        (BYTE_LEVEL, {"tokens": (ARRAY, (STRING, []))}, "tokenizer.ggml.tokens must be an array of strings"),
        (BYTE_LEVEL, {"tokens": (ARRAY, (STRING, ["a", "b", "a"]))}, "tokenizer.ggml.tokens has 'a' twice"),
        (BYTE_LEVEL, {"token_type": (ARRAY, (5, [1]))}, "token_type must have a number for each of 33 tokens"),
        (
            BYTE_LEVEL,
            {"merges": (ARRAY, (STRING, ["t h e"]))},
            "merges must be an array of pairs with a space between them",
        ),
        (BYTE_LEVEL, {"merges": None}, "a tokenizer of kind gpt2 needs tokenizer.ggml.merges"),
        (BYTE_LEVEL, {"merges": (ARRAY, (STRING, ["x yz"]))}, "has a tokenizer that transformers cannot rebuild: .*yz"),
        (
            BYTE_LEVEL,
            {"pre": (STRING, "chatglm-bpe")},
            r"splits text as 'chatglm-bpe', which transformers' converter does not know \(it",
        ),
        (BYTE_LEVEL, {"pre": (U32, 1)}, "tokenizer.ggml.pre must be a string, got 1"),
        (BYTE_LEVEL, {"bos_token_id": (U32, 33)}, "bos_token_id must be the number of one of 33 tokens, got 33"),
        (BYTE_LEVEL, {"eos_token_id": (STRING, "x")}, "eos_token_id must be the number of one of 33 tokens, got 'x'"),
        (BYTE_LEVEL, {"add_bos_token": (U32, 1)}, "add_bos_token must be true or false, got 1"),
        (SENTENCES, {"scores": None}, "a tokenizer of kind llama needs tokenizer.ggml.scores"),
        (SENTENCES, {"scores": (STRING, "x" * len(PIECES))}, "scores must have a number for each of"),
    ],
)
def test_what_cannot_be_rebuilt_is_named(
    base: dict[str, tuple[int, Any]], changes: dict[str, tuple[int, Any] | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, base, **changes)
