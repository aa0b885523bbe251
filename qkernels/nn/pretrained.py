"""transformers' `save_pretrained`, which knows nothing of `QuantLinear`: it would write the buffers of a kernel under names that
nobody reads, and `from_pretrained` would fill such a model with random weights.

From the first `QuantLinear` on, `save_pretrained` of a model that holds some asks here first: it writes what
`qkernels.integrations.transformers` makes of them, or where that is not imported refuses before anything is written.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..errors import ConversionError

Preparing = Callable[[Any], AbstractContextManager[None]]

_prepare: Preparing | None = None


def prepare_with(prepare: Preparing) -> None:
    """From here on, `save_pretrained` of a model that holds quantized layers runs inside of `prepare(model)`."""
    global _prepare
    _prepare = prepare


def mind_save_pretrained(quantized: type[nn.Module]) -> None:
    """Make `save_pretrained` mind modules of this class. Cheap, and nothing where transformers is not imported or minds
    them already."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    model_class: Any = getattr(modeling, "PreTrainedModel", None)
    if model_class is None or hasattr(model_class.save_pretrained, "minds"):
        return
    plain = model_class.save_pretrained

    @functools.wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        held = {name: type(module).__name__ for name, module in self.named_modules() if isinstance(module, quantized)}
        if only_adapters or not held:
            return plain(self, *args, **kwargs)
        if _prepare is None:
            raise ConversionError(
                f"save_pretrained would write {len(held)} {next(iter(held.values()))} modules of {type(self).__name__} "
                f"(first {next(iter(held))}) so that nobody can read them: use qkernels.save(model, directory), or import "
                f"qkernels.integrations.transformers, here and where the model will be loaded with from_pretrained"
            )
        with _prepare(self):
            return plain(self, *args, **kwargs)

    save_pretrained.minds = quantized  # type: ignore[attr-defined]
    model_class.save_pretrained = save_pretrained
