"""Quantize the linear layers of a host: decoder layer by decoder layer, given what the quantized ones before put out."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ArgumentError, CalibrationError, QKernelsError
from ..models.architectures import block_lists, expected_folds, folds_of_layer
from ..models.experts import ExpertsForm, experts_of, parameter_of
from ..models.linears import linear_of, set_weight
from ..quantizers import InputStatistics, Options, output_energy, rounding_of
from ..quantizers.options import Rounding
from ..reports import ModuleReport
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..texts import Windows, batches_of
from .capturing import Chain, Progress, capture, head_of
from .experts import quantize_experts
from .folds import Folds
from .hosts import Host, Run
from .running import Call, LayerInputs, LayerJob, Place, adopt, input_groups, propagate
from .scaling import fold_scales
from .tracing import find_folds
from .walking import Walk, walking

log = logging.getLogger(__name__)

BATCH_TOKENS = 1024  # small enough that a search for scales can end early (`awq.search`)


@dataclass(frozen=True)
class Quantized:
    """One linear layer, quantized.

    `error` is relative: `‖(Ŵ - W) x‖ / ‖W x‖` over the calibration tokens if `of_output`, else `‖Ŵ - W‖ / ‖W‖`. `fallback`
    says why the layer was rounded to nearest instead, `unscaled` why its inputs are not scaled although its method folds scales,
    `few` which experts got too few tokens and are calibrated with all.
    """

    tensor: QuantTensor
    method: str
    error: float
    of_output: bool
    seconds: float
    fallback: str | None = None
    unscaled: str | None = None
    few: str | None = None

    def report(self, name: str, bytes_before: int) -> ModuleReport:
        """As the report of the linear layer of that name, whose float weight took so many bytes."""
        return ModuleReport(
            name=name,
            scheme=str(self.tensor.scheme),
            method=self.method,
            error=self.error,
            error_of="output" if self.of_output else "weight",
            seconds=self.seconds,
            bytes_before=bytes_before,
            bytes_after=self.tensor.nbytes,
            fallback=self.fallback,
            unscaled=self.unscaled,
            few=self.few,
        )


def quantize_linears(host: Host, run: Run, place: Place, progress: bool) -> dict[str, ModuleReport]:
    """Quantize every chosen linear layer of a host; the report of each, in the order of `run.methods`.

    Raises:
        CalibrationError: activations are NaN or infinite.
        ArgumentError: a weight is; or a method folds scales, and no block of the model takes any.
    """
    if run.windows is None:
        return _round_all(host, run.methods, place, progress)
    results, reason = _calibrate_all(host, run, run.windows, place, progress)
    outside = {name: method for name, method in run.methods.items() if name not in results}
    results |= _round_all(host, outside, place, progress, reason)
    return {name: results[name] for name in run.methods}


def _calibrate_all(
    host: Host, run: Run, windows: Windows, place: Place, progress: bool
) -> tuple[dict[str, ModuleReport], Callable[[str], str]]:
    """Those inside the blocks that run on token ids; and, for the name of any other, why it was not calibrated."""
    state = Progress.of(host.model)
    outside = (*block_lists(host.model), head_of(host.model))
    stored_as = host.dtype(parameter_of(host.model, next(iter(run.methods))))
    keep_dtype = stored_as if stored_as in FLOAT_DTYPES else torch.float32
    results: dict[str, ModuleReport] = {}
    aims = any(method.aims for method in run.methods.values())

    def once(name: str, block: nn.Module, hidden: Tensor, call: Call) -> object:
        with host.layer(name, place) as (layer, _):
            return call.run(layer, hidden, place)

    with tqdm(total=len(state.blocks), desc=run.method.name, unit="layer", disable=not progress) as bar:
        while True:
            with host.embeddings(outside, place):
                batches = [batch.to(place.device) for group in windows for batch in batches_of(group, BATCH_TOKENS)]
                chain = capture(host.model, state, batches, keep_dtype, place, once)
            if not chain.names:
                break
            if run.method.folds and not state.done and not host.finished(chain.names[0]):
                _check_takes_scales(host, run, chain, place)
            alone = not state.done and not chain.carries  # hidden states are all that goes from block to block
            hidden = (host.activations() if alone else None) or chain.hidden
            exact = None
            if aims and alone:  # an earlier run kept both, one after the other
                exact = hidden[len(batches) :] or [*hidden]
                hidden = hidden[: len(batches)]
            elif aims:
                log.warning(
                    "%s and what comes after it pass on more than hidden states, or read what quantized layers put out: each of "
                    "their linear layers aims at its own output",
                    chain.names[0],
                )
            outputs: list[object] = []
            for name in chain.names:
                reports = host.finished(name)
                if reports is None or not alone:
                    inputs = LayerInputs(hidden, chain.calls.pop(name), exact)
                    keep = chain.follows and name == chain.names[-1]
                    reports, outputs = _one_block(host, run, name, inputs, place, keep, reports)
                    if host.finished(name) is None:
                        host.commit(name, reports, [*hidden, *(exact or [])] if alone else None)
                results |= {report.name: report for report in reports}
                if reports:
                    bar.set_postfix(error=f"{max(report.error for report in reports):.2%}")
                bar.update()
            state.finish(chain, outputs)
            if not chain.follows:
                break
    idle = [name for name in state.blocks if name not in state.done]

    def reason(name: str) -> str:
        block = next((block for block in idle if name.startswith(f"{block}.")), None)
        if block is None:
            return "it is not in a decoder layer, and only those are calibrated"
        error = f" ({chain.ended_by})" if chain.ended_by is not None else ""
        return f"token ids do not run through {block}, and calibration is on token ids{error}"

    return results, reason


def _one_block(
    host: Host,
    run: Run,
    name: str,
    inputs: LayerInputs,
    place: Place,
    keep: bool,
    finished: list[ModuleReport] | None,
) -> tuple[list[ModuleReport], list[object]]:
    """Quantize a block and run it; the reports of its linear layers, and what it put out where that is to be kept. One that an
    earlier run finished is only run."""
    inside = {full.removeprefix(f"{name}."): m for full, m in run.methods.items() if full.startswith(f"{name}.")}
    block = host.model.get_submodule(name)
    stored = {leaf: host.dtype(f"{name}.{leaf}") for leaf, _ in block.named_parameters()}
    with host.layer(name, place) as (layer, weights):
        if finished is not None:
            return finished, propagate(layer, inputs, place, name, keep)
        folds = find_folds(layer, inputs, place, name) if run.method.folds else None
        if folds is not None:
            _check_expected(host.model, layer, folds, name)
        job = LayerJob(name, inside, stored, place, folds, run.routing)
        done, outputs = quantize_layer(layer, inputs, job, keep)
        weights.update({leaf: result.tensor for leaf, result in done.items()})
    reports = []
    for leaf, result in done.items():
        dtype = stored[leaf] if leaf in stored else stored[f"{leaf}.weight"]  # a stack of experts is a parameter itself
        size = result.tensor.codes.numel() * dtype.itemsize
        reports.append(result.report(f"{name}.{leaf}", size))
    return reports, outputs


def _check_takes_scales(host: Host, run: Run, chain: Chain, place: Place) -> None:
    """Raise, before any block is quantized, where none of a kind takes a scale. Each is tried on what goes into the first, with
    its own masks and embeddings: whether a fold holds does not hang on the input."""
    reasons: dict[str, None] = {}
    kinds = set()
    for name in chain.names:
        block = host.model.get_submodule(name)
        kind = (type(block), *((leaf, parameter.shape) for leaf, parameter in block.named_parameters()))
        if kind in kinds:
            continue
        kinds.add(kind)
        try:
            with host.layer(name, place) as (layer, _):
                folds = find_folds(layer, LayerInputs(chain.hidden[:1], chain.calls[name][:1]), place, name)
        except QKernelsError:
            raise
        except Exception:
            if name == chain.names[0]:
                raise
            return  # it reads what blocks before it make: it is tried when its turn comes
        if folds.proved:
            return
        reasons |= dict.fromkeys(f"{refusal.source}: {refusal.reason}" for refusal in folds.refused)
    if not chain.follows:
        found = "; ".join([*reasons][:3]) or "no norm or linear layer feeds another"
        raise ArgumentError(
            f"{type(run.method).__name__} folds scales into the norms and linear layers before, and no block of "
            f"{type(host.model).__name__} lets one through ({found}); use GPTQ without scales, or RTN"
        )


def _check_expected(model: nn.Module, layer: nn.Module, folds: Folds, name: str) -> None:
    """Warn where the table of architectures has a fold that is not proved."""
    taken = {found.fold.source: set(found.fold.targets) for found in folds.proved}
    for fold in folds_of_layer(expected_folds(model), layer):
        if taken.get(fold.source) == set(fold.targets):
            continue
        reason = next((r.reason for r in folds.refused if r.source == fold.source), "nothing was found that it feeds")
        log.warning("%s: %s takes no scale for %s: %s", name, fold.source, ", ".join(fold.targets), reason)


def _round_all(
    host: Host,
    methods: Mapping[str, Options],
    place: Place,
    progress: bool,
    reason: Callable[[str], str | None] = lambda name: None,
) -> dict[str, ModuleReport]:
    """Without calibration; `reason` says why, by the layer's name, if the methods wanted it otherwise."""
    results: dict[str, ModuleReport] = {}
    with tqdm(methods.items(), desc="rounding", unit="linear", disable=not progress or not methods) as bar:
        for name, method in bar:
            if (finished := host.finished(name)) is not None:
                results[name] = finished[0]
                continue
            weight = host.weight(name)
            result = round_to_nearest(weight.to(place.device), method.with_scales_for(weight.dtype), name, reason(name))
            host.keep(name, result.tensor)
            results[name] = result.report(name, weight.nbytes)
            host.commit(name, [results[name]])
            bar.set_postfix(error=f"{result.error:.2%}")
    return results


