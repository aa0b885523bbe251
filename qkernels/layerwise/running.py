"""Run a model one block at a time (a decoder layer, an encoder layer): the block in hand, on what it is called with.

Activations live on the host; only the block in hand is on the compute device. What the model calls its blocks with,
`capturing` finds out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..quantizers import InputStatistics, Options
from .folds import Folds, input_weight, reader_of

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
Routing = Literal["routed", "all"]
Written = dict[str, dict[Any, Any]]
Outcome = tuple[Any, Written]  # see `Call.outcome`


@dataclass(frozen=True)
class Place:
    """Where and in which dtype a layer is computed."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def move(self, value: Any) -> Any:
        """The same (nested) arguments there: floating tensors in its dtype, other tensors in their own."""
        return map_tensors(value, lambda t: t.to(self.device, self.dtype if t.is_floating_point() else t.dtype))


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states: masks, rotary embeddings, embeddings of its own.

    Args:
        keyword: the name under which the hidden states are passed; None: as the first argument by position.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None = None

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states, and the rest of the call: they are the first argument, or the keyword that begins with "hidden", or
        the first tensor.

        Raises:
            CalibrationError: there is none.
        """
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], dict(kwargs))
        named = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        keyword = next((name for name in named if name.startswith("hidden")), named[0] if named else None)
        if args or keyword is None:
            raise CalibrationError(
                f"it is called without hidden states (arguments {[*map(type, args)]}, {list(kwargs)})"
            )
        return kwargs[keyword], cls((), {name: value for name, value in kwargs.items() if name != keyword}, keyword)

    def run(self, block: nn.Module, hidden: Tensor, place: Place) -> Any:
        """Call a block on the compute device. What it writes into dictionaries that it is given is there for the next."""
        output, written = self.outcome(block, hidden, place)
        self.write(written)
        return output

    def write(self, written: Written) -> None:
        """What a block has written, for the next to read."""
        for name, values in written.items():
            self.kwargs[name].update(values)

    def outcome(self, block: nn.Module, hidden: Tensor, place: Place) -> Outcome:
        """What a block puts out on the compute device, and what it writes into dictionaries that it is given, by keyword; those
        of the call stay as they are."""
        args, kwargs = place.move(unused(self.args)), place.move(unused(dict(self.kwargs)))
        before = {name: dict(value) for name, value in kwargs.items() if isinstance(value, dict)}
        if self.keyword is None:
            output = block(place.move(hidden), *args, **kwargs)
        else:
            output = block(*args, **{self.keyword: place.move(hidden)}, **kwargs)
        return output, {
            name: {key: value for key, value in kwargs[name].items() if given.get(key) is not value}
            for name, given in before.items()
        }


def unused(arguments: Any) -> Any:
    """Arguments `(…)` or `{…}` with the key-value caches among them, that some models make whether they are asked for or not, as
    they were before the block: a block runs many times on the same call, and would find its own keys in them."""

    def one(value: Any) -> Any:
        return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value

    if isinstance(arguments, dict):
        return {name: one(value) for name, value in arguments.items()}
    return tuple(map(one, arguments))


@dataclass
class LayerInputs:
    """What goes into a block: for every batch the hidden states `[windows, seq_len, hidden]` on the host, and the rest of its
    call.

    Args:
        exact: the hidden states of the same batches in the model as it came, for methods that aim at that (`Options.aims`).
    """

    hidden: list[Tensor]
    calls: Sequence[Call]
    exact: list[Tensor] | None = None

    def of_the_model(self) -> LayerInputs:
        """The same batches in the model as it came."""
        assert self.exact is not None
        return LayerInputs(self.exact, self.calls)

    def batches(self) -> Iterator[LayerInputs]:
        """Each batch by itself."""
        return (LayerInputs([hidden], [call]) for hidden, call in zip(self.hidden, self.calls, strict=True))

    def first(self, tokens: int) -> LayerInputs:
        """The first batches that together have at least so many tokens."""
        count, seen = 0, 0
        while count < len(self.hidden) and seen < tokens:
            seen += self.hidden[count].numel() // self.hidden[count].shape[-1]
            count += 1
        return LayerInputs(self.hidden[:count], self.calls[:count])


@dataclass(frozen=True)
class LayerJob:
    """What quantizing a decoder layer takes besides the layer and its inputs.

    Args:
        name: of the decoder layer, for messages.
        methods: the method with its options for each linear layer, by its name in the decoder layer.
        stored: the dtype of each parameter in the checkpoint, by its name in the decoder layer.
        place: where it is computed.
        folds: for methods that fold scales: which there are, and why not others.
        routing: what experts are calibrated with: the tokens that the router sends to each, or all.
    """

    name: str
    methods: Mapping[str, Options]
    stored: Mapping[str, torch.dtype]
    place: Place
    folds: Folds | None = None
    routing: Routing = "routed"


class Stop(Exception):
    """Raised by hooks, and caught here and in the modules beside."""


def run_layer(layer: nn.Module, inputs: LayerInputs, place: Place) -> Iterator[Tensor]:
    """The layer's output for every batch, on the compute device."""
    for hidden, call in zip(inputs.hidden, inputs.calls, strict=True):
        yield first_output(call.run(layer, hidden, place))


