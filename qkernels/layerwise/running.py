"""Run a decoder model one layer at a time.

Activations live on the host; only the layer in hand is on the compute device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.architectures import Architecture
from ..models.linears import linear_of
from ..quantizers import InputStatistics, Options

Arguments = Mapping[str, Any]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class Place:
    """Where and in which dtype a layer is computed."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def move(self, value: Any) -> Any:
        """The same (nested) arguments there: floating tensors in its dtype, other tensors in their own."""
        return map_tensors(value, lambda t: t.to(self.device, self.dtype if t.is_floating_point() else t.dtype))


@dataclass
class LayerInputs:
    """What goes into a decoder layer: hidden states on the host, one tensor `[windows, seq_len, hidden]` a batch, and keyword
    arguments (masks, rotary embeddings), which batches of one size share."""

    hidden: list[Tensor]
    arguments: Mapping[int, Arguments]

    def batches(self) -> Iterator[LayerInputs]:
        """Each batch by itself."""
        return (LayerInputs([hidden], self.arguments) for hidden in self.hidden)

    def first(self, tokens: int) -> LayerInputs:
        """The first batches that together have at least so many tokens."""
        count, seen = 0, 0
        while count < len(self.hidden) and seen < tokens:
            seen += self.hidden[count].shape[0] * self.hidden[count].shape[1]
            count += 1
        return LayerInputs(self.hidden[:count], self.arguments)


@dataclass(frozen=True)
class LayerJob:
    """What quantizing a decoder layer takes besides the layer and its inputs.

    Args:
        name: of the decoder layer, for messages.
        methods: the method with its options for each linear layer, by its name in the decoder layer.
        stored: the dtype of each parameter in the checkpoint, by its name in the decoder layer.
        place: where it is computed.
        architecture, head_dim: for methods that fold scales: what feeds what, and the width of an attention head.
    """

    name: str
    methods: Mapping[str, Options]
    stored: Mapping[str, torch.dtype]
    place: Place
    architecture: Architecture | None = None
    head_dim: int = 0


class Stop(Exception):
    """Raised by hooks, and caught here and in the modules beside."""


def capture_inputs(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor], keep_dtype: torch.dtype
) -> tuple[list[Tensor], list[Mapping[int, Arguments]]]:
    """Run the model up to its decoder layers, and record what each of them would be called with.

    The layers do not compute: each records its arguments and passes its input on, so that only the embeddings need weights.
    Arguments may differ between layers (sliding windows), and are the same for all batches of one size.

    Args:
        batches: token ids `[windows, seq_len]` on the device of the embeddings.
        keep_dtype: how hidden states are kept on the host.

    Returns:
        The hidden states before the first layer, one tensor a batch; for each layer, batch size -> arguments.
    """
    recorded: list[dict[int, Arguments]] = [{} for _ in layers]
    hidden: list[Tensor] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        names = list(signature(layers[index].forward).parameters)  # GPT-2 passes its mask by position

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            states: Tensor = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                hidden.append(states.detach().to("cpu", keep_dtype))
            recorded[index].setdefault(len(states), dict(zip(names[1:], args[1:], strict=False)) | kwargs)
            if index == len(layers) - 1:
                raise Stop
            return states

        return forward

    for index, layer in enumerate(layers):
        layer.forward = recorder(index)
    try:
        for batch in batches:
            try:
                model(input_ids=batch, use_cache=False)
            except Stop:
                continue
    finally:
        for layer in layers:
            del layer.forward
    return hidden, list(recorded)


def run_layer(layer: nn.Module, inputs: LayerInputs, place: Place) -> Iterator[Tensor]:
    """The layer's output for every batch, on the compute device."""
    for hidden in inputs.hidden:
        output = layer(place.move(hidden), **place.move(inputs.arguments[len(hidden)]))
        yield first_output(output)


def run_to_stop(layer: nn.Module, inputs: LayerInputs, place: Place) -> None:
    """Run every batch for what hooks see of it; a hook may end a batch early by raising `Stop`."""
    for batch in inputs.batches():
        try:
            for _ in run_layer(layer, batch, place):
                pass
        except Stop:
            continue


def propagate(layer: nn.Module, inputs: LayerInputs, place: Place, name: str) -> None:
    """Replace the hidden states by the layer's outputs, in place.

    Raises:
        CalibrationError: an output is NaN or infinite.
    """
    for index, output in enumerate(run_layer(layer, inputs, place)):
        inputs.hidden[index] = output.to("cpu", inputs.hidden[index].dtype)
        check_finite(inputs.hidden[index], f"the output of {name}", index)


def check_finite(hidden: Tensor, what: str, batch: int) -> None:
    """Raises CalibrationError where activations are NaN or infinite."""
    bad = int((~torch.isfinite(hidden)).sum())
    if bad:
        raise CalibrationError(
            f"{what} has {bad} NaN or infinite activations in calibration batch {batch} ({hidden.dtype}); check the model on "
            f"this text, or load it in a wider dtype (float16 overflows above 65504)"
        )


def input_groups(layer: nn.Module, names: Sequence[str], inputs: LayerInputs, place: Place) -> list[list[str]]:
    """Linear layers that read the very same tensor, group by group in the order in which they run. A layer that does not run
    on the first batch (an expert that gets no token) is in no group."""
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Hook:
        return lambda module, args: calls.append((name, args[0]))

    with pre_hooks(layer, {name: note(name) for name in names}):
        run_to_stop(layer, inputs.first(1), place)
    groups: dict[int, list[str]] = {}  # by the id of the input, which `calls` keeps alive
    placed: set[str] = set()
    for name, x in calls:
        if name not in placed:
            groups.setdefault(id(x), []).append(name)
            placed.add(name)
    return list(groups.values())


def collect_statistics(
    layer: nn.Module, names: Sequence[str], inputs: LayerInputs, place: Place
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of these linear layers over all batches."""
    collected = {name: InputStatistics(linear_of(layer, name).in_features, place.device) for name in names}

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            collected[name].update(args[0])
            if len(names) == 1:
                raise Stop  # nothing after this linear is of interest

        return hook

    with pre_hooks(layer, {name: watch(name) for name in names}):
        run_to_stop(layer, inputs, place)
    return collected


@contextmanager
def pre_hooks(layer: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Call hooks before the forward of submodules, for a while."""
    handles = [layer.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_output(output: Any) -> Tensor:
    """A block's output, where some blocks return a tuple that begins with it."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value
