"""Where a model's weights are while it is quantized: in memory, or in a directory of which one layer at a time is read.

Both are a `Host`, and `qkernels.calibrate` does not know which one it works with.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, CheckpointWriter, load, open_checkpoint
from ..checkpoint.loading import check_fits, model_of
from ..checkpoint.saving import write_model
from ..errors import ArgumentError, CalibrationError, CheckpointError
from ..evaluate import evaluating
from ..kernels.catalogue import OnUnsupported
from ..models.building import assign, computed, empty_to_meta
from ..models.experts import ExpertsForm, stack_at
from ..models.linears import as_stored, linear_of
from ..nn import QuantExperts, QuantLinear, QuantStack, model_bytes, other_names, set_module
from ..nn.experts import bias_of
from ..quantizers import Options
from ..reports import ModuleReport
from ..tensor import QuantTensor
from ..texts import Tokenizer, Windows, load_tokenizer, shape_of
from .preview import check_disk, preview_of
from .running import Place, Routing
from .work import WorkDirectory, run_key, work_directory

Weights = dict[str, QuantTensor]


@dataclass(frozen=True)
class Run:
    """What is going to be done with a host.

    Args:
        method: as it was asked for.
        methods: the method of each linear layer that is chosen, by its name.
        windows: int64 `[windows, seq_len]` to calibrate on, one tensor for each length; None without calibration.
        evaluated: both models will be asked for at the end (`Host.evaluation_pair`).
        save_to: the directory to make, if one is.
        resume: go on with what an interrupted run for `save_to` has finished.
        versions: of software and device, on which the bits of the result depend.
        routing: what experts are calibrated with.
    """

    method: Options
    methods: Mapping[str, Options]
    windows: Windows | None
    evaluated: bool
    save_to: str | os.PathLike[str] | None
    resume: bool
    versions: Mapping[str, str]
    routing: Routing = "routed"


class Host(Protocol):
    """A model that is quantized layer by layer, wherever its weights are."""

    @property
    def model(self) -> Any:
        """The model; parameters that are not in hand may be on meta."""

    @property
    def bytes_before(self) -> int:
        """Bytes of all its tensors before the run."""

    @property
    def on_unsupported(self) -> OnUnsupported | None:
        """What a layer without a kernel means; None where nobody asks for kernels."""

    @property
    def needs_target(self) -> bool:
        """Whether the result has no other place than a directory."""

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies beside the weights, if the weights lie anywhere."""

    def running(self, run: Run, place: Place) -> AbstractContextManager[None]:
        """What goes on around a run; what follows is for its inside."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter as it will be stored; not while its layer is on the compute device."""

    def weight(self, name: str) -> Tensor:
        """The weight `[N, K]` of a linear layer outside the decoder layer in hand."""

    def embeddings(self, skip: tuple[str | None, ...], place: Place) -> AbstractContextManager[None]:
        """For a while, everything but what is below these names (the blocks, the head) is on the compute device."""

    def layer(self, name: str, place: Place) -> AbstractContextManager[tuple[nn.Module, Weights]]:
        """For a while, a decoder layer is on the compute device. Put its quantized weights into the second value."""

    def keep(self, name: str, weight: QuantTensor) -> None:
        """A quantized weight takes a linear layer's place."""

    def finished(self, unit: str) -> list[ModuleReport] | None:
        """The report of a unit (a decoder layer, or a linear layer outside of one) that an earlier run finished."""

    def activations(self) -> list[Tensor] | None:
        """What the first unfinished decoder layer is fed with; None if that is the first of all."""

    def commit(self, unit: str, modules: list[ModuleReport], hidden: list[Tensor] | None = None) -> None:
        """A unit is finished; `hidden` is what the next decoder layer is fed with."""

    def write(self, target: Path, format: str) -> None:
        """Write the result, without the report, into a directory."""

    def evaluation_pair(self, target: Path | None, place: Place) -> tuple[nn.Module, nn.Module]:
        """The quantized model and the original, to run on the same text; `target` is where `write` has written."""


