"""What people give as calibration: texts, chats, what tokenizers return; padding never counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkernels import GPTQ, QuantLinear
from qkernels.errors import CalibrationError
from qkernels.texts import calibration_windows, capped
from tests.tiny_models import VOCABULARY, loud_model, run

transformers = pytest.importorskip("transformers")


class Words:
    """A tokenizer of one token a letter, with padding and a chat template."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    def apply_chat_template(self, messages: Any, tokenize: bool, return_dict: bool) -> list[int]:
        assert tokenize and not return_dict
        return [1, *(ord(c) % VOCABULARY for message in messages for c in message["content"])]


ROWS = [list(range(3, 13)), list(range(20, 34)), list(range(5, 15))]
PADDED = {
    "input_ids": [[0] * (14 - len(row)) + row for row in ROWS],
    "attention_mask": [[0] * (14 - len(row)) + [1] * len(row) for row in ROWS],
    "token_type_ids": [[0] * 14] * 3,
}


@pytest.mark.parametrize(
    "calibration",
    [
        PADDED,
        transformers.BatchEncoding({name: torch.tensor(rows) for name, rows in PADDED.items()}),
        [{"input_ids": torch.tensor([row])} for row in ROWS],
        [{"input_ids": PADDED["input_ids"][i], "attention_mask": PADDED["attention_mask"][i]} for i in range(3)],
        {"input_ids": [[*row, 0] for row in ROWS], "attention_mask": [[1] * len(row) + [0] for row in ROWS]},
    ],
)
def test_what_tokenizers_return_is_taken_without_its_padding(calibration: Any) -> None:
    windows = calibration_windows(calibration, 8, 12)
    assert [group.tolist() for group in windows] == [[ROWS[0], ROWS[2]], [ROWS[1][:12]]]


def test_padding_does_not_count() -> None:
    """Padding never gets to the model: the codes are those of the rows alone, whatever the padding holds."""
    codes = []
    for filler in (0, 7):
        padded = {**PADDED, "input_ids": [[filler] * (14 - len(row)) + row for row in ROWS]}
        model = loud_model()
        report = run(model, GPTQ(4, 16), calibration=padded)
        assert (report.calibration_windows, report.seq_len) == (3, 14)
        codes.append(
            torch.cat([m.quant_tensor().codes.flatten() for m in model.modules() if isinstance(m, QuantLinear)])
        )
    assert torch.equal(*codes)


def test_chats_are_windows_of_their_own() -> None:
    chats = [
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}],
        [{"role": "user", "content": "x"}],
    ]
    for given in (chats, [{"messages": chat} for chat in chats]):
        windows = calibration_windows(given, 8, 12, Words())
        assert [list(group.shape) for group in windows] == [[1, 9], [1, 2]]
    with pytest.raises(CalibrationError, match="calibration chats need a tokenizer with a chat template"):
        calibration_windows(chats, 8, 12)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            {"input_ids": [[1, 2]], "pixel_values": [[0.5]]},
            "takes input_ids and attention_mask .* got input_ids, pixel_values",
        ),
        (
            {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]},
            "attention_mask of row 0 masks tokens between others",
        ),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]}, "attention_mask must have the shape of input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "calibration has no tokens in it"),
    ],
)
def test_encodings_that_cannot_be_used(calibration: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(calibration, 8, 12)


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ({"model_type": "bert", "max_position_embeddings": 66}, 66),
        ({"model_type": "gpt2", "n_positions": 40}, 40),
        ({"model_type": "xlnet"}, 2048),
    ],
)
def test_the_longest_sequence_counts_positions_that_no_token_has(fields: dict[str, Any], longest: int) -> None:
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert capped(model, 2048) == longest
