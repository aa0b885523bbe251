"""Quantize the linear layers of one decoder layer, given what goes into it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.linears import linear_of, set_weight
from ..quantizers import InputStatistics, Options, rounding_of
from ..tensor import QuantTensor
from .running import LayerInputs, LayerJob, collect_statistics, input_groups
from .scaling import fold_scales

logger = logging.getLogger(__name__)


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


def quantize_layer(layer: nn.Module, inputs: LayerInputs, job: LayerJob) -> dict[str, Quantized]:
    """Quantize linear layers of a decoder layer. Afterwards it holds the dequantized weights, ready to `propagate`.

    Methods that fold scales first scale the whole layer. Then the linears are quantized in the order of the forward pass: those
    that read the same input are one step, and each step's statistics come from a layer whose earlier steps are quantized
    already ("true sequential" in the GPTQ authors' code).

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
        logger.warning("%s is rounded to nearest: %s", name, fallback)
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