def host_of(model_or_dir: nn.Module | str | os.PathLike[str], on_unsupported: OnUnsupported) -> Host:
    """The host of a model in memory, or of a checkpoint directory; see there."""
    if isinstance(model_or_dir, nn.Module):
        return MemoryHost(model_or_dir, on_unsupported)
    return DirectoryHost.open(model_or_dir)


class MemoryHost:
    """An `nn.Module` whose linear layers are replaced by `QuantLinear` in place."""

    needs_target = False

    def __init__(self, model: nn.Module, on_unsupported: OnUnsupported) -> None:
        self.model: Any = model
        self.bytes_before = model_bytes(model)
        self.on_unsupported = on_unsupported
        self._also = other_names(model)
        self._original: nn.Module | None = None
        self._stacks: dict[str, dict[str, QuantStack]] = {}  # of experts whose other projection is still to come

    def tokenizer(self) -> None:
        """None: nobody knows where it came from."""

    @contextmanager
    def running(self, run: Run, place: Place) -> Iterator[None]:
        """Without dropout; the original is kept if the result will be compared with it.

        Raises:
            ArgumentError: weights are not where they can be computed with (`_check_at_hand`).
        """
        _check_at_hand(self.model, place)
        self._original = copy.deepcopy(self.model) if run.evaluated else None
        with evaluating(self.model):
            yield

    def dtype(self, name: str) -> torch.dtype:
        """As it is in the model."""
        dtype: torch.dtype = self.model.get_parameter(name).dtype
        return dtype

    def weight(self, name: str) -> Tensor:
        """A view of it."""
        if (found := stack_at(self.model, name)) is not None:
            _, form, projection = found
            return form.of_projection(projection, self.model.get_parameter(name).data)
        return linear_of(self.model, name).weight.data

    @contextmanager
    def embeddings(self, skip: tuple[str | None, ...], place: Place) -> Iterator[None]:
        """Moved there and back."""
        with _moved(self.model, place, skip):
            yield

    @contextmanager
    def layer(self, name: str, place: Place) -> Iterator[tuple[nn.Module, Weights]]:
        """Moved there and back."""
        layer = self.model.get_submodule(name)
        weights: Weights = {}
        with _moved(layer, place):
            yield layer, weights
        for leaf, weight in weights.items():
            self.keep(f"{name}.{leaf}", weight)

    def keep(self, name: str, weight: QuantTensor) -> None:
        """As a `QuantLinear`; of experts when both projections are there, as `QuantExperts`."""
        if (found := stack_at(self.model, name)) is not None:
            self._keep_stack(*found, weight)
            return
        linear = linear_of(self.model, name)
        device, dtype = linear.weight.device, linear.weight.dtype
        packed = QuantLinear.from_quant_tensor(weight.to(device), linear.bias, device, dtype, self.on_unsupported)
        set_module(self.model, name, packed, self._also.get(name, ()))

    def _keep_stack(self, name: str, form: ExpertsForm, projection: str, weight: QuantTensor) -> None:
        source = self.model.get_submodule(name)
        stored = source._parameters[projection]
        device, dtype = stored.device, stored.dtype
        bias = bias_of(form, projection, source._parameters.get(f"{projection}_bias"))
        experts = (weight[expert].to(device) for expert in range(form.experts))
        stacks = self._stacks.setdefault(name, {})
        stacks[projection] = QuantStack.of(experts, form.experts, bias, device, dtype, self.on_unsupported)
        if len(stacks) == 2:
            set_module(self.model, name, QuantExperts(source, form, self._stacks.pop(name)), self._also.get(name, ()))

    def finished(self, unit: str) -> list[ModuleReport] | None:
        """Nothing is finished before the run."""
        return None

    def activations(self) -> list[Tensor] | None:
        """Nothing is finished before the run."""
        return None

    def commit(self, unit: str, modules: list[ModuleReport], hidden: list[Tensor] | None = None) -> None:
        """Nothing is left to do."""

    def write(self, target: Path, format: str) -> None:
        """As `save` does."""
        write_model(self.model, target, format)

    def evaluation_pair(self, target: Path | None, place: Place) -> tuple[nn.Module, nn.Module]:
        """The model, and the copy of what it was, where they are."""
        assert self._original is not None
        return self.model, self._original


