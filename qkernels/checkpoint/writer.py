"""`CheckpointWriter`: quantized modules and plain tensors into a checkpoint directory, as they become ready."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, ConversionError
from ..formats import Format, Written, native
from ..models.experts import PARTS, name_in_files
from ..models.naming import FileNames
from ..scheme import QuantScheme
from ..storage import CONFIG, ShardWriter, write_json
from ..storage.files import SHARD_BYTES, without_quantization
from ..tensor import QuantTensor
from .packed import EMBEDDINGS, PACKED
from .registry import get_format


class CheckpointWriter:
    """Writes weights, config.json and what else a format wants into an existing directory (see `atomic_directory`).

    Args:
        directory: usually the temporary directory of `atomic_directory`.
        config: the model's config.json; a quantization_config in it is replaced.
        format: a format or its name.
        max_shard_bytes: see `ShardWriter`.
        named_for: what is added has the names of this model, and is written under those that files of its architecture have
            (`FileNames`); None where it has them already.

    Raises:
        ConversionError: a tensor of that model cannot be saved.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any],
        format: Format | str = "native",
        max_shard_bytes: int = SHARD_BYTES,
        named_for: nn.Module | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.format = get_format(format) if isinstance(format, str) else format
        self._config = without_quantization(config)
        self._shards = ShardWriter(self.directory, max_shard_bytes)
        self._schemes: dict[str, QuantScheme] = {}
        self._matrices: list[str] = []
        self._embeddings: list[str] = []
        self._act_order = False
        self._file_names = None if named_for is None else FileNames(named_for)

    def add_quantized(self, module: str, weight: QuantTensor) -> None:
        """Write the weight of one module; its bias goes through `add_tensor` as `<module>.bias`.

        Raises:
            ConversionError: the format cannot express it; names the module.
            CheckpointError: the module was added before, or the disk refuses.
        """
        self._write(module, None, weight)

    def _write(self, module: str, written: str | None, weight: QuantTensor, leave: Collection[str] = ()) -> None:
        if weight.codes.dim() != 2 and not self.format.stacks:
            raise ConversionError(
                f"{module}: {self.format.name} holds one [N, K] weight a module, got {list(weight.codes.shape)}; stacked experts "
                f"are written one by one, under names that a model knows: load the checkpoint and save it"
            )
        try:
            tensors = self.format.write(weight)
        except ConversionError as error:
            raise ConversionError(f"{module}: {error}") from error
        name = written or (module if self._file_names is None else self._file_names.module(module))
        for suffix, tensor in tensors.items():
            if suffix in leave:
                continue
            self._shards.add(native.tensor_name(name, suffix, weight), tensor)
        self._schemes[name] = weight.scheme
        self._act_order |= weight.group_index is not None

    def add_embedding(self, name: str, weight: QuantTensor) -> bool:
        """Write "<module>.weight", an embedding, packed; False, and nothing written, where the format has none or cannot hold it.

        Raises:
            CheckpointError: as `add_quantized`.
        """
        if self.format.name not in PACKED:
            return False
        module = name.removesuffix(".weight")
        try:
            self._write(module, None, weight, leave=(native.GUARD,))  # transformers would take that for the embedding
        except ConversionError:
            return False
        self._embeddings.append(module if self._file_names is None else self._file_names.module(module))
        return True

    def add_experts(self, stack: str, weight: QuantTensor) -> None:
        """Write a stack of experts ("….experts.gate_up_proj", `[E, N, K]`): whole where the format has stacks, else expert by
        expert and gate apart from up, which is what other readers take.

        Raises:
            ConversionError, CheckpointError: as `add_quantized`.
        """
        if self.format.stacks:
            self._write(stack, stack if self._file_names is None else self._file_names.stack(stack), weight)
            return
        for expert in range(weight.codes.shape[0]):
            self.add_expert(stack, expert, weight[expert])

    def add_expert(self, stack: str, expert: int, weight: QuantTensor) -> None:
        """Write one expert `[N, K]` of a stack, gate apart from up, in a format that has no stacks.

        Raises:
            ConversionError, CheckpointError: as `add_quantized`.
        """
        parts = len(PARTS[stack.rpartition(".")[2]])
        for part in range(parts):
            name = name_in_files(stack, expert, part)
            written = name if self._file_names is None else self._file_names.expert(stack, expert, part)
            self._write(name, written, weight.shard("N", part, parts))

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not quantized; the bias of a quantized module after its weight.

        Raises:
            CheckpointError: the name was added before, or the disk refuses.
        """
        if self._file_names is None:
            self._add(name, tensor)
        else:
            for written, part in self._file_names.tensors(name, tensor):
                self._add(written, part)

    def _add(self, name: str, tensor: Tensor) -> None:
        if name.endswith(".weight") and tensor.dim() == 2:
            self._matrices.append(name.removesuffix(".weight"))
        self._shards.add(name, tensor)

    def close(self) -> None:
        """Write what remains, then config.json. The most frequent scheme becomes the default of the config.

        Raises:
            ConversionError: nothing quantized was added, or the format has no spelling for these schemes side by side.
            CheckpointError: the disk refuses.
        """
        if not self._schemes:
            raise ConversionError(
                f"{self.directory}: no quantized module was added, so there is nothing to save as quantized"
            )
        for name, tensor in () if self._file_names is None else self._file_names.rest():
            self._add(name, tensor)
        # Readers of some formats take every linear layer for quantized that is not named, wherever it is: a classifier's head, a
        # projector between towers. Embeddings are matrices, too, and named in vain.
        quantization = self.format.config_of(Written.of(self._schemes, self._act_order, self._matrices))
        quantization |= {EMBEDDINGS: self._embeddings} if self._embeddings else {}
        self._shards.close()
        try:
            write_json(self.directory / CONFIG, self._config | {"quantization_config": quantization})
            if self.format.config_file is not None:
                write_json(self.directory / self.format.config_file, quantization)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.directory}: {error}") from error