def quantize_layer(
    layer: nn.Module, inputs: LayerInputs, job: LayerJob, keep: bool = False
) -> tuple[dict[str, Quantized], list[object]]:
    """Quantize linear layers of a decoder layer and run it: it holds the dequantized weights afterwards, and `inputs` what it
    puts out for them; all of that is returned, too, if it is to be kept.

    Methods that fold scales first scale the whole layer. Then the linears are quantized in the order of the forward
    pass: those that read the same input are one step, and each step's statistics come from a layer whose earlier steps
    are quantized already ("true sequential" in the GPTQ authors' code).

    Args:
        layer: on the compute device, in its dtype.
    """
    forms = experts_of(layer)
    linears = {target: method for target, method in job.methods.items() if target.rpartition(".")[0] not in forms}
    methods = {target: method.with_scales_for(job.stored[f"{target}.weight"]) for target, method in linears.items()}
    stacked = {target: method for target, method in job.methods.items() if target not in linears}
    scaled = methods | {target: method.with_scales_for(job.stored[target]) for target, method in stacked.items()}
    for found in job.folds.proved if job.folds is not None else ():
        fold_scales(layer, found, scaled, inputs, job)
    with ExitStack() as stack:
        twin = exact = None
        if inputs.exact is not None:
            twin = copy.deepcopy(layer)
            exact = stack.enter_context(walking(twin, methods, inputs.of_the_model(), job.place))
        walk = stack.enter_context(walking(layer, methods, inputs, job.place))
        results = _quantize_steps(layer, methods, inputs, job, walk, exact)
        if forms:
            walk.release()
            if exact is not None:
                exact.release()
            results |= _quantize_stacks(layer, forms, inputs, job, twin)
        if exact is not None:
            adopt(inputs.of_the_model(), exact.outcomes(), f"{job.name} as it came")
        outputs = adopt(inputs, walk.outcomes(), job.name, keep)
    return {target: results[target] for target in job.methods}, outputs


