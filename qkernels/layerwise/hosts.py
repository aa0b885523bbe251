"""Where a model's weights are while it is quantized: in memory, or in a directory of which one layer at a time is read.

Both hosts offer the same operations, and `qkernels.calibrate` does not know which one it works with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.catalogue import OnUnsupported
from ..model_structure import assign, empty_to_meta
from ..nn import QuantLinear
from ..nn.replace import model_bytes, set_module
from ..storage import TensorSource
from ..tensor import QuantTensor
from .running import Place, linear_of

Weights = dict[str, QuantTensor]


class Writer(Protocol):
    """What a directory host writes to (`checkpoint.CheckpointWriter`)."""

    def add_quantized(self, module: str, weight: QuantTensor) -> None: ...

    def add_tensor(self, name: str, tensor: Tensor) -> None: ...


class MemoryHost:
    """An `nn.Module` whose linear layers are replaced by `QuantLinear` in place."""

    def __init__(self, model: nn.Module, on_unsupported: OnUnsupported) -> None:
        self.model = model
        self.bytes_before = model_bytes(model)
        self._on_unsupported = on_unsupported

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter as it will be stored; not while its layer is on the compute device."""
        return self.model.get_parameter(name).dtype

    def weight(self, name: str) -> Tensor:
        """The weight of a linear layer outside the decoder layer in hand."""
        return linear_of(self.model, name).weight.data

    @contextmanager
    def embeddings(self, layers: str, head: str | None, place: Place) -> Iterator[None]:
        """For a while, everything but the decoder layers and the head is on the compute device."""
        with _moved(self.model, place, (layers, head)):
            yield

    @contextmanager
    def layer(self, name: str, place: Place) -> Iterator[tuple[nn.Module, Weights]]:
        """For a while, a decoder layer is on the compute device. Put its quantized weights into the second value."""
        layer = self.model.get_submodule(name)
        weights: Weights = {}
        with _moved(layer, place):
            yield layer, weights
        for leaf, weight in weights.items():
            self.keep(f"{name}.{leaf}", weight)

    def keep(self, name: str, weight: QuantTensor) -> None:
        """Put a `QuantLinear` in a linear layer's place."""
        linear = linear_of(self.model, name)
        device, dtype = linear.weight.device, linear.weight.dtype
        packed = QuantLinear.from_quant_tensor(weight.to(device), linear.bias, device, dtype, self._on_unsupported)
        set_module(self.model, name, packed)

    def finish(self) -> None:
        """Nothing is left to do."""


class DirectoryHost:
    """A checkpoint directory, streamed: layers are read when their turn comes, and written as soon as they are quantized.

    Args:
        model: the directory's model with parameters on meta (`model_structure.empty_model`).
        source: the directory.
        writer: takes every tensor of the result.
    """

    def __init__(self, model: nn.Module, source: TensorSource, writer: Writer) -> None:
        self.model = model
        self.bytes_before = sum(source.nbytes(name) for name in source.names())
        self._source, self._writer = source, writer
        self._written: set[str] = set()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the source, which is also that of what is written."""
        return self._source.dtype(name)

    def weight(self, name: str) -> Tensor:
        """The weight of a linear layer."""
        return self._source.read(f"{name}.weight")

    @contextmanager
    def embeddings(self, layers: str, head: str | None, place: Place) -> Iterator[None]:
        """For a while, the tensors outside the decoder layers and the head are read and on the compute device."""
        outside = [name for name, _ in self.model.named_parameters() if not _below(name, (layers, head))]
        assign(self.model, {name: self._source.read(name) for name in outside})
        try:
            with _moved(self.model, place, (layers, head)):
                yield
        finally:
            empty_to_meta(self.model)

    @contextmanager
    def layer(self, name: str, place: Place) -> Iterator[tuple[nn.Module, Weights]]:
        """For a while, a decoder layer is read and on the compute device. Put its quantized weights into the second value;
        they are written together with the rest of the layer, which AWQ may have changed."""
        layer = self.model.get_submodule(name)
        weights: Weights = {}
        assign(layer, {leaf: self._source.read(f"{name}.{leaf}") for leaf, _ in layer.named_parameters()})
        try:
            with _moved(layer, place):
                yield layer, weights
            for leaf, weight in weights.items():
                self.keep(f"{name}.{leaf}", weight)
            for leaf, parameter in layer.named_parameters():
                if f"{name}.{leaf}" not in self._written:
                    self._write(f"{name}.{leaf}", parameter.data)
        finally:
            empty_to_meta(layer)

    def keep(self, name: str, weight: QuantTensor) -> None:
        """Write a quantized weight in the place of a linear layer's."""
        self._writer.add_quantized(name, weight.to("cpu"))
        self._written.add(f"{name}.weight")

    def finish(self) -> None:
        """Copy every tensor that has not been written yet."""
        for name in self._source.names():
            if name not in self._written:
                self._write(name, self._source.read(name))

    def _write(self, name: str, tensor: Tensor) -> None:
        self._writer.add_tensor(name, tensor.cpu())
        self._written.add(name)


Host = MemoryHost | DirectoryHost


@contextmanager
def _moved(module: nn.Module, place: Place, skip: tuple[str | None, ...] = ()) -> Iterator[None]:
    """For a while, parameters are on a device and in a dtype, and buffers on the device; what is below `skip` stays."""
    parameters = [(p, p.device, p.dtype) for name, p in module.named_parameters() if not _below(name, skip)]
    buffers = [(b, b.device) for name, b in module.named_buffers() if not _below(name, skip)]
    try:
        for parameter, _, _ in parameters:
            parameter.data = place.move(parameter.data)
        for buffer, _ in buffers:
            buffer.data = buffer.data.to(place.device)
        yield
    finally:
        for parameter, device, dtype in parameters:
            parameter.data = parameter.data.to(device, dtype)
        for buffer, device in buffers:
            buffer.data = buffer.data.to(device)


def _below(name: str, modules: tuple[str | None, ...]) -> bool:
    return any(module is not None and name.startswith(f"{module}.") for module in modules)
