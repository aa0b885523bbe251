"""A block's batches, each held where it is: when all have come to the next linear layers, these are quantized, and the batches
go on from there.

GPTQ wants what goes into a layer after those before it were quantized. Running the block from its start for every such step is
2.4 forward passes of a Llama's layer, with the last one for its outputs; held batches make it one. Each is a thread, since a
forward pass cannot be left and entered again otherwise; one of them runs at a time. What they hold is in `held_bytes`. Where
that is too much, or batches do not come by the same way, the block is run again for every step: the numbers are the same.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..quantizers import InputStatistics
from .folds import input_weight
from .running import LayerInputs, Outcome, Place, Stop, inputs_to, pre_hooks

HELD_BYTES: Final = 2 << 30
HELD_BATCHES: Final = 32  # threads, each with as many of OpenMP's as there are cores


def held_bytes(tokens: int, hidden: int, widest: int) -> int:
    """Bytes that held batches take at most, in fp32: hidden states, their residual and their norm for every token, and the input
    of the widest linear layer; 0 where they are not held."""
    size = 4 * tokens * (3 * hidden + widest)
    return size if size <= HELD_BYTES else 0


class Walk:
    """See the module. Made by `walking`."""

    def __init__(self, layer: nn.Module, targets: Iterable[str], inputs: LayerInputs, place: Place) -> None:
        self.layer, self.inputs, self.place = layer, inputs, place
        self._passed: set[str] = set()
        self._batches: list[_Batch] = []
        self._hooks = ExitStack()
        targets = list(targets)
        tokens = sum(hidden.numel() // hidden.shape[-1] for hidden in inputs.hidden)
        widest = max((input_weight(layer, target).shape[-1] for target in targets), default=0)
        few = 0 < len(inputs.hidden) <= HELD_BATCHES
        if targets and few and held_bytes(tokens, inputs.hidden[0].shape[-1], widest):
            pairs = zip(inputs.hidden, inputs.calls, strict=True)
            self._batches = [_Batch(partial(call.outcome, layer, hidden, place), place) for hidden, call in pairs]
            self._hooks.enter_context(pre_hooks(layer, {target: self._stops(target) for target in targets}))

    def _stops(self, target: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            batch = getattr(_own, "batch", None)
            if batch is not None and target not in self._passed:
                batch.hold(target, args[0])

        return hook

    def inputs_of(self, step: Sequence[str]) -> Iterator[Tensor | None]:
        """The input that the linear layers of a step share, batch by batch; None where they do not run. The steps before it are
        quantized, in place. To be taken to its end."""
        batches = self._batches.copy()
        if not batches or not all(self._comes_to(batch, step[0]) for batch in batches):
            yield from inputs_to(self.layer, step[0], self.inputs, self.place)
            return
        for batch in batches:
            yield batch.x
        self._passed.update(step)

    def statistics(self, step: Sequence[str], exact: Walk | None = None) -> InputStatistics:
        """Second moments of the input that the linear layers of a step share, over all batches, together with that of the same
        tokens in another walk, which has the weights as they came. Without, where it is not known that rows are of the same
        tokens: an expert's are those that its router sends."""
        K = input_weight(self.layer, step[0]).shape[-1]
        collected = InputStatistics(K, self.place.device, magnitudes=False)
        others = itertools.repeat(None, len(self.inputs.hidden)) if exact is None else exact.inputs_of(step)
        paired = True
        for hidden, x, other in zip(self.inputs.hidden, self.inputs_of(step), others, strict=True):
            tokens = hidden.numel() // hidden.shape[-1]
            counts = {0 if rows is None else rows.numel() // K for rows in (x, other)}
            paired = paired and counts in ({0}, {tokens})
            if x is not None:
                collected.update(x, other if paired else None)
        return collected

    def outcomes(self) -> Iterator[Outcome]:
        """What every batch puts out, with all steps quantized."""
        for hidden, call in zip(self.inputs.hidden, self.inputs.calls, strict=True):
            if self._batches and self._comes_to(self._batches[0], None):
                yield self._batches.pop(0).outcome
            else:
                yield call.outcome(self.layer, hidden, self.place)

    def _comes_to(self, batch: _Batch, target: str | None) -> bool:
        """Let a batch go on to a linear layer, or to its end. False, and no batch is held any more, where it stops elsewhere: a
        layer of a later step comes first in it, or one that did not run in the first batch."""
        if not batch.ended:
            batch.go()
        if batch.ended or batch.at == target:
            return True
        self.release()
        return False

    def release(self) -> None:
        """Let go of all batches; from now on the block runs from its start."""
        self._hooks.close()
        while self._batches:
            self._batches.pop().cancel()


@contextmanager
def walking(layer: nn.Module, targets: Iterable[str], inputs: LayerInputs, place: Place) -> Iterator[Walk]:
    """A walk through a block whose linear layers `targets` will be quantized, step by step."""
    walk = Walk(layer, targets, inputs, place)
    try:
        yield walk
    finally:
        walk.release()


_own = threading.local()  # .batch: the one whose thread this is


class _Batch:
    """A batch in a thread of its own, which runs while somebody waits in `go`.

    `at`, `x`: the linear layer before which it stands, and what goes into that; None before the start and after the end.
    """

    def __init__(self, work: Callable[[], Outcome], place: Place) -> None:
        self._work, self._device = work, place.device
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="calibration batch", daemon=True)
        self._cancelled = False
        self._error: BaseException | None = None
        self._outcome: Any = None
        self.at: str | None = None
        self.x: Tensor | None = None
        self.ended = False

    @property
    def outcome(self) -> Outcome:
        """Of one that has ended."""
        return self._outcome  # type: ignore[no-any-return]

    def go(self) -> None:
        """Run to the next stop, or to the end. Raises what the forward pass raised."""
        self.at, self.x = None, None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def hold(self, target: str, x: Tensor) -> None:
        """In the batch's own thread: stand before a linear layer until the next `go`."""
        self.at, self.x = target, x
        self._back.release()
        self._turn.acquire()
        if self._cancelled:
            raise Stop

    def cancel(self) -> None:
        """End it wherever it stands."""
        self.x = None
        if self._thread.ident is not None and not self.ended:
            self._cancelled = True
            self._turn.release()
            self._thread.join()

    def _run(self) -> None:
        _own.batch = self
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):  # both are a thread's own
                self._outcome = self._work()
        except Stop:
            pass
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        self.ended = True
        self._back.release()
