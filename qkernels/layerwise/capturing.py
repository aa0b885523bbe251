"""What a model calls its blocks with, found out by running everything around them.

The blocks do not compute: stand-ins note what they are called with and pass their input on, so that only what is around
them needs weights. That is right as long as each block reads what the one before puts out and nothing else that blocks
compute. Whether it does is tried, not assumed: on the first batch the stand-ins put out NaN, and what is NaN in a later
call came from a block. A chain of blocks ends there, and the next begins with the true outputs of the blocks before: at
T5's position bias, which its first block computes for the others, or where an encoder ends and a decoder begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CalibrationError, QKernelsError
from ..models.architectures import block_lists, text_part
from .running import Call, Place, Stop, check_finite, kept, map_tensors, tensors_in

Run = Callable[[str, nn.Module, Tensor, Call], Any]  # a block's name, itself, hidden states, call -> what it puts out


class Unknown:
    """Stands for what a block would put out besides floats; whoever uses it must be given the true one."""


@dataclass(frozen=True)
class Output:
    """What the outputs of a block look like.

    Args:
        value: of one call.
        passed: for each tensor in it, which tensor of the call it is, if it is one.
    """

    value: Any
    passed: tuple[int | None, ...]

    def like(self, hidden: Tensor, call: Call, others: Callable[[Tensor], Any]) -> Any:
        """Outputs of another call of this kind: `hidden` first, what is passed on, and `others(tensor)` for the rest."""
        given = tensors_in((call.args, dict(call.kwargs)))
        slots = iter(self.passed)
        first = True

        def fill(tensor: Tensor) -> Any:
            nonlocal first
            slot = next(slots)
            if first:
                first = False
                return hidden
            return given[slot] if slot is not None and slot < len(given) else others(tensor)

        return map_tensors(self.value, fill)


@dataclass
class Chain:
    """Blocks of which each is called with the output of the one before.

    Args:
        names: of the blocks, in the order in which they run.
        hidden: what the first is called with, on the host, one tensor a batch.
        calls: for each block, the rest of its call, one a batch.
        carried: what blocks write into and read from, by keyword, one a batch: keys and values that later blocks reuse.
        follows: other blocks may come after it, which need the outputs of the last.
        ended_by: the error after the last block, where the model raised one.
    """

    names: list[str] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    carried: dict[str, list[Any]] = field(default_factory=dict)
    follows: bool = False
    ended_by: Exception | None = None

    @property
    def carries(self) -> bool:
        """Whether something besides the hidden states goes from block to block."""
        return self.follows or bool(self.carried)


@dataclass
class Progress:
    """The blocks of a model, and those that are done.

    Args:
        blocks: all of them, by name.
        done: those that are quantized.
        outputs: what blocks that are done put out, one value a batch: the last of each list, and the last of all.
        carried: what blocks that are done wrote into, as in `Chain`.
        kinds: what the outputs of a kind of call look like.
        looks: the same by the block's name.
    """

    blocks: Mapping[str, nn.Module]
    done: list[str] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    carried: dict[str, list[Any]] = field(default_factory=dict)
    kinds: dict[Any, Output] = field(default_factory=dict)
    looks: dict[str, Output] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Progress:
        """Nothing is done."""
        lists = block_lists(model)
        return cls({f"{name}.{index}": block for name, blocks in lists.items() for index, block in enumerate(blocks)})

    def finish(self, chain: Chain, outputs: list[Any]) -> None:
        """The chain is done, and its last block put this out."""
        last = {name.rpartition(".")[0]: name for name in (*self.done, *chain.names)}
        self.done += chain.names
        self.outputs = {name: kept for name, kept in self.outputs.items() if name in last.values()}
        self.outputs[chain.names[-1]] = outputs
        self.carried |= chain.carried

    def carry(self, call: Call, batch: int, place: Place) -> None:
        """What blocks that are done wrote is there again, in another pass over the same batch."""
        for name, values in self.carried.items():
            if isinstance(call.kwargs.get(name), MutableMapping):
                call.kwargs[name].update(place.move(dict(values[batch])))


def capture(
    model: nn.Module, progress: Progress, batches: Sequence[Tensor], keep_dtype: torch.dtype, place: Place, run: Run
) -> Chain:
    """The next chain of blocks, and what they are called with; without names where no block is left.

    Args:
        batches: token ids `[windows, seq_len]` on the device of the embeddings.
        keep_dtype: how hidden states are kept on the host.
        run: runs a block, to see what its outputs look like.

    Raises:
        CalibrationError: the model cannot be run on token ids, calls one block twice, or uses outputs that are gone.
    """
    chain, feed = next_chain(model, progress, batches[0], place, run)
    if chain.names:
        _all_batches(model, feed, chain, progress, batches, keep_dtype, place)
    return chain


def next_chain(
    model: nn.Module, progress: Progress, batch: Tensor, place: Place, run: Run
) -> tuple[Chain, Callable[[Tensor], Any]]:
    """Which blocks make the next chain, without what they are called with; and how the model is run to get there.

    Raises: as `capture`.
    """
    for feed in feeders(model):
        chain = _first_batch(model, feed, progress, batch, place, run)
        if chain.names:
            break
    if not chain.names and not progress.done:
        raise CalibrationError(
            f"{type(model).__name__} runs none of its blocks on token ids: {chain.ended_by or 'it finished without them'}; "
            f"use RTN, HQQ or NF4, which need no calibration"
        ) from chain.ended_by
    return chain, feed


def _first_batch(
    model: nn.Module, feed: Callable[[Tensor], Any], progress: Progress, batch: Tensor, place: Place, run: Run
) -> Chain:
    """Which blocks make the next chain, told by NaN."""
    chain = Chain()
    latest: list[Any] = []  # what the last stand-in returned as hidden states, and whether the next can follow it

    def stand_in(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = _split(name, args, kwargs)
        if name in chain.names or name in seen:
            again.append(name)
            raise Stop
        if name in progress.done:
            seen.append(name)
            progress.carry(call, 0, place)
            if name in progress.outputs:
                return place.move(progress.outputs[name][0])
            return _nan(progress, name, block, hidden, call, run)[0]
        others = [tensor for tensor in tensors_in((call.args, dict(call.kwargs)))]
        tainted = any(map(_is_nan, others)) or _has_unknown(call)
        if chain.names and (tainted or not _same(hidden, latest[0]) or not latest[1]):
            chain.follows = True
            raise Stop
        if progress.done and not chain.names and (tainted or _is_nan(hidden)):
            raise CalibrationError(
                f"{name} of {type(model).__name__} reads what blocks long before it put out; use RTN, HQQ or NF4, "
                f"which need no calibration"
            )
        output, shown = _nan(progress, name, block, hidden, call, run)
        chain.names.append(name)
        latest[:] = [shown, shown.shape == hidden.shape]
        return output

    seen: list[str] = []
    again: list[str] = []
    with _standing_in(progress.blocks, stand_in), _without_head(model):
        try:
            feed(batch)
        except Stop:
            pass
        except QKernelsError:  # ours: a weight that cannot be read, a block that cannot be calibrated
            raise
        except Exception as error:  # whatever a model finds wrong with NaN, or with token ids alone
            chain.ended_by = error
            chain.follows = bool(chain.names)
    if again:
        raise CalibrationError(
            f"{type(model).__name__} runs {again[0]} several times in one pass, and calibration layer by layer would quantize it "
            f"before it has seen all its inputs; use RTN, HQQ or NF4, which need no calibration"
        )
    return chain


def _all_batches(
    model: nn.Module,
    feed: Callable[[Tensor], Any],
    chain: Chain,
    progress: Progress,
    batches: Sequence[Tensor],
    keep_dtype: torch.dtype,
    place: Place,
) -> None:
    """Fill in what the blocks of a chain are called with, batch by batch."""
    chain.calls = {name: [] for name in chain.names}
    shared = _Shared()

    def stand_in(name: str, block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden, call = _split(name, args, options)
        if name in progress.done:
            progress.carry(call, shared.batch, place)
        if name in progress.outputs:
            return place.move(progress.outputs[name][shared.batch])
        if name in chain.calls:
            if name == chain.names[0]:
                chain.hidden.append(kept(hidden, keep_dtype))
            kwargs = {keyword: shared(value) for keyword, value in call.kwargs.items()}
            chain.calls[name].append(Call(shared(call.args), kwargs, call.keyword))
            for keyword, value in kwargs.items():
                if isinstance(value, MutableMapping) and name == chain.names[0]:
                    chain.carried.setdefault(keyword, []).append(value)
            if name == chain.names[-1]:
                raise Stop
        return progress.looks[name].like(hidden, call, _as_nan)

    with _standing_in(progress.blocks, stand_in):
        for batch in batches:
            shared.next_batch()
            try:
                feed(batch)
            except Stop:
                continue
    for index, hidden in enumerate(chain.hidden):
        check_finite(hidden, "the embedding" if not progress.done else f"the input of {chain.names[0]}", index)


class _Shared:
    """Arguments on the host. Those that are equal in all batches are kept once: masks are larger than activations."""

    def __init__(self) -> None:
        self.kept: dict[Any, list[Tensor]] = {}
        self.of_batch: dict[int, tuple[Tensor, Tensor]] = {}  # both, so that an id stays taken
        self.batch = -1

    def next_batch(self) -> None:
        self.of_batch = {}
        self.batch += 1

    def __call__(self, value: Any) -> Any:
        return value if isinstance(value, dict) else map_tensors(value, self._one)  # no copy of what blocks write into

    def _one(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.of_batch:
            here = tensor.detach().to("cpu")
            alike = self.kept.setdefault((here.shape, here.dtype), [])
            equal = next((other for other in alike if torch.equal(other, here)), None)
            if equal is None and len(alike) < 4:
                alike.append(here)
            self.of_batch[id(tensor)] = (tensor, here if equal is None else equal)
        return self.of_batch[id(tensor)][1]


def _nan(progress: Progress, name: str, block: nn.Module, hidden: Tensor, call: Call, run: Run) -> tuple[Any, Tensor]:
    """What a block would put out, all NaN; and the hidden states in it."""
    kind = _kind(block, hidden, call)
    if kind not in progress.kinds:
        with _own_forward(block):
            value = run(name, block, hidden, call)
        given = {id(tensor): slot for slot, tensor in enumerate(tensors_in((call.args, dict(call.kwargs))))}
        passed = tuple(given.get(id(tensor)) for tensor in tensors_in(value))
        progress.kinds[kind] = Output(map_tensors(value, torch.empty_like), passed)
    found = progress.looks[name] = progress.kinds[kind]
    shown = torch.full_like(tensors_in(found.value)[0], torch.nan, dtype=hidden.dtype)
    return found.like(shown, call, _as_nan), shown


def _kind(block: nn.Module, hidden: Tensor, call: Call) -> Any:
    """Calls of one kind have outputs of one kind: the block's class, the shape of its input, and which arguments are tensors."""
    kinds = tuple(type(value).__name__ for value in call.args)
    return (
        type(block),
        hidden.shape,
        kinds,
        tuple(sorted((name, type(value).__name__) for name, value in call.kwargs.items())),
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether they are one tensor, or a view of all of it."""
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )


def _as_nan(tensor: Tensor) -> Any:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else Unknown()


def _is_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isnan(tensor).any())


def _has_unknown(call: Call) -> bool:
    def inside(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(map(inside, value))
        return isinstance(value, Unknown) or (isinstance(value, dict) and any(map(inside, value.values())))

    return inside((call.args, dict(call.kwargs)))


def _split(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    try:
        return Call.split(args, kwargs)
    except CalibrationError as error:
        raise CalibrationError(f"{name} cannot be calibrated: {error}; use RTN, HQQ or NF4") from None


@contextmanager
def _standing_in(blocks: Mapping[str, nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Calls of blocks go to `stand_in(name, block, args, kwargs)` for a while. Hooks and forwards that others put on a block are
    not run, and stay as they are: `_call_impl` is what runs them."""

    def instead(name: str, block: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: stand_in(name, block, args, kwargs)

    compiled = {
        name: block._compiled_call_impl for name, block in blocks.items() if block._compiled_call_impl is not None
    }
    for name, block in blocks.items():
        if name in compiled:
            block._compiled_call_impl = None
        block._call_impl = instead(name, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, block in blocks.items():
            del block._call_impl
            if name in compiled:
                block._compiled_call_impl = compiled[name]


@contextmanager
def _own_forward(block: nn.Module) -> Iterator[None]:
    """A block that is stood in for computes by itself, for a while."""
    standing = vars(block).pop("_call_impl")
    try:
        yield
    finally:
        block._call_impl = standing  # type: ignore[method-assign]


def head_of(model: nn.Module) -> str | None:
    """The name of the output embedding, which calibration never runs; None where it is an input embedding as well (FSMT)."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if isinstance(head, nn.Embedding):
        return None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


@contextmanager
def _without_head(model: nn.Module) -> Iterator[None]:
    """A pass ends before the output embedding: its logits are large, and its weights may not be there."""

    def stop(module: nn.Module, args: Any) -> None:
        raise Stop

    name = head_of(model)
    handle = model.get_submodule(name).register_forward_pre_hook(stop) if name is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def feeders(model: nn.Module) -> list[Callable[[Tensor], Any]]:
    """Ways to run a model on token ids: itself, else its text part (a CLIP model wants pixels as well).

    Raises:
        ArgumentError: there is none.
    """
    parts = [model, text_part(model)]
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        parts = [model]  # a decoder without its encoder would calibrate on something else
    found = [feed for part in dict.fromkeys(parts) if (feed := _feeder(part)) is not None]
    if not found:
        takes = getattr(model, "main_input_name", None) or next(iter(signature(model.forward).parameters), "nothing")
        raise ArgumentError(
            f"{type(model).__name__} takes {takes}, not input_ids, and calibration is on token ids; use RTN, HQQ or NF4, which "
            f"need no calibration"
        )
    return found


def _feeder(part: nn.Module) -> Callable[[Tensor], Any] | None:
    parameters = signature(part.forward).parameters
    anything = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters.values())
    if "input_ids" not in parameters and not (anything and not hasattr(part, "main_input_name")):
        return None

    def feed(batch: Tensor) -> Any:
        options: dict[str, Any] = {"use_cache": False} if anything or "use_cache" in parameters else {}
        if "decoder_input_ids" in parameters:
            options["decoder_input_ids"] = batch
        return part(input_ids=batch, **options)

    return feed
