"""Quantize the linear layers of a host: decoder layer by decoder layer, given what the quantized ones before put out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from tqdm import tqdm

from ..errors import CalibrationError
from ..models.architectures import decoder_layers, foldable_architecture, head_dim
from ..models.linears import linear_of, set_weight
from ..quantizers import InputStatistics, Options, rounding_of
from ..reports import ModuleReport
from ..tensor import QuantTensor
from ..texts import batches_of
from .hosts import Host, Run
from .running import (
    LayerInputs,
    LayerJob,
    Place,
    capture_inputs,
    check_finite,
    collect_statistics,
    input_groups,
    propagate,
)
from .scaling import fold_scales

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantized:
    """One linear layer, quantized.

    `error` is relative: `‖(Ŵ - W) x‖ / ‖W x‖` over the calibration tokens if `of_output`, else `‖Ŵ - W‖ / ‖W‖`. `fallback`
    says why the layer was rounded to nearest instead.
    """

    tensor: QuantTensor
    method: str
    error: float
    of_output: bool
    seconds: float
    fallback: str | None = None

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
        )


def quantize_linears(host: Host, run: Run, place: Place, progress: bool) -> dict[str, ModuleReport]:
    """Quantize every chosen linear layer of a host; the report of each, in the order of `run.methods`.

    Raises:
        CalibrationError: activations are NaN or infinite.
        ArgumentError: a weight is; or the architecture is unknown to a method that folds scales.
    """
    if run.windows is None:
        return _round_all(host, run.methods, place, progress)
    results = _calibrate_all(host, run, run.windows, place, progress)
    outside = {name: method for name, method in run.methods.items() if name not in results}
    results |= _round_all(host, outside, place, progress, "it is not in a decoder layer, and only those are calibrated")
    return {name: results[name] for name in run.methods}


def _calibrate_all(host: Host, run: Run, windows: Tensor, place: Place, progress: bool) -> dict[str, ModuleReport]:
    """Those inside decoder layers."""
    prefix, layers = decoder_layers(host.model)
    architecture = foldable_architecture(host.model, type(run.method).__name__) if run.method.folds else None
    width = head_dim(host.model) if architecture is not None else 0
    with host.embeddings(prefix, _head_of(host.model), place):
        batches = [batch.to(place.device) for batch in batches_of(windows)]
        kept_as = host.dtype(f"{next(iter(run.methods))}.weight")
        hidden, arguments = capture_inputs(host.model, layers, batches, kept_as)
    for index, batch in enumerate(hidden):
        check_finite(batch, "the embedding", index)
    hidden = host.activations() or hidden
    results: dict[str, ModuleReport] = {}
    with tqdm(range(len(layers)), desc=run.method.name, unit="layer", disable=not progress) as bar:
        for index in bar:
            name = f"{prefix}.{index}"
            if (reports := host.finished(name)) is not None:
                results |= {report.name: report for report in reports}
                continue
            inside = {
                full.removeprefix(f"{name}."): m for full, m in run.methods.items() if full.startswith(f"{name}.")
            }
            stored = {leaf: host.dtype(f"{name}.{leaf}") for leaf, _ in layers[index].named_parameters()}
            inputs = LayerInputs(hidden, arguments[index])
            with host.layer(name, place) as (layer, weights):
                done = quantize_layer(layer, inputs, LayerJob(name, inside, stored, place, architecture, width))
                propagate(layer, inputs, place, name)
                weights.update({leaf: result.tensor for leaf, result in done.items()})
            reports = []
            for leaf, result in done.items():
                size = result.tensor.codes.numel() * stored[f"{leaf}.weight"].itemsize
                reports.append(result.report(f"{name}.{leaf}", size))
            host.commit(name, reports, hidden)
            results |= {report.name: report for report in reports}
            if reports:
                bar.set_postfix(error=f"{max(report.error for report in reports):.2%}")
    return results


def _round_all(
    host: Host, methods: Mapping[str, Options], place: Place, progress: bool, fallback: str | None = None
) -> dict[str, ModuleReport]:
    """Without calibration; `fallback` says why, if the methods wanted it otherwise."""
    results: dict[str, ModuleReport] = {}
    with tqdm(methods.items(), desc="rounding", unit="linear", disable=not progress or not methods) as bar:
        for name, method in bar:
            if (finished := host.finished(name)) is not None:
                results[name] = finished[0]
                continue
            weight = host.weight(name)
            result = round_to_nearest(weight.to(place.device), method.with_scales_for(weight.dtype), name, fallback)
            host.keep(name, result.tensor)
            results[name] = result.report(name, weight.nbytes)
            host.commit(name, [results[name]])
            bar.set_postfix(error=f"{result.error:.2%}")
    return results


def quantize_layer(layer: nn.Module, inputs: LayerInputs, job: LayerJob) -> dict[str, Quantized]:
    """Quantize linear layers of a decoder layer. Afterwards it holds the dequantized weights, ready to `propagate`.

    Methods that fold scales first scale the whole layer. Then the linears are quantized in the order of the forward
    pass: those that read the same input are one step, and each step's statistics come from a layer whose earlier steps
    are quantized already ("true sequential" in the GPTQ authors' code).

    Args:
        layer: on the compute device, in its dtype.
    """
    methods = {target: method.with_scales_for(job.stored[f"{target}.weight"]) for target, method in job.methods.items()}
    if job.architecture is not None:
        for fold in job.architecture.folds:
            fold_scales(layer, fold, methods, inputs, job)
    results: dict[str, Quantized] = {}
    for step in input_groups(layer, list(methods), inputs, job.place):
        began = time.perf_counter()
        statistics = collect_statistics(layer, step[:1], inputs, job.place)[step[0]]
        shared = (time.perf_counter() - began) / len(step)
        for target in step:
            results[target] = _quantize(layer, target, methods[target], statistics, job.name, shared)
    for target in methods.keys() - results.keys():
        reason = f"calibration sent no token through {job.name}.{target}"
        weight = linear_of(layer, target).weight.data
        results[target] = round_to_nearest(weight, methods[target], f"{job.name}.{target}", reason)
        set_weight(layer, target, results[target].tensor.dequantize())
    return {target: results[target] for target in methods}


def round_to_nearest(weight: Tensor, method: Options, name: str, fallback: str | None = None) -> Quantized:
    """Quantize without calibration; `fallback` says why, if `method` wanted it otherwise."""
    began = time.perf_counter()
    rounding = rounding_of(method)
    tensor = rounding.quantize(weight, name=f"{name}.weight")
    if fallback is not None:
        log.warning("%s is rounded to nearest: %s", name, fallback)
    values = weight.float()
    error = _ratio(float((tensor.dequantize() - values).square().sum()), float(values.square().sum()))
    return Quantized(tensor, rounding.name, error, False, time.perf_counter() - began, fallback)


def _quantize(
    layer: nn.Module, target: str, method: Options, statistics: InputStatistics, layer_name: str, shared: float
) -> Quantized:
    """Quantize one linear layer and leave the dequantized weight in it; `shared`: seconds its statistics took."""
    began = time.perf_counter()
    name = f"{layer_name}.{target}"
    weight = linear_of(layer, target).weight.data.float()
    hessian = statistics.hessian(name)
    used, fallback = method.name, None
    try:
        tensor = method.quantize(weight, hessian, f"{name}.weight")
    except CalibrationError as hopeless:
        fallback = str(hopeless)
        rounded = round_to_nearest(weight, method, name, fallback)
        tensor, used = rounded.tensor, rounded.method
    restored = tensor.dequantize()
    difference = restored - weight
    error = _ratio(float(((difference @ hessian) * difference).sum()), float(((weight @ hessian) * weight).sum()))
    set_weight(layer, target, restored)
    return Quantized(tensor, used, error, True, shared + time.perf_counter() - began, fallback)


def _ratio(error_energy: float, energy: float) -> float:
    """The relative error; 0 for a weight or an input that is all zero, and so is its error."""
    return (max(error_energy, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def _head_of(model: nn.Module) -> str | None:
    """The name of the output embedding, which calibration never runs."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None
