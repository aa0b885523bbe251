"""transformers: `AutoModelForCausalLM.from_pretrained(directory, gguf_file="model-Q4_K_M.gguf")` keeps blocks packed after
`enable()`.

transformers asks its mapping of quantizers for "gguf", and its mapping of architectures for the config; both get answers here, of
what `qkernels.load` makes of the file. Its own readers dequantize (llama, qwen, gemma, phi), and lose the scaling of rope in
Llama 3.1. Written for transformers 5.23 and 5.24; older ones ask nobody. They need accelerate where a GGUF file is named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import Checkpoint
from ..checkpoint.gguf import GgufCheckpoint
from ..checkpoint.layers import float_layer, floated
from ..errors import ArgumentError, UnsupportedProblem
from ..formats import Oddity, summary
from ..models.gguf_names import GGUF_ARCHITECTURES, GGUF_MIXTURES
from .transformers import QKernelsQuantizer

log = logging.getLogger(__name__)

METHOD: Final = "gguf"


class GgufQuantizer(QKernelsQuantizer):
    """Puts `QuantLinear` modules into a model that is loaded from a GGUF file, as `load` does."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True
        self._file: GgufCheckpoint | None = None

    def read_header(self, gguf_file: str) -> None:
        """Open the file; transformers asks when it knows where that is."""
        self._file = GgufCheckpoint.open(gguf_file)

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Tensor]:
        """The tensors that are no quantized modules', nor their biases."""
        assert self._file is not None
        named = self._file.named_as_in(model)
        biases = {f"{module}.bias" for module in named.modules}
        return {name: named.read(name) for name in named.names() if name not in biases}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        assert self._file is not None
        self._begin(model)
        if self._file.modules:  # else there is nothing but floats, which come through `get_state_dict`
            self._checkpoint, self._model = self._file, model
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        self._tell_of_embeddings(model)
        if not self.report.replaced:
            self.remove_quantization_config(model)
        return model

    def _tell_of_embeddings(self, model: Any) -> None:
        """What is added to them, cut off or tied anew by transformers and by adapters has to be floats."""
        assert self._file is not None
        named = self._checkpoint or self._file.named_as_in(model)
        why = "transformers resizes and ties them as floats; qkernels.load keeps them packed"
        oddities = []
        for name in named.embeddings:
            oddity = floated(name, named, model.dtype, why)
            oddities.append((name, oddity))
            self.report.skipped[name.removesuffix(".weight")] = f"{oddity.kind}: {oddity.detail}"
        for line in summary(oddities):
            log.warning("%s: %s", self._file.path, line)

    def _embeddings(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """None: `get_state_dict` has them."""
        return ()

    def _layer(
        self, linear: nn.Linear, module: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> tuple[nn.Module, list[Oddity]]:
        """A layer; where no kernel takes it here, a float one, since nobody chose the type for this machine."""
        try:
            return super()._layer(linear, module, checkpoint, device, dtype)
        except UnsupportedProblem:
            layer, oddity = float_layer(linear, module, checkpoint, device, dtype)
            self.report.skipped[module] = oddity.kind
            return layer, [oddity]


class _Metadata(dict[str, Any]):
    """What transformers reads of a file, and of which file."""

    path: str


def answer() -> None:
    """Give transformers the quantizer for GGUF files, and the configs of those that `load` reads."""
    from transformers.integrations import gguf as theirs

    AUTO_QUANTIZER_MAPPING[METHOD] = GgufQuantizer
    if not hasattr(theirs.read_gguf_metadata, "of_qkernels"):
        theirs.read_gguf_metadata = _naming_the_file(theirs.read_gguf_metadata)
    theirs.GGUF_CONFIG_ARCHS.update(dict.fromkeys((*GGUF_ARCHITECTURES, *GGUF_MIXTURES), _config))


def _naming_the_file(read: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' reader of metadata, whose result keeps the path: a config needs tensors, too (factors of rope)."""

    @wraps(read)
    def reading(gguf_path: str, *args: Any, **kwargs: Any) -> Any:
        metadata, names = read(gguf_path, *args, **kwargs)
        kept = _Metadata(metadata)
        kept.path = str(gguf_path)
        return kept, names

    reading.of_qkernels = True  # type: ignore[attr-defined]
    return reading


def _config(metadata: dict[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
    """What config.json would say."""
    if not isinstance(metadata, _Metadata):
        raise ArgumentError(
            "transformers read the metadata before enable() was called: call it first, or use qkernels.load"
        )
    return dict(GgufCheckpoint.open(metadata.path).config)
