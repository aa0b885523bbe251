"""Texts and token ids: a directory's tokenizer, and windows of equal length to calibrate or to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, CalibrationError, CheckpointError, QKernelsError
from .hub import local_copy
from .models.architectures import text_config
from .models.gguf_tokenizer import tokenizer_of
from .optional import need_transformers
from .storage import require_directory
from .storage.gguf import GgufSource, gguf_at

Calibration = Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Tensor | str
Windows = list[Tensor]  # int64 [windows, tokens], one tensor for each number of tokens
Evaluation = Sequence[str] | Tensor | None
Tokenizer = Callable[..., Any]

DEFAULT_SEQ_LEN = 2048

_ACCEPTED = (
    "a list of texts, of chats, or of lists of token ids, what a tokenizer returns, or a tensor of token ids "
    "[windows, seq_len]"
)
_IDS, _MASK = "input_ids", "attention_mask"
_BESIDE = {  # what tokenizers and collators put beside them, and calibration does not need
    "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "labels", "position_ids", "overflow_to_sample_mapping",
}  # fmt: skip


def load_tokenizer(directory: str | Path, revision: str | None = None) -> Any:
    """The checkpoint's own tokenizer, of a GGUF file the one in its metadata; of a model by its id on the Hub, at `revision`. No
    code of the checkpoint is run.

    Raises:
        CheckpointError: there is no such directory or file, or no tokenizer in it that transformers can read; its cause says
            why.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"<unk>": 0, "moon": 1}, unk_token="<unk>"))
    >>> files = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained("tiny")
    >>> from qkernels import load_tokenizer
    >>> load_tokenizer("tiny")("moon")["input_ids"]  # or load_tokenizer("model.gguf")
    [1]
    """
    need_transformers("reading a tokenizer")
    from transformers import AutoTokenizer

    directory = Path(local_copy(directory, revision))
    file = gguf_at(directory)
    if file is not None:
        return tokenizer_of(GgufSource.open(file))
    require_directory(directory)  # transformers would take a name for one on the Hub
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no readable tokenizer: {error}") from error


def token_rows(tokenizer: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens."""
    return [list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]


def token_ids(tokenizer: Tokenizer, *texts: str) -> Tensor:
    """int64 `[tokens]`: the token ids of texts, one after the other, without special tokens."""
    return _joined(token_rows(tokenizer, texts))


def has_texts(texts: object) -> bool:
    """Whether it is a list with a text in it, which needs a tokenizer."""
    return isinstance(texts, (list, tuple)) and any(isinstance(item, str) for item in texts)


def needs_tokenizer(calibration: object) -> bool:
    """Whether there are texts or chats in it."""
    return has_texts(calibration) or (isinstance(calibration, (list, tuple)) and any(map(_is_chat, calibration)))


