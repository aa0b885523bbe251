"""Which norm or linear layer feeds which linear layers, up to a scale per channel: found by running a block, and proved on it.
Stacked experts and what routes to them read as linear layers do, and are scaled with them.

Nothing is asked of names or classes. First the output channels of each norm and linear layer in turn are multiplied by powers of
two, while the block runs on a batch of its own inputs. A linear layer whose input comes out multiplied channel by channel reads
it, and is given the input that it has without; one whose input has changed in another way cannot make up for a scale. If then the
block puts out what it does without, those linear layers read the source and nothing else does: a candidate. Some of these factors
are far from 1, so that a bound in between that no number of the batch reaches (a clamp of values) is noticed.

The proof is the fold itself: `apply_fold` on the weights, with powers of two from 1/4 to 4, each candidate alone and together
with all that were proved before it. Powers of two, because a product or a sum of numbers that share such a factor has the bits
that it has without, and another exponent, in whatever precision the block computes: a right fold gives the very bits back, and a
wrong one does not, however small the share of what it forgets. So the bound is 0 (2^-126, where numbers become subnormal and lose
bits). It is more only where two runs of the unscaled block differ (sums in no fixed order on a GPU): four times that difference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import Fold
from ..models.experts import experts_of, routers
from ..models.linears import as_linear, is_conv1d, linear_of
from ..quantizers.grid import checked_weight
from .folds import Folds, HeadSharing, ProvedFold, Refusal, apply_fold, input_weight, reader_of
from .running import Call, LayerInputs, Place, Stop, check_finite, map_tensors, tensors_in

# Factors for output channels, none of them 1: every channel of a source is tried. FAR ones find who reads it: 2^24 takes what is
# above 4e-3 out of fp16, where models clamp, and 2^-12 leaves all their bits to numbers above 2^-114. NEAR ones prove it.
FAR = torch.tensor([2.0**-12, 0.25, 4.0, 2.0**24])
NEAR = torch.tensor([0.25, 0.5, 2.0, 4.0])

# Where two runs differ by more of their largest number, it is not rounding: 256 units of the last place of float32.
UNSTEADY = 2.0**-16

# How much of a batch is enough: which way numbers take does not hang on how many there are.
TOKENS = 64

EXPERTS = "in lists of modules of one class, as experts are, nothing is scaled"


@dataclass(frozen=True)
class Reading:
    """A tensor of the unscaled block: what a linear layer reads, or what the block puts out.

    Args:
        slack: how far that of another run may be from it.
    """

    name: str
    value: Tensor
    slack: float = torch.finfo(torch.float32).tiny

    def same(self, other: Tensor, factors: Tensor | None = None) -> bool:
        """Whether another is this one, its channels multiplied by factors `[K]` if there are some."""
        if other.shape != self.value.shape or other.dtype != self.value.dtype:
            return False
        other = other if factors is None else other / factors
        if torch.equal(other, self.value):
            return True
        return other.is_floating_point() and _largest(other - self.value) <= self.slack


@dataclass(frozen=True)
class Returned:
    """What a module returned when it was called first.

    Args:
        width: the last dimension of a tensor; 0 for other values.
        of: the linear layer whose output it is, or begins with, unchanged; itself for a linear layer.
    """

    width: int
    of: str | None


@dataclass(frozen=True)
class Observed:
    """A run of a block.

    Args:
        reads: what its linear layers read, call by call.
        outputs: what the block puts out, and what it writes for the blocks after it.
        returned: what each module returned, in the order in which they did first.
    """

    reads: list[Reading]
    outputs: list[Reading]
    returned: dict[str, Returned]


@dataclass(frozen=True)
class Bench:
    """A block on the compute device, with one batch of its inputs."""

    layer: nn.Module
    hidden: Tensor
    call: Call
    place: Place

    def run(self, hooks: Iterable[tuple[str, str, Callable[..., Any]]] = ()) -> list[Tensor]:
        """What the block puts out, and what it writes for the blocks after it.

        Args:
            hooks: a module's name, "before" or "after" its forward, and what to call.
        """
        with ExitStack() as stack:
            for name, when, hook in hooks:
                module = self.layer.get_submodule(name)
                add = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
                stack.callback(add(hook).remove)
            return tensors_in(self.call.outcome(self.layer, self.hidden.clone(), self.place))

    def linears(self) -> list[str]:
        """Names of the linear layers."""
        return [
            name for name, module in self.layer.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
        ]

    def readers(self) -> dict[str, str]:
        """Modules whose first argument is multiplied by a weight and nothing else: linear layers, experts and their routers; and
        by which name their weight is a target of folds."""
        forms = experts_of(self.layer)
        found = {name: name for name in [*self.linears(), *sorted(routers(self.layer, forms))]}
        return found | {name: f"{name}.{form.up}" for name, form in forms.items()}

    def watch(self) -> Observed:
        """Run unscaled."""
        reads: list[Reading] = []
        returned: dict[str, Returned] = {}
        made: dict[str, weakref.ref[Tensor]] = {}
        linears = self.linears()

        def before(name: str) -> Callable[..., None]:
            return lambda module, args: reads.append(Reading(name, args[0].clone())) if args else None

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) and output else output
                if name in linears:
                    made[name] = weakref.ref(first)
                of = next((linear for linear, tensor in made.items() if first is not None and tensor() is first), None)
                width = output.shape[-1] if isinstance(output, Tensor) and output.dim() else 0
                returned.setdefault(name, Returned(width, of))

            return hook

        hooks = [(name, "before", before(name)) for name in self.readers()]
        hooks += [(name, "after", after(name)) for name, _ in self.layer.named_modules()]
        return Observed(reads, [Reading("", value) for value in self.run(hooks)], returned)


def find_folds(layer: nn.Module, inputs: LayerInputs, place: Place, name: str) -> Folds:
    """The folds of a block, in the order of its forward pass, each proved; and why others were not taken. Afterwards its weights
    are what they were.

    Args:
        layer: on the compute device, in float32.
        inputs: a part of the first batch is run, two or three times for each norm and linear layer of the block.
        name: of the block, for messages.

    Raises:
        ArgumentError, CalibrationError: a weight has, or the block puts out, NaN or infinities.
    """
    with torch.no_grad():
        bench, unscaled = _observed(layer, inputs, place, name)
        if unscaled is None:
            why = "it does not compute the same twice, so that no fold can be proved"
            return Folds(refused=(Refusal(name, tuple(bench.linears()), why),))
        proved: list[ProvedFold] = []
        alike = _lists_of_alike(layer)
        refused = [Refusal(name, inside, EXPERTS) for name, inside in alike.items()]
        for source in unscaled.returned:
            if any(_below(source, name) for name in alike):
                continue
            found = _propose(bench, unscaled, source)
            if isinstance(found, ProvedFold) and not _scaled_already(found, proved):
                found = _prove(bench, unscaled, found, proved)
                if isinstance(found, ProvedFold):
                    proved.append(found)
            if isinstance(found, Refusal):
                refused.append(found)
    return Folds(tuple(proved), tuple(refused))


def _observed(layer: nn.Module, inputs: LayerInputs, place: Place, name: str) -> tuple[Bench, Observed | None]:
    """A bench with the first tokens of the first window where the block runs on them, else with the first batch."""
    hidden, call = inputs.hidden[0], inputs.calls[0]
    try:
        bench = Bench(layer, *_first_tokens(hidden, call), place)
        return bench, _twice(bench, name)
    except Exception:  # an argument was cut that should not be, or the other way round; what else is wrong is so again
        bench = Bench(layer, hidden, call, place)
        return bench, _twice(bench, name)


def _first_tokens(hidden: Tensor, call: Call) -> tuple[Tensor, Call]:
    """Hidden states `[…, windows, tokens, channels]` of one window and a few tokens, and the rest of the call cut alike:
    dimensions as long as the window, and first ones as long as there are windows."""
    if hidden.dim() < 3:
        return hidden, call
    windows, tokens = hidden.shape[-3:-1]
    few = min(tokens, TOKENS)

    def cut(value: Tensor) -> Tensor:
        for dim, size in enumerate(value.shape):
            if size == tokens:
                value = value.narrow(dim, 0, few)
            elif size == windows and dim == 0:
                value = value.narrow(0, 0, 1)
        return value

    rest = Call(map_tensors(call.args, cut), map_tensors(dict(call.kwargs), cut), call.keyword)
    return hidden.narrow(-3, 0, 1).narrow(-2, 0, few), rest


def _twice(bench: Bench, name: str) -> Observed | None:
    """An unscaled run, with how much another differs; None where that is more than rounding."""
    one, other = bench.watch(), bench.watch()
    if not all(bool(torch.isfinite(reading.value).all()) for reading in one.outputs):
        for leaf in bench.linears():  # a weight that is to blame is named
            checked_weight(linear_of(bench.layer, leaf).weight.data, f"{name}.{leaf}.weight")
        for reading in one.outputs:
            check_finite(reading.value, f"the output of {name}", 0)
    pairs = [*zip(one.reads, other.reads, strict=False), *zip(one.outputs, other.outputs, strict=False)]
    if len(pairs) < max(len(run.reads) + len(run.outputs) for run in (one, other)):
        return None
    steady = []
    for this, that in pairs:
        slack = this.slack
        if not this.same(that.value):
            if not this.value.is_floating_point() or this.value.shape != that.value.shape:
                return None
            slack = 4 * _largest(this.value - that.value)
            if not slack <= UNSTEADY * _largest(this.value):
                return None
        if this.name != that.name:
            return None
        steady.append(Reading(this.name, this.value, slack))
    return Observed(steady[: len(one.reads)], steady[len(one.reads) :], one.returned)


def _propose(bench: Bench, unscaled: Observed, source: str) -> ProvedFold | Refusal | None:
    """The linear layers that read a module's output up to a scale per channel, if nothing else does; None where no linear layer
    does, or where the module is not of a kind that scales are folded into."""
    if not _takes_scales(bench.layer, source, unscaled.returned[source].width):
        return None
    factors = _random(FAR, _fan_out(bench.layer, source), 0, bench.place.device)
    readers = bench.readers()
    pending = iter(unscaled.reads)
    scaled: dict[str, HeadSharing] = {}
    unchanged: set[str] = set()
    lost: list[str] = []

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args:
                return None  # it was not watched, either
            reading = next(pending, None)
            if reading is None or reading.name != name:
                lost.append(name)
                raise Stop
            if reading.same(args[0]):
                unchanged.add(name)
                return None
            sharing = _sharing(reading, args[0], factors)
            if sharing is None or scaled.setdefault(name, sharing) != sharing:
                lost.append(name)
                raise Stop
            return (reading.value, *args[1:])

        return hook

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * factors.to(output.dtype)

    try:
        hooks = [(name, "before", before(name)) for name in readers]
        outputs = bench.run([*hooks, (source, "after", after)])
    except Stop:
        reason = f"what it puts out reaches {lost[0]} through more than a scale per channel"
        return Refusal(source, (*scaled, *lost), reason)
    except Exception as error:  # whatever a block finds wrong with numbers that are far from its own
        return Refusal(source, tuple(scaled), f"with what it puts out scaled, the block fails ({error!r:.200})")
    if not scaled:
        return None
    targets = tuple(scaled)
    if not _same_outputs(unscaled, outputs) or next(pending, None) is not None:
        return Refusal(source, targets, "something that is no linear layer reads it, too")
    if both := [name for name in targets if name in unchanged]:
        return Refusal(source, targets, f"{both[0]} is called several times, and reads something else as well")
    idle = [
        name for name in bench.linears() if name not in unscaled.returned and _below(name, _common(source, *targets))
    ]
    widths = {input_weight(bench.layer, readers[name]).shape[-1] for name in targets}
    if idle := [name for name in idle if linear_of(bench.layer, name).in_features in widths]:
        return Refusal(source, targets, f"no token came through {idle[0]}, so that nobody can tell whether it reads it")
    if len(set(scaled.values())) > 1:
        return Refusal(source, targets, "linear layers read it in different arrangements of its channels")
    sharing, targets = scaled[targets[0]], tuple(readers[name] for name in targets)
    return ProvedFold(Fold(source, targets, _judge(bench.layer, unscaled, source, targets)), sharing=sharing)


def _prove(bench: Bench, unscaled: Observed, candidate: ProvedFold, others: list[ProvedFold]) -> ProvedFold | Refusal:
    """The candidate, if the block computes what it did with the fold applied to its weights: alone, and together with others."""
    fold = candidate.fold
    of_norm = as_linear(bench.layer.get_submodule(fold.source)) is None
    for unit_offset in (False, True) if of_norm else (False,):
        found = ProvedFold(fold, unit_offset, candidate.sharing)
        if _holds(bench, unscaled, [found]):
            if not others or _holds(bench, unscaled, [*others, found]):
                return found
            return Refusal(fold.source, fold.targets, "it does not hold together with the folds before it")
    return Refusal(fold.source, fold.targets, "with its weight scaled, the block puts out something else")


def _holds(bench: Bench, unscaled: Observed, folds: list[ProvedFold]) -> bool:
    """Whether the block puts out what it did with these folds applied by powers of two; the weights come back."""
    kept: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for found in folds:
        for name in (found.fold.source, *(reader_of(bench.layer, target) for target in found.fold.targets)):
            for leaf, parameter in bench.layer.get_submodule(name).named_parameters(recurse=False):
                kept.setdefault(f"{name}.{leaf}", (parameter, parameter.data.clone()))
    try:
        for index, found in enumerate(folds, 1):
            weight: Tensor = bench.layer.get_submodule(found.fold.source).weight.data  # type: ignore[assignment]
            apply_fold(bench.layer, found, _exact_scales(bench, found, weight, index), weight.dtype)
        return _same_outputs(unscaled, bench.run())
    finally:
        for parameter, value in kept.values():
            parameter.data.copy_(value)


def _exact_scales(bench: Bench, found: ProvedFold, weight: Tensor, seed: int) -> Tensor:
    """Powers of two for the source's channels. A gain 1 + w that is scaled is stored as a new w, which loses bits where the gain
    becomes less than 1/2: there it is made larger instead of smaller, which loses none."""
    scales = _random(NEAR, _fan_out(bench.layer, found.fold.source), seed, weight.device).to(weight.dtype)
    if found.unit_offset:
        gain = weight + 1
        exact = ((gain / scales - 1) + 1) * scales == gain
        scales = torch.where(exact, scales, 1 / scales)
    return scales


def _random(factors: Tensor, channels: int, seed: int, device: torch.device) -> Tensor:
    """`[channels]` of these factors; the same each time, for the bits of a result hang on the folds that are found."""
    return factors[torch.randint(len(factors), (channels,), generator=torch.Generator().manual_seed(seed))].to(device)


def _takes_scales(layer: nn.Module, name: str, width: int) -> bool:
    """Whether a module that returns tensors `[…, width]` may have a scale for each channel in its weights: a linear layer, or one
    that has a vector for a weight (and for a bias) and nothing else."""
    module = layer.get_submodule(name)
    parameters = dict(module.named_parameters())
    if as_linear(module) is None and not (
        parameters.keys() in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in parameters.values())
    ):
        return False
    return width == _fan_out(layer, name)


def _fan_out(layer: nn.Module, name: str) -> int:
    module = layer.get_submodule(name)
    linear = as_linear(module)
    return len(module.weight) if linear is None else linear.out_features  # type: ignore[arg-type]


def _sharing(reading: Reading, x: Tensor, factors: Tensor) -> HeadSharing | None:
    """How the channels of an input follow from those of a source that was multiplied by factors `[N]`; None if they do not."""
    N, K = len(factors), x.shape[-1]
    if K % N:
        return None
    widths = [N // parts for parts in range(1, N + 1) if N % parts == 0] if K > N else [1]
    few = Reading(reading.name, reading.value.reshape(-1, K)[:8], reading.slack)  # most ways fail there
    for way in (HeadSharing(K // N, width) for width in widths):
        multiplied = way.spread(factors).to(x.dtype)
        if few.same(x.reshape(-1, K)[:8], multiplied) and reading.same(x, multiplied):
            return way
    return None


def _judge(layer: nn.Module, unscaled: Observed, source: str, targets: tuple[str, ...]) -> str | None:
    """The block whose output error judges a scale, as `Fold.parent`: the smallest that is called and has all targets in it. None
    where the only target is fed by a linear layer, puts out what the module around it does, or is in one that is not called."""
    inside = _common(*targets)
    if len(targets) > 1:
        while inside and inside not in unscaled.returned:
            inside = inside.rpartition(".")[0]
        return inside
    around = unscaled.returned.get(inside)
    fed_by_linear = as_linear(layer.get_submodule(source)) is not None
    return None if fed_by_linear or around is None or around.of == targets[0] else inside


def _common(*names: str) -> str:
    """The innermost module that all of these are in."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _lists_of_alike(layer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Lists of several modules of one class in a block, with the linear layers in them: to try them all would take long."""
    found = {}
    for name, module in layer.named_modules():
        kinds = [type(child) for child in module.children()]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(kinds) > 1 and len(set(kinds)) == 1:
            found[name] = tuple(f"{name}.{leaf}" for leaf, m in module.named_modules() if as_linear(m) is not None)
    return {name: linears for name, linears in found.items() if linears}


def _below(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _scaled_already(found: ProvedFold, others: list[ProvedFold]) -> bool:
    return any(target in other.fold.targets for other in others for target in found.fold.targets)


def _same_outputs(unscaled: Observed, outputs: list[Tensor]) -> bool:
    return len(outputs) == len(unscaled.outputs) and all(
        reading.same(output) for reading, output in zip(unscaled.outputs, outputs, strict=True)
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
