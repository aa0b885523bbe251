"""What stands in a model for quantized modules while transformers loads it, and what keeps their tensors out of its sight."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming

from ..checkpoint import Checkpoint


class Pending(nn.Module):
    """Stands where a quantized module will be; keeps the linear layer, which is on meta, out of sight.

    A module around it may initialize its weight and bias (Mamba): it is shown those of the linear layer, as initialized.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._hidden = (linear,)
        for parameter in linear.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def linear(self) -> nn.Linear:
        return self._hidden[0]


class PendingExperts(nn.Module):
    """Stands where quantized experts will be; keeps the module that was there out of sight."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._hidden = (source,)

    @property
    def source(self) -> nn.Module:
        return self._hidden[0]


class Packed(WeightRenaming):
    """Keeps the tensors of quantized modules and packed embeddings, which we read, away from the patterns that come after it:
    gives them names that none of those matches, and that are ignored."""

    __slots__ = ("_keys",)
    KEY = r"qkernels:\d+$"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__("qkernels", "qkernels")
        biases = [f"{module}.bias" for module in checkpoint.modules]
        packed = [checkpoint.spelling(name) for name in biases if name in checkpoint]
        packed += [f"{stack}_bias" for stack in checkpoint.stacks if f"{stack}_bias" in checkpoint]
        packed += [name for module in (*checkpoint.modules, *checkpoint.stacks) for name in checkpoint.parts(module)]
        packed += [name for embedding in checkpoint.embeddings for name in checkpoint.embedding_parts(embedding)]
        self._keys = {name: f"qkernels:{index}" for index, name in enumerate(packed)}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(name, None), whether it is one of them or not: it is renamed for nobody else."""
        return self._keys.get(source_key, source_key), None