def capped(model: nn.Module, seq_len: int) -> int:
    """`seq_len`, at most the longest sequence that the model's positions allow."""
    config = text_config(model)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    longest = next(
        (value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None
    )
    if longest is None or not isinstance(seq_len, int):
        return seq_len
    for name, module in model.named_modules():
        # RoBERTa counts positions from behind its padding token's: 514 of them are for 512 tokens.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    return min(seq_len, longest)


def shape_of(windows: Windows | None) -> tuple[int, int]:
    """How many windows there are, and the tokens in the longest; 0 for none."""
    return sum(map(len, windows or ())), max((group.shape[1] for group in windows or ()), default=0)


def window_length(model: nn.Module, seq_len: int | None = None) -> int:
    """`seq_len` (2048 if None), at most the longest sequence that the model's positions allow.

    Raises:
        ArgumentError: fewer than 2 tokens, which predict nothing.
    """
    return capped(model, _predicting(DEFAULT_SEQ_LEN if seq_len is None else seq_len))


def batches_of(windows: Tensor, tokens: int = 4096) -> list[Tensor]:
    """Cut windows into batches of about so many tokens each."""
    return list(windows.split(max(1, tokens // windows.shape[1])))


# --- to evaluate on ---------------------------------------------------------------------------------------------------


def text_windows(token_ids: Tensor, seq_len: int) -> Tensor:
    """int64 `[windows, seq_len]`: consecutive, without overlap; a short rest is dropped.

    Raises:
        ArgumentError: not a row of token ids, or less than one window.
    """
    _predicting(seq_len)
    if token_ids.dim() != 1 or token_ids.is_floating_point():
        raise ArgumentError(
            f"token_ids must be an integer tensor [tokens], got {token_ids.dtype} {list(token_ids.shape)}"
        )
    return _cut(token_ids, seq_len, "the text", ArgumentError).long()


def evaluation_ids(evaluation: Evaluation, tokenizer: Tokenizer | None = None) -> Tensor | None:
    """Token ids `[tokens]` of a text to evaluate on; None for None.

    Raises:
        ArgumentError: it is no list of texts and no row of token ids; there is no tokenizer for texts; or there are fewer
            than 2 tokens.
    """
    if evaluation is None:
        return None
    if isinstance(evaluation, Tensor):
        ids = evaluation
    elif not has_texts(evaluation) or not all(isinstance(text, str) for text in evaluation):
        raise ArgumentError(f"evaluation must be a list of texts or token ids [tokens], got {evaluation!r:.60}")
    elif tokenizer is None:
        raise ArgumentError("evaluation texts need a tokenizer: pass tokenizer=, or token ids instead of texts")
    else:
        ids = token_ids(tokenizer, *evaluation)
    text_windows(ids, 2)  # raises for what is no row of token ids
    return ids


# --- to calibrate on --------------------------------------------------------------------------------------------------


def calibration_windows(
    calibration: Calibration | None,
    samples: int,
    seq_len: int,
    tokenizer: Tokenizer | None = None,
    vocabulary: int | None = None,
) -> Windows:
    """int64 `[windows, seq_len]`: the windows to calibrate on, one tensor for each length.

    Texts, or lists of token ids of unequal lengths, are joined and cut into consecutive windows without overlap, of which
    `samples` are taken evenly over the whole. A tensor, or lists of equal length, is taken as windows already; longer ones
    are cut to `seq_len`, shorter ones keep their length. So is each row of what a tokenizer returns (with `input_ids`; a list of
    such is one, too), without the padding that its attention mask tells; and each chat, a list of messages with a role and
    a content, by the tokenizer's chat template.

    Args:
        tokenizer: for texts and chats; called as transformers tokenizers are, without special tokens.
        vocabulary: token ids must be below.

    Raises:
        CalibrationError: nothing was given, there is less than one window, or ids that are no token ids.
    """
    for name, value in (("samples", samples), ("seq_len", seq_len)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CalibrationError(f"{name} must be a positive integer, got {value!r}")
    if isinstance(calibration, str):
        raise CalibrationError(f"calibration must be {_ACCEPTED}, got one string: put it into a list")
    if calibration is None or len(calibration) == 0:
        raise CalibrationError(
            f"this method needs calibration: give {_ACCEPTED} like what the model will see (--calibration FILE)"
        )
    windows = _windows(calibration, seq_len, tokenizer)
    low, high = min(int(window.min()) for window in windows), max(int(window.max()) for window in windows)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        bound = f"0 … {vocabulary - 1}" if vocabulary is not None else "not negative"
        raise CalibrationError(
            f"calibration token ids must be {bound}, got {low if low < 0 else high}; is it another tokenizer's?"
        )
    count = min(samples, len(windows))
    if isinstance(windows, Tensor):
        return [windows[torch.arange(count) * len(windows) // count]]
    by_length: dict[int, list[Tensor]] = {}
    for index in range(count):
        window = windows[index * len(windows) // count]
        by_length.setdefault(len(window), []).append(window)
    return [torch.stack(rows) for rows in by_length.values()]


def _windows(calibration: Any, seq_len: int, tokenizer: Tokenizer | None) -> Tensor | list[Tensor]:
    if isinstance(calibration, Mapping):
        return _whole(_encoded_rows(calibration), seq_len)
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point() or calibration.shape[1] == 0:
            raise CalibrationError(
                f"calibration must be {_ACCEPTED}, got a {calibration.dtype} tensor of shape {list(calibration.shape)}"
            )
        return calibration[:, :seq_len].cpu().long()
    if all(isinstance(item, Mapping) and _IDS in item for item in calibration):
        return _whole([row for item in calibration for row in _encoded_rows(item)], seq_len)
    if all(map(_is_chat, calibration)):
        return _whole([_chat_row(item, tokenizer) for item in calibration], seq_len)
    if all(isinstance(item, str) for item in calibration):
        if tokenizer is None:
            raise CalibrationError("calibration texts need a tokenizer: pass tokenizer=, or token ids instead of texts")
        rows = token_rows(tokenizer, calibration)
    else:
        rows = [_token_row(item) for item in calibration]
        if len({len(row) for row in rows}) == 1 and rows[0]:
            return torch.tensor(rows, dtype=torch.long)[:, :seq_len]
    return _cut(_joined(rows), seq_len, "calibration", CalibrationError)


def _whole(rows: list[Tensor], seq_len: int) -> list[Tensor]:
    """Each row as a window of its own, cut to `seq_len`; empty ones are left out."""
    rows = [row[:seq_len] for row in rows if len(row)]
    if not rows:
        raise CalibrationError(f"calibration has no tokens in it: give {_ACCEPTED} like what the model will see")
    return rows


def _encoded_rows(encoded: Mapping[str, Any]) -> list[Tensor]:
    """The rows of what a tokenizer returns, without padding, which no window may hold: it would count as text."""
    unknown = sorted(set(encoded) - _BESIDE - {_IDS, _MASK})
    if _IDS not in encoded or unknown:
        raise CalibrationError(
            f"calibration takes {_IDS} and {_MASK} of what a tokenizer returns, got {', '.join(map(str, encoded))}; "
            f"calibration is on token ids alone"
        )
    rows, masks = _rows_of(encoded[_IDS], _IDS), None
    if encoded.get(_MASK) is not None:
        masks = _rows_of(encoded[_MASK], _MASK)
        if list(map(len, masks)) != list(map(len, rows)):
            raise CalibrationError(
                f"{_MASK} must have the shape of {_IDS}, got rows of {[*map(len, masks)][:8]} entries"
            )
    found = []
    for index, row in enumerate(rows):
        if masks is not None:
            where = masks[index].nonzero().flatten()
            if len(where) and int(where[-1] - where[0]) + 1 != len(where):
                raise CalibrationError(
                    f"{_MASK} of row {index} masks tokens between others; give each text a row of its own"
                )
            row = row[where]
        found.append(row)
    return found


def _rows_of(values: Any, what: str) -> list[Tensor]:
    """int64 rows of a tensor or of nested lists, of one row or several."""
    nested = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(nested, (list, tuple)) and nested and all(isinstance(value, int) for value in nested):
        nested = [nested]
    if not isinstance(nested, (list, tuple)):
        raise CalibrationError(f"calibration needs {what} to be rows of integers, got {values!r:.60}")
    return [torch.tensor(_token_row(row), dtype=torch.long) for row in nested]


def _is_chat(item: object) -> bool:
    """Whether it is a list of messages, or an entry of a data set that has one."""
    if isinstance(item, Mapping):
        item = item.get("messages")
    return isinstance(item, (list, tuple)) and bool(item) and all(isinstance(m, Mapping) and "role" in m for m in item)


def _chat_row(item: Any, tokenizer: Tokenizer | None) -> Tensor:
    template = getattr(tokenizer, "apply_chat_template", None)
    if template is None:
        raise CalibrationError("calibration chats need a tokenizer with a chat template: pass tokenizer=, or texts")
    messages = item["messages"] if isinstance(item, Mapping) else item
    try:
        return torch.tensor(_token_row(template(messages, tokenize=True, return_dict=False)), dtype=torch.long)
    except Exception as error:  # templates are programs, and fail in as many ways
        raise CalibrationError(f"the tokenizer's chat template fails on {messages!r:.60}: {error}") from error


def _token_row(item: Any) -> list[int]:
    row = item.tolist() if isinstance(item, Tensor) else item
    if isinstance(item, Tensor) and item.dim() == 2 and len(item) == 1:  # as a tokenizer returns one text
        row = row[0]
    if not isinstance(row, (list, tuple)) or not all(isinstance(token, int) for token in row):
        raise CalibrationError(f"calibration must be {_ACCEPTED}, got an item {item!r:.60}")
    return list(row)


def _joined(rows: Iterable[Iterable[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


def _cut(ids: Tensor, seq_len: int, whose: str, error: type[QKernelsError]) -> Tensor:
    """Consecutive windows `[windows, seq_len]` of token ids `[tokens]`, without overlap; a short rest is dropped."""
    if len(ids) < seq_len:
        raise error(
            f"{whose} has {len(ids)} tokens, less than one window of seq_len={seq_len}; give more text or a smaller "
            f"seq_len"
        )
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def _predicting(seq_len: int) -> int:
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 2:
        raise ArgumentError(
            f"seq_len must be an integer of at least 2 (each token but the first is predicted), got {seq_len!r}"
        )
    return seq_len