class DirectoryHost:
    """A checkpoint directory, streamed: layers are read when their turn comes, and kept in the work directory once they
    are quantized.

    Args:
        model: the directory's model with parameters on meta (`models.building.empty_model`).
        checkpoint: the directory, not quantized, under the names of the model.
    """

    needs_target = True
    on_unsupported = None  # only files are made

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.model: Any = model
        self.bytes_before = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        self.checkpoint = checkpoint
        self._slots = tied_names(model)
        self._work: WorkDirectory | None = None
        self._quantized: Weights = {}  # of the unit in hand, as is the next
        self._plain: dict[str, Tensor] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> DirectoryHost:
        """The checkpoint and its model, without weights, with the same names in both; reads headers only.

        Raises:
            ArgumentError: it is quantized already.
            CheckpointError: it is not sound, or its tensors and the model that config.json describes do not fit each
                other.
        """
        checkpoint = open_checkpoint(directory)
        if checkpoint.format is not None:
            raise ArgumentError(
                f"{directory} is quantized already (it holds {checkpoint.format.name} weights); quantize the original, or "
                f"change the format with qkernels.checkpoint.convert"
            )
        model, checkpoint = model_of(checkpoint, torch.float32)
        check_fits(model, checkpoint)
        return cls(model, checkpoint)

    def tokenizer(self) -> Tokenizer:
        """Its own.

        Raises:
            CalibrationError: there is none that transformers can read.
        """
        try:
            tokenizer: Tokenizer = load_tokenizer(self.checkpoint.path)
        except CheckpointError as error:
            raise CalibrationError(
                f"calibration texts need a tokenizer, and {self.checkpoint.path} has none that can be read: "
                f"{error.__cause__}; pass tokenizer=, or token ids instead of texts"
            ) from error
        return tokenizer

    @contextmanager
    def running(self, run: Run, place: Place) -> Iterator[None]:
        """The work directory of the target is locked; it goes when all is done (see `work.work_directory`).

        Raises:
            CheckpointError: the disk has too little room; or finished layers are there that are not to be used.
        """
        assert run.save_to is not None
        shape = shape_of(run.windows)
        check_disk(preview_of(self.checkpoint, self.model, run.method, run.methods, {}, *shape), run.save_to)
        key = run_key(self.checkpoint, run.methods, run.windows, run.versions, run.routing)
        with work_directory(run.save_to, key, run.resume) as self._work:
            yield

    @property
    def work(self) -> WorkDirectory:
        """What is finished, maybe by an earlier run."""
        assert self._work is not None
        return self._work

    def dtype(self, name: str) -> torch.dtype:
        """As in the source, which is also that of what is written."""
        return self.checkpoint.dtype(name)

    def weight(self, name: str) -> Tensor:
        """Read from the source."""
        if (found := stack_at(self.model, name)) is not None:
            return found[1].of_projection(found[2], self.checkpoint.read(name))
        return as_stored(self.model.get_submodule(name), self.checkpoint.read(f"{name}.weight"))

    @contextmanager
    def embeddings(self, skip: tuple[str | None, ...], place: Place) -> Iterator[None]:
        """Read for a while."""
        stored = [name for name in _stored_buffers(self.model, self.checkpoint) if not _below(name, skip)]
        assign(self.model, {name: self.checkpoint.read(name) for name in stored})
        for names in self._slots:
            outside = [name for name in names if not _below(name, skip)]
            if outside and (outside[0] not in computed(self.model) or outside[0] in self.checkpoint):
                tensor = self.checkpoint.read(next((name for name in names if name in self.checkpoint), names[0]))
                assign(self.model, dict.fromkeys(outside, nn.Parameter(tensor, requires_grad=False)))
        try:
            with _moved(self.model, place, skip):
                yield
        finally:
            empty_to_meta(self.model)

    @contextmanager
    def layer(self, name: str, place: Place) -> Iterator[tuple[nn.Module, Weights]]:
        """Read for a while; its quantized weights are kept together with its other tensors, which folded scales may
        have changed."""
        layer = self.model.get_submodule(name)
        weights: Weights = {}
        leaves = [leaf for leaf, _ in layer.named_parameters()] + _stored_buffers(layer, self.checkpoint, f"{name}.")
        done = self.work.tensors(name, layer)
        assign(layer, {leaf: done[leaf] if leaf in done else self.checkpoint.read(f"{name}.{leaf}") for leaf in leaves})
        try:
            with _moved(layer, place):
                yield layer, weights
            for leaf, weight in weights.items():
                self.keep(f"{name}.{leaf}", weight)
            for leaf, parameter in layer.named_parameters():
                if weights and leaf.removesuffix(".weight") not in weights:
                    self._plain[f"{name}.{leaf}"] = parameter.data.cpu()
        finally:
            empty_to_meta(layer)

    def keep(self, name: str, weight: QuantTensor) -> None:
        """Until `commit`."""
        self._quantized[name] = weight.to("cpu")

    def finished(self, unit: str) -> list[ModuleReport] | None:
        """As the work directory says."""
        return self.work.finished.get(unit)

    def activations(self) -> list[Tensor] | None:
        """As the work directory keeps them."""
        return self.work.activations()

    def commit(self, unit: str, modules: list[ModuleReport], hidden: list[Tensor] | None = None) -> None:
        """Put the unit on the disk, and forget it."""
        self.work.add(unit, modules, self._quantized, self._plain, hidden)
        self._quantized, self._plain = {}, {}

    def write(self, target: Path, format: str) -> None:
        """What is finished, then every tensor of the source that it does not stand for, and the files beside them."""
        writer = CheckpointWriter(target, self.checkpoint.config, format, named_for=self.model)
        done = self.work.copy_to(writer)
        for name in self.checkpoint.names():
            if name not in done:
                writer.add_tensor(name, self.checkpoint.read(name))
        writer.close()
        self.checkpoint.copy_side_files(target)

    def evaluation_pair(self, target: Path | None, place: Place) -> tuple[nn.Module, nn.Module]:
        """Both loaded, on the compute device."""
        assert target is not None
        made, original = (
            load(path, place.device, on_unsupported="reference") for path in (target, self.checkpoint.path)
        )
        return made, original


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


