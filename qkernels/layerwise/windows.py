"""Calibration data: texts or token ids -> windows of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError

Calibration = Sequence[str] | Sequence[Sequence[int]] | Tensor | str
Tokenizer = Callable[..., Any]

_ACCEPTED = "a list of texts, lists of token ids, or a tensor of token ids [windows, seq_len]"


def calibration_windows(
    calibration: Calibration | None,
    samples: int,
    seq_len: int,
    tokenizer: Tokenizer | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """int64 `[windows, seq_len]`: the windows to calibrate on.

    Texts, or lists of token ids of unequal lengths, are joined and cut into consecutive windows without overlap, of which
    `samples` are taken evenly over the whole. A tensor, or lists of equal length, is taken as windows already; longer ones
    are cut to `seq_len`, shorter ones keep their length.

    Args:
        tokenizer: for texts; called as transformers tokenizers are, without special tokens.
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
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        bound = f"0 … {vocabulary - 1}" if vocabulary is not None else "not negative"
        raise CalibrationError(
            f"calibration token ids must be {bound}, got {low if low < 0 else high}; is it another tokenizer's?"
        )
    count = min(samples, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def batches_of(windows: Tensor, tokens: int = 4096) -> list[Tensor]:
    """Cut windows into batches of about so many tokens each."""
    return list(windows.split(max(1, tokens // windows.shape[1])))


def _windows(calibration: Any, seq_len: int, tokenizer: Tokenizer | None) -> Tensor:
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point() or calibration.shape[1] == 0:
            raise CalibrationError(
                f"calibration must be {_ACCEPTED}, got a {calibration.dtype} tensor of shape {list(calibration.shape)}"
            )
        return calibration[:, :seq_len].cpu().long()
    if all(isinstance(item, str) for item in calibration):
        if tokenizer is None:
            raise CalibrationError("calibration texts need a tokenizer: pass tokenizer=, or token ids instead of texts")
        rows = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in calibration]
    else:
        rows = [_token_row(item) for item in calibration]
        if len({len(row) for row in rows}) == 1 and rows[0]:
            return torch.tensor(rows, dtype=torch.long)[:, :seq_len]
    joined = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    if len(joined) < seq_len:
        raise CalibrationError(
            f"calibration has {len(joined)} tokens, less than one window of seq_len={seq_len}; "
            "give more text or a smaller seq_len"
        )
    return joined[: len(joined) // seq_len * seq_len].view(-1, seq_len)


def _token_row(item: Any) -> list[int]:
    row = item.tolist() if isinstance(item, Tensor) else item
    if not isinstance(row, (list, tuple)) or not all(isinstance(token, int) for token in row):
        raise CalibrationError(f"calibration must be {_ACCEPTED}, got an item {item!r:.60}")
    return list(row)
