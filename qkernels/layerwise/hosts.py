"""Where a model's weights are while it is quantized: in memory, or in a directory of which one layer at a time is read.

Both hosts offer the same operations, and `qkernels.calibrate` does not know which one it works with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, CheckpointWriter
from ..kernels.catalogue import OnUnsupported
from ..models.building import assign, empty_to_meta
from ..models.linears import as_stored, linear_of
from ..nn import QuantLinear, model_bytes, set_module
from ..reports import ModuleReport
from ..tensor import QuantTensor
from .running import Place
from .work import WorkDirectory

Weights = dict[str, QuantTensor]


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
        """The weight of a linear layer outside the decoder layer in hand, `[N, K]`."""
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

    def finished(self, unit: str) -> list[ModuleReport] | None:
        """Nothing is finished before the run."""
        return None

    def activations(self) -> list[Tensor] | None:
        """Nothing is finished before the run."""
        return None

    def commit(self, unit: str, modules: list[ModuleReport], hidden: list[Tensor] | None = None) -> None:
        """Nothing is left to do."""


class DirectoryHost:
    """A checkpoint directory, streamed: layers are read when their turn comes, and kept in the work directory once quantized.

    Args:
        model: the directory's model with parameters on meta (`models.building.empty_model`).
        checkpoint: the directory, not quantized, under the names of the model.
        work: keeps what is finished, maybe of an earlier run.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, work: WorkDirectory) -> None:
        self.model = model
        self.bytes_before = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        self._checkpoint, self._work = checkpoint, work
        self._quantized: Weights = {}  # of the unit in hand, as is the next
        self._plain: dict[str, Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the source, which is also that of what is written."""
        return self._checkpoint.dtype(name)

    def weight(self, name: str) -> Tensor:
        """The weight of a linear layer, `[N, K]`."""
        return as_stored(self.model.get_submodule(name), self._checkpoint.read(f"{name}.weight"))

    @contextmanager
    def embeddings(self, layers: str, head: str | None, place: Place) -> Iterator[None]:
        """For a while, the tensors outside the decoder layers and the head are read and on the compute device."""
        outside = [name for name, _ in self.model.named_parameters() if not _below(name, (layers, head))]
        assign(self.model, {name: self._checkpoint.read(name) for name in outside})
        try:
            with _moved(self.model, place, (layers, head)):
                yield
        finally:
            empty_to_meta(self.model)

    @contextmanager
    def layer(self, name: str, place: Place) -> Iterator[tuple[nn.Module, Weights]]:
        """For a while, a decoder layer is read and on the compute device. Put its quantized weights into the second value;
        they are kept together with the rest of the layer, which AWQ may have changed."""
        layer = self.model.get_submodule(name)
        weights: Weights = {}
        assign(layer, {leaf: self._checkpoint.read(f"{name}.{leaf}") for leaf, _ in layer.named_parameters()})
        try:
            with _moved(layer, place):
                yield layer, weights
            for leaf, weight in weights.items():
                self.keep(f"{name}.{leaf}", weight)
            for leaf, parameter in layer.named_parameters():
                if leaf.removesuffix(".weight") not in weights:
                    self._plain[f"{name}.{leaf}"] = parameter.data.cpu()
        finally:
            empty_to_meta(layer)

    def keep(self, name: str, weight: QuantTensor) -> None:
        """A quantized weight in the place of a linear layer's, for `commit`."""
        self._quantized[name] = weight.to("cpu")

    def finished(self, unit: str) -> list[ModuleReport] | None:
        """The report of a unit that an earlier run finished, or None."""
        return self._work.finished.get(unit)

    def activations(self) -> list[Tensor] | None:
        """What the first unfinished decoder layer is fed with; None if that is the first of all."""
        return self._work.activations()

    def commit(self, unit: str, modules: list[ModuleReport], hidden: list[Tensor] | None = None) -> None:
        """A decoder layer, or a linear layer outside of one, is finished: put it on the disk, and forget it."""
        self._work.add(unit, modules, self._quantized, self._plain, hidden)
        self._quantized, self._plain = {}, {}

    def copy_to(self, writer: CheckpointWriter) -> None:
        """Write the result: what is finished, then every tensor of the source that it does not stand for."""
        done = self._work.copy_to(writer)
        for name in self._checkpoint.names():
            if name not in done:
                writer.add_tensor(name, self._checkpoint.read(name))


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
