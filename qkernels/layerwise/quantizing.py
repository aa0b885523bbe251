"""Quantize the linear layers of one decoder layer, given what goes into it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..models.linears import linear_of, set_weight
from ..quantizers import AWQ, GPTQ, NF4, RTN, CalibrationFree, InputStatistics, Options, SmoothQuant
from ..quantizers.awq import clips
from ..quantizers.grid import stored_dtype
from ..tensor import QuantTensor
from .running import LayerInputs, LayerJob, collect_statistics, input_groups
from .scaling import scale_inputs, smooth_inputs

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

    AWQ and SmoothQuant first scale the whole layer. Then the linears are quantized in the order of the forward pass: those
    that read the same input are one step, and each step's statistics come from a layer whose earlier steps are quantized
    already ("true sequential" in the GPTQ authors' code).

    Args:
        layer: on the compute device, in its dtype.
    """
    methods = {
        target: with_stored_scales(method, job.stored[f"{target}.weight"]) for target, method in job.methods.items()
    }
    if job.architecture is not None:
        for fold in job.architecture.folds:
            scaled = {target: m for target in fold.targets if isinstance(m := methods.get(target), AWQ)}
            if scaled:
                scale_inputs(layer, fold, scaled, inputs, job)
            smooth = next((m for target in fold.targets if isinstance(m := methods.get(target), SmoothQuant)), None)
            if smooth is not None:
                smooth_inputs(layer, fold, smooth, inputs, job)
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


def with_stored_scales(method: Options, dtype: torch.dtype) -> Options:
    """The method with its scale dtype settled by the weight's dtype in the checkpoint, not the one it is computed in."""
    if isinstance(method, NF4) and method.double_quant:
        return method  # its scales are fp32, whatever the weight
    return replace(method, scale_dtype=stored_dtype(torch.empty(0, dtype=dtype), method.scale_dtype))


def round_to_nearest(weight: Tensor, method: Options, name: str, fallback: str | None = None) -> Quantized:
    """Quantize without calibration; `fallback` says why, if `method` wanted it otherwise."""
    began = time.perf_counter()
    rounding = method
    if not isinstance(rounding, CalibrationFree):
        rounding = RTN(scale_dtype=method.scale_dtype, clip=method.clip).with_scheme(method.scheme)
    tensor = rounding.quantize(weight, f"{name}.weight")
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
    fallback = None
    if isinstance(method, GPTQ):
        try:
            tensor = method.quantize(weight, hessian, f"{name}.weight")
        except CalibrationError as hopeless:
            fallback = str(hopeless)
            tensor = round_to_nearest(weight, method, name, fallback).tensor
    elif isinstance(method, AWQ):
        tensor = method.quantize(weight, hessian if clips(target) else None, f"{name}.weight")
    elif isinstance(method, SmoothQuant):
        tensor = method.quantize(weight, f"{name}.weight")
    else:
        tensor = round_to_nearest(weight, method, name).tensor
    restored = tensor.dequantize()
    difference = restored - weight
    error = _ratio(float(((difference @ hessian) * difference).sum()), float(((weight @ hessian) * weight).sum()))
    set_weight(layer, target, restored)
    used = "rtn" if fallback is not None else method.name
    return Quantized(tensor, used, error, True, shared + time.perf_counter() - began, fallback)


def _ratio(error_energy: float, energy: float) -> float:
    """The relative error; 0 for a weight or an input that is all zero, and so is its error."""
    return (max(error_energy, 0.0) / energy) ** 0.5 if energy > 0 else 0.0
