"""Words for reports, the command line and error messages: tables in Markdown, and what a tensor is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parser of the command line has tables and no tensors
    import torch
    from torch import Tensor


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" of `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype | None:
    """`torch.float16` of "float16" or "torch.float16"; None where torch has no such dtype."""
    import torch

    found = getattr(torch, name.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def dtype_names(dtypes: Sequence[torch.dtype], last: str = "or") -> str:
    """ "float32, bfloat16 or float16"."""
    *rest, final = map(dtype_name, dtypes)
    return f"{', '.join(rest)} {last} {final}" if rest else final


def describe(tensor: Tensor | None, absent: str = "None") -> str:
    """Dtype and shape, "float16 [3, 96]"; `absent` where there is no tensor."""
    return absent if tensor is None else f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