def run_to_stop(layer: nn.Module, inputs: LayerInputs, place: Place) -> None:
    """Run every batch for what hooks see of it; a hook may end a batch early by raising `Stop`."""
    for batch in inputs.batches():
        try:
            for _ in run_layer(layer, batch, place):
                pass
        except Stop:
            continue


def propagate(layer: nn.Module, inputs: LayerInputs, place: Place, name: str, keep: bool = False) -> list[Any]:
    """Run the layer, and `adopt` what it puts out."""
    pairs = zip(inputs.hidden, inputs.calls, strict=True)
    return adopt(inputs, (call.outcome(layer, hidden, place) for hidden, call in pairs), name, keep)


def adopt(inputs: LayerInputs, outcomes: Iterable[Outcome], name: str, keep: bool = False) -> list[Any]:
    """Replace the hidden states by a layer's outputs for each batch, in place; returns all that it put out, if that is to be
    kept.

    Raises:
        CalibrationError: an output is NaN or infinite.
    """
    outputs = []
    for index, (output, written) in enumerate(outcomes):
        inputs.calls[index].write(written)
        inputs.hidden[index] = kept(first_output(output), inputs.hidden[index].dtype)
        check_finite(inputs.hidden[index], f"the output of {name}", index)
        if keep:
            outputs.append(map_tensors(output, lambda t: t.to("cpu")))
    return outputs


def kept(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states on the host in a dtype; in fp32 where that is fp16, and they pass its 65504: the model may be computed in
    bf16, which Gemma needs, whatever its file says."""
    narrow = hidden.detach().to("cpu", dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(narrow).all()):
        return hidden.detach().to("cpu", torch.float32)
    return narrow


def check_finite(hidden: Tensor, what: str, batch: int) -> None:
    """Raises CalibrationError where activations are NaN or infinite."""
    bad = int((~torch.isfinite(hidden)).sum())
    if bad:
        raise CalibrationError(
            f"{what} has {bad} NaN or infinite activations in calibration batch {batch}, computed in float32; check the "
            f"model's weights, and the model on this text"
        )


def input_groups(layer: nn.Module, names: Sequence[str], inputs: LayerInputs, place: Place) -> list[list[str]]:
    """Linear layers that read the very same tensor, group by group in the order in which they run. A layer that does not run
    on the first batch (an expert that gets no token) is in no group."""
    calls: list[tuple[str, Tensor]] = []

    left = set(names)

    def note(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls.append((name, args[0]))
            left.discard(name)
            if not left:
                raise Stop

        return hook

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
    layer: nn.Module, names: Sequence[str], inputs: LayerInputs, place: Place, moments: bool = True
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of these linear layers, routers or stacked experts (all rows that go into their module) over all
    batches; `moments` as in `InputStatistics`."""
    collected = {name: InputStatistics(input_weight(layer, name).shape[-1], place.device, moments) for name in names}

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            collected[name].update(args[0])
            if len(names) == 1:
                raise Stop  # nothing after this linear is of interest

        return hook

    with pre_hooks(layer, {reader_of(layer, name): watch(name) for name in names}):
        run_to_stop(layer, inputs, place)
    return collected


def inputs_to(layer: nn.Module, name: str, inputs: LayerInputs, place: Place) -> Iterator[Tensor | None]:
    """What goes into a linear layer, batch by batch; None where a batch does not come to it."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise Stop

    for batch in inputs.batches():
        seen.clear()
        with pre_hooks(layer, {reader_of(layer, name): note}):
            run_to_stop(layer, batch, place)
        yield seen[0] if seen else None


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
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        result = copy.copy(value)
        for key, item in value.items():
            result[key] = map_tensors(item, change)
        return result
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in their order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found