def _check_at_hand(model: nn.Module, place: Place) -> None:
    """Raise where a model's weights are offloaded, or accelerate's hooks would move what goes into its modules elsewhere."""
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise ArgumentError(
            f"{away} is on meta: it is offloaded, or was never loaded; load the model without offloading (device_map=None), or "
            f"quantize its directory, which is read layer by layer"
        )
    for name, module in model.named_modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None and torch.device(device) != place.device:
            raise ArgumentError(
                f"accelerate moves the inputs of {name or 'the model'} to {device}, and layers are computed on {place.device}; "
                f"pass device={str(device)!r}, load the model without device_map, or quantize its directory"
            )


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of a model's parameters, those of one parameter together. Ask before parameters are taken away: whatever is put
    in their place knows no ties."""
    slots: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        slots.setdefault(id(parameter), []).append(name)
    return list(slots.values())


def _stored_buffers(module: nn.Module, checkpoint: Checkpoint, prefix: str = "") -> list[str]:
    """The buffers of a module, by name, that its checkpoint has under `prefix`: what is in it counts, not what the model starts
    with."""
    return [name for name, _ in module.named_buffers() if f"{prefix}{name}" in checkpoint]


def _below(name: str, modules: tuple[str | None, ...]) -> bool:
    return any(module is not None and name.startswith(f"{module}.") for module in modules)