def _quantize_steps(
    layer: nn.Module, methods: Mapping[str, Options], inputs: LayerInputs, job: LayerJob, walk: Walk, exact: Walk | None
) -> dict[str, Quantized]:
    """Linear layers, step by step; those that no token came to are rounded to nearest. `exact`: a walk through the layer as it
    came, in the model as it came."""
    results: dict[str, Quantized] = {}
    for step in input_groups(layer, list(methods), inputs, job.place):
        began = time.perf_counter()
        seen = _Seen.of(walk.statistics(step, exact), f"{job.name}.{step[0]}")
        shared = (time.perf_counter() - began) / len(step)
        for target in step:
            result = _quantize(layer, target, methods[target], seen, job.name, shared)
            unscaled = job.folds.why_unscaled(target) if job.folds is not None else None
            results[target] = replace(result, unscaled=unscaled)
    for target in methods.keys() - results.keys():
        reason = f"calibration sent no token through {job.name}.{target}"
        weight = linear_of(layer, target).weight.data
        results[target] = round_to_nearest(weight, methods[target], f"{job.name}.{target}", reason)
        set_weight(layer, target, results[target].tensor.dequantize())
    return results


def _quantize_stacks(
    layer: nn.Module,
    forms: Mapping[str, ExpertsForm],
    inputs: LayerInputs,
    job: LayerJob,
    twin: nn.Module | None,
) -> dict[str, Quantized]:
    """Stacked experts, after all others, whose outputs they read."""
    results: dict[str, Quantized] = {}
    for leaf, form in forms.items():
        both: tuple[str, str] = (form.up, form.down)
        of_experts = {p: job.methods[f"{leaf}.{p}"] for p in both if f"{leaf}.{p}" in job.methods}
        for p, stack in (
            quantize_experts(layer, leaf, form, of_experts, inputs, job, twin).items() if of_experts else ()
        ):
            unscaled = job.folds.why_unscaled(f"{leaf}.{p}") if job.folds is not None else None
            results[f"{leaf}.{p}"] = Quantized(
                stack.tensor, stack.method, stack.error, True, stack.seconds, stack.fallback, unscaled, stack.few
            )
    return results


