"""What `load` is called with: words of transformers that it does not have, and dtypes by name or by what a checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from ..errors import ArgumentError, CheckpointError
from ..storage import CONFIG
from ..tensor import FLOAT_DTYPES
from ..text import dtype_name, dtype_names
from .source import Checkpoint

# What scripts pass to `from_pretrained`, and what it is here.
_OF_TRANSFORMERS: Final = {
    "torch_dtype": "it is called dtype here",
    "quantization_config": "the checkpoint says how it is quantized; to quantize, use replace_linear or quantize",
    "trust_remote_code": "no code of a checkpoint is run here",
    "low_cpu_mem_usage": "memory stays near the size of the result anyway",
    **dict.fromkeys(("token", "cache_dir", "subfolder"), "set HF_TOKEN or HF_HUB_CACHE, or download it first"),
    **dict.fromkeys(("attn_implementation", "use_safetensors", "local_files_only"), "leave it out"),
}


def refuse_others(others: Mapping[str, Any]) -> None:
    """Raise for arguments that `load` does not have, with what to pass instead.

    Raises:
        ArgumentError: of transformers' `from_pretrained`.
        TypeError: of nobody.
    """
    for name in others:
        if name in _OF_TRANSFORMERS:
            raise ArgumentError(f"load takes no {name}=: {_OF_TRANSFORMERS[name]}")
        raise TypeError(f"load() got an unexpected keyword argument {name!r}")


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that models are loaded in, also by name; None for "auto".

    Raises:
        ArgumentError: another one.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    for known in FLOAT_DTYPES:
        if dtype_name(known) == str(dtype).removeprefix("torch."):
            return known
    raise ArgumentError(f"dtype must be {dtype_names(FLOAT_DTYPES)}, also by name, or None, got {dtype!r:.40}")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What config.json says, else the dtype of the first float tensor that is not quantized."""
    named = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if named is None:
        floats = (checkpoint.dtype(name) for name in checkpoint.names() if checkpoint.dtype(name) in FLOAT_DTYPES)
        return next(floats, torch.float32)
    for dtype in FLOAT_DTYPES:
        if dtype_name(dtype) == str(named).removeprefix("torch."):
            return dtype
    raise CheckpointError(
        f"{CONFIG} needs dtype to be float16, bfloat16 or float32, got {named!r:.40}; pass dtype=… to load"
    )