def round_to_nearest(weight: Tensor, method: Options, name: str, fallback: str | None = None) -> Quantized:
    """Quantize without calibration; `fallback` says why, if `method` wanted it otherwise."""
    began = time.perf_counter()
    rounding = rounding_of(method)
    made, sums = [], [0.0, 0.0]
    for expert, one in enumerate(weight if weight.dim() == 3 else [weight]):
        what = f"{name}[{expert}]" if weight.dim() == 3 else f"{name}.weight"
        made.append(rounding.quantize(one.contiguous(), name=what))
        values = one.float()
        sums[0] += float((made[-1].dequantize() - values).square().sum())
        sums[1] += float(values.square().sum())
    tensor = QuantTensor.stack(made) if weight.dim() == 3 else made[0]
    if fallback is not None:
        log.warning("%s is rounded to nearest: %s", name, fallback)
    error = _ratio(*sums)
    return Quantized(tensor, rounding.name, error, False, time.perf_counter() - began, fallback)


@dataclass(frozen=True)
class _Seen:
    """What went into the linear layers of a step.

    Args:
        roundings: what methods made of it, for those of them that have the same.
    """

    hessian: Tensor
    cross: Tensor | None
    roundings: dict[Options, Rounding]

    @classmethod
    def of(cls, statistics: InputStatistics, name: str) -> _Seen:
        return cls(statistics.hessian(name), statistics.cross(), {})

    def rounding(self, method: Options, name: str) -> Rounding:
        if method not in self.roundings:
            self.roundings[method] = method.for_inputs(self.hessian, self.cross, name)
        return self.roundings[method]


def _quantize(layer: nn.Module, target: str, method: Options, seen: _Seen, layer_name: str, shared: float) -> Quantized:
    """Quantize one linear layer and leave the dequantized weight in it; `shared`: seconds its statistics took."""
    began = time.perf_counter()
    name = f"{layer_name}.{target}"
    weight = linear_of(layer, target).weight.data.float()
    used, fallback = method.name, None
    try:
        tensor = seen.rounding(method, f"{name}.weight")(weight, f"{name}.weight")
    except CalibrationError as hopeless:
        fallback = str(hopeless)
        rounded = round_to_nearest(weight, method, name, fallback)
        tensor, used = rounded.tensor, rounded.method
    restored = tensor.dequantize()
    error = _ratio(output_energy(restored - weight, seen.hessian), output_energy(weight, seen.hessian))
    set_weight(layer, target, restored)
    return Quantized(tensor, used, error, True, shared + time.perf_counter() - began, fallback)


def _ratio(error_energy: float, energy: float) -> float:
    """The relative error; 0 for a weight or an input that is all zero, and so is its error."""
    return (max(error_energy, 0.0) / energy) ** 0.5 if energy > 0 else 0.0
