"""`quantize`: a float model in, a quantized one out, decoder layer by decoder layer.

Each decoder layer is calibrated on what the quantized layers before it put out, so that it can make up for their errors.
Memory stays at one layer plus the activations of the calibration windows.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ._version import __version__
from .checkpoint import Checkpoint, CheckpointWriter, load, open_checkpoint
from .checkpoint.loading import check_fits
from .checkpoint.registry import get_format
from .checkpoint.saving import write_model
from .errors import ArgumentError, CalibrationError, CheckpointError
from .evaluate import compare, evaluating, perplexity
from .formats import Written
from .kernels.catalogue import OnUnsupported
from .layerwise.hosts import DirectoryHost, Host, MemoryHost
from .layerwise.planning import check_disk, plan_of
from .layerwise.quantizing import Quantized, quantize_layer, round_to_nearest
from .layerwise.running import LayerInputs, LayerJob, Place, capture_inputs, check_finite, propagate
from .layerwise.work import run_key, work_directory
from .models.architectures import decoder_layers, foldable_architecture, head_dim
from .models.building import empty_model
from .nn import ReplaceReport, select_linears
from .nn.selection import Overrides, Patterns
from .quantizers import QUANTIZERS, Options
from .reports import ModuleReport, QuantPreview, QuantReport, write_report
from .storage import CONFIG, atomic_directory
from .texts import (
    Calibration,
    Evaluation,
    Tokenizer,
    batches_of,
    calibration_windows,
    capped,
    evaluation_ids,
    has_texts,
    load_tokenizer,
    window_length,
)

__all__ = ["quantize", "plan", "QuantReport", "QuantPreview"]

Results = dict[str, ModuleReport]  # by module name


def quantize(
    model_or_dir: nn.Module | str | os.PathLike[str],
    method: Options,
    calibration: Calibration | None = None,
    save_to: str | os.PathLike[str] | None = None,
    format: str = "native",
    *,
    include: Patterns = None,
    exclude: Patterns = ("lm_head",),
    overrides: Overrides = None,
    tokenizer: Tokenizer | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    device: torch.device | str = "cpu",
    on_unsupported: OnUnsupported = "raise",
    evaluation: Evaluation = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> QuantReport:
    """Quantize the linear layers of a causal language model.

    Patterns are shell patterns on the module's name as `model.named_modules()` spells it, or on its last part.

    Args:
        model_or_dir: a model, whose linear layers are replaced by `QuantLinear` in place (after an error it may be changed in
            part); or a checkpoint directory, which is read layer by layer and never as a whole.
        method: `GPTQ(…)`, `AWQ(…)` or `SmoothQuant(…)`; or `RTN(…)`, `HQQ(…)` or `NF4(…)`, which take any module and need no
            calibration.
        calibration: a list of texts, lists of token ids, or a tensor of token ids `[windows, seq_len]`; text like what the
            model will see. Cut into windows of `seq_len` tokens, of which `samples` are used.
        save_to: the directory to make; needed with a directory. It appears complete or not at all.
        format: of `save_to`: "native", "gptq", "gptq_v2" or "awq".
        include: only layers that match; None means all.
        exclude: never these layers.
        overrides: pattern -> scheme; the first match wins. The method and its other options stay.
        tokenizer: for texts; that of the directory if None.
        seq_len: capped to the model's longest.
        device: where layers are computed, in fp32.
        on_unsupported: for a model in memory, as in `replace_linear`: "raise" before anything is changed where no kernel takes
            a layer, or "reference" to allow the slow one, or "skip" to leave the layer.
        evaluation: texts, or token ids `[tokens]`, that the model has not seen: the report then says perplexity, and KL and top-1
            agreement with the original. For that both models are in memory at the end (of a model in memory, a copy is).
        overwrite: `save_to` may be an existing checkpoint.
        resume: for a directory: go on with what an interrupted run for `save_to` has finished (see `layerwise/work.py`). The
            result has the same bits as that of one run, on the same machine with as many threads.
        progress: show a progress bar.

    Returns:
        The report: per layer the relative error, seconds, and why it was rounded to nearest where the method failed.

    Raises:
        ArgumentError: a pattern matches nothing, the architecture is unknown (AWQ, SmoothQuant), or arguments contradict each
            other.
        CalibrationError: calibration is missing, too short, or gives NaN activations.
        SchemeError, UnsupportedProblem, CheckpointError, ConversionError: as they say.
    """
    _check_method(method)
    began = time.perf_counter()
    place = Place(torch.device(device))
    windows: Tensor | None = None
    if isinstance(model_or_dir, nn.Module):
        model = model_or_dir
        methods, skipped = _chosen(model, method, include, exclude, overrides, on_unsupported)
        if save_to is not None:
            _check_format(format, method, methods, skipped)
        windows = _windows(model, method, calibration, samples, seq_len, tokenizer)
        text = evaluation_ids(evaluation, tokenizer)
        original = copy.deepcopy(model) if text is not None else None
        memory = MemoryHost(model, on_unsupported)
        with evaluating(model), torch.no_grad():
            results = _run(memory, method, methods, windows, place, progress)
        report = _report(method, results, skipped, windows, memory.bytes_before, began, place)
        if text is not None and original is not None:
            report = _evaluated(report, model, original, text, seq_len, progress)
        if save_to is not None:
            with atomic_directory(save_to, overwrite) as target:
                write_model(model, target, format)
                write_report(target, report)
        return report
    if save_to is None:
        raise ArgumentError(f"quantizing the directory {model_or_dir} needs save_to=, the directory to make")
    checkpoint, model = _float_checkpoint(model_or_dir)
    methods, skipped = _chosen(model, method, include, exclude, overrides)
    _check_format(format, method, methods, skipped)
    if tokenizer is None and (has_texts(calibration) or has_texts(evaluation)):
        tokenizer = _tokenizer_of(model_or_dir)
    windows = _windows(model, method, calibration, samples, seq_len, tokenizer)
    text = evaluation_ids(evaluation, tokenizer)
    planned = plan_of(checkpoint, model, method, methods, skipped, *(windows.shape if windows is not None else (0, 0)))
    check_disk(planned, save_to)
    key = run_key(checkpoint, methods, windows, _versions(place))
    with (
        work_directory(save_to, key, resume) as work,
        atomic_directory(save_to, overwrite=overwrite) as target,
        torch.no_grad(),
    ):
        directory = DirectoryHost(model, checkpoint, work)
        results = _run(directory, method, methods, windows, place, progress)
        writer = CheckpointWriter(target, checkpoint.config, format)
        directory.copy_to(writer)
        writer.close()
        checkpoint.copy_side_files(target)
        report = _report(method, results, skipped, windows, directory.bytes_before, began, place)
        if text is not None:
            quantized, original = (
                load(path, place.device, on_unsupported="reference") for path in (target, checkpoint.path)
            )
            report = _evaluated(report, quantized, original, text, seq_len, progress)
        write_report(target, report)
    return report


def plan(
    model_dir: str | os.PathLike[str],
    method: Options,
    *,
    include: Patterns = None,
    exclude: Patterns = ("lm_head",),
    overrides: Overrides = None,
    samples: int = 128,
    seq_len: int = 2048,
) -> QuantPreview:
    """What `quantize` would do with a checkpoint directory, and what it needs; reads headers only."""
    checkpoint, model = _float_checkpoint(model_dir)
    methods, skipped = _chosen(model, method, include, exclude, overrides)
    return plan_of(checkpoint, model, method, methods, skipped, samples, capped(model, seq_len))


def _check_method(method: object) -> None:
    if not isinstance(method, Options):
        by_needs = sorted(QUANTIZERS.values(), key=lambda known: known.needs == "moments")
        *names, last = (f"{known.__name__}(…)" for known in by_needs)
        raise ArgumentError(f"method must be {', '.join(names)} or {last}, got {method!r:.80}")


def _chosen(
    model: nn.Module,
    method: Options,
    include: Patterns,
    exclude: Patterns,
    overrides: Overrides,
    on_unsupported: OnUnsupported | None = None,
) -> tuple[dict[str, Options], Mapping[str, str]]:
    """The method for each linear layer by name, and the reason for each that is left as it is."""
    rules = {pattern: method.with_scheme(scheme) for pattern, scheme in (overrides or {}).items()}
    schemes = {pattern: rule.scheme for pattern, rule in rules.items()}
    selection = select_linears(model, method.scheme, include, exclude, schemes, on_unsupported)
    if not selection.chosen:
        raise ArgumentError(f"there is no linear layer to quantize:\n{ReplaceReport.of(selection)}")
    by_scheme = {rule.scheme: rule for rule in rules.values()} | {method.scheme: method}
    return {name: by_scheme[scheme] for name, scheme in selection.chosen.items()}, selection.skipped


def _run(
    host: Host, method: Options, methods: Mapping[str, Options], windows: Tensor | None, place: Place, progress: bool
) -> Results:
    """Quantize every chosen layer of the host."""
    if windows is None:
        return _round_all(host, methods, place, progress)
    prefix, layers = decoder_layers(host.model)
    architecture = foldable_architecture(host.model, type(method).__name__) if method.folds else None
    width = head_dim(host.model) if architecture is not None else 0
    with host.embeddings(prefix, _head_of(host.model), place):
        batches = [batch.to(place.device) for batch in batches_of(windows)]
        hidden, arguments = capture_inputs(host.model, layers, batches, host.dtype(f"{next(iter(methods))}.weight"))
    for index, batch in enumerate(hidden):
        check_finite(batch, "the embedding", index)
    hidden = host.activations() or hidden
    results: Results = {}
    with tqdm(range(len(layers)), desc=method.name, unit="layer", disable=not progress) as bar:
        for index in bar:
            name = f"{prefix}.{index}"
            if (reports := host.finished(name)) is not None:
                results |= {report.name: report for report in reports}
                continue
            inside = {full.removeprefix(f"{name}."): m for full, m in methods.items() if full.startswith(f"{name}.")}
            stored = {leaf: host.dtype(f"{name}.{leaf}") for leaf, _ in layers[index].named_parameters()}
            inputs = LayerInputs(hidden, arguments[index])
            with host.layer(name, place) as (layer, weights):
                done = quantize_layer(layer, inputs, LayerJob(name, inside, stored, place, architecture, width))
                propagate(layer, inputs, place, name)
                weights.update({leaf: result.tensor for leaf, result in done.items()})
            reports = []
            for leaf, result in done.items():
                size = result.tensor.codes.numel() * stored[f"{leaf}.weight"].itemsize
                reports.append(_module_report(f"{name}.{leaf}", result, size))
            host.commit(name, reports, hidden)
            results |= {report.name: report for report in reports}
            if reports:
                bar.set_postfix(error=f"{max(report.error for report in reports):.2%}")
    outside = {name: chosen for name, chosen in methods.items() if name not in results}
    results |= _round_all(host, outside, place, progress, "it is not in a decoder layer, and only those are calibrated")
    return {name: results[name] for name in methods}


def _round_all(
    host: Host, methods: Mapping[str, Options], place: Place, progress: bool, fallback: str | None = None
) -> Results:
    results: Results = {}
    with tqdm(methods.items(), desc="rounding", unit="linear", disable=not progress or not methods) as bar:
        for name, method in bar:
            if (finished := host.finished(name)) is not None:
                results[name] = finished[0]
                continue
            weight = host.weight(name)
            result = round_to_nearest(weight.to(place.device), method.with_scales_for(weight.dtype), name, fallback)
            host.keep(name, result.tensor)
            results[name] = _module_report(name, result, weight.numel() * weight.element_size())
            host.commit(name, [results[name]])
            bar.set_postfix(error=f"{result.error:.2%}")
    return results


def _float_checkpoint(directory: str | os.PathLike[str]) -> tuple[Checkpoint, Any]:
    """A checkpoint and its model, without weights, with the same names in both."""
    checkpoint = open_checkpoint(directory)
    if checkpoint.format is not None:
        raise ArgumentError(
            f"{directory} is quantized already ({CONFIG} has a quantization_config); quantize the original, or change the format "
            f"with qkernels.checkpoint.convert"
        )
    model = empty_model(checkpoint.config, torch.float32, checkpoint.path)
    checkpoint = checkpoint.named_as_in(model)
    check_fits(model, checkpoint)
    return checkpoint, model


def _windows(
    model: nn.Module,
    method: Options,
    calibration: Calibration | None,
    samples: int,
    seq_len: int,
    tokenizer: Tokenizer | None,
) -> Tensor | None:
    if method.needs == "weight":
        return None
    decoder_layers(model)  # raises where there are none, before the work begins
    if method.folds:
        foldable_architecture(model, type(method).__name__)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    return calibration_windows(calibration, samples, capped(model, seq_len), tokenizer, vocabulary)


def _check_format(format: str, method: Options, methods: Mapping[str, Options], skipped: Mapping[str, str]) -> None:
    """Raise before the work begins where the format has no spelling for these schemes."""
    schemes = {name: chosen.scheme for name, chosen in methods.items()}
    get_format(format).config_of(Written.of(schemes, method.orders_columns, skipped))


def _head_of(model: nn.Module) -> str | None:
    """The name of the output embedding, which calibration never runs."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _tokenizer_of(directory: str | os.PathLike[str]) -> Tokenizer:
    try:
        tokenizer: Tokenizer = load_tokenizer(os.fspath(directory))
    except CheckpointError as error:
        raise CalibrationError(
            f"calibration texts need a tokenizer, and {directory} has none that can be read: {error.__cause__}; pass "
            f"tokenizer=, or token ids instead of texts"
        ) from error
    return tokenizer


def _module_report(name: str, result: Quantized, bytes_before: int) -> ModuleReport:
    return ModuleReport(
        name=name,
        scheme=str(result.tensor.scheme),
        method=result.method,
        error=result.error,
        error_of="output" if result.of_output else "weight",
        seconds=result.seconds,
        bytes_before=bytes_before,
        bytes_after=result.tensor.nbytes,
        fallback=result.fallback,
    )


def _versions(place: Place) -> dict[str, str]:
    """What computes: software and device."""
    found = {"qkernels": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    with suppress(PackageNotFoundError):  # a model in memory need not be one of transformers'
        found["transformers"] = version("transformers")
    return found | {"device": str(place.device)}


def _report(
    method: Options,
    results: Results,
    skipped: Mapping[str, str],
    windows: Tensor | None,
    bytes_before: int,
    began: float,
    place: Place,
) -> QuantReport:
    modules = tuple(results.values())
    saved = sum(module.bytes_before - module.bytes_after for module in modules)
    count, seq_len = windows.shape if windows is not None else (0, 0)
    seconds = time.perf_counter() - began
    return QuantReport(
        method.name,
        str(method.scheme),
        modules,
        dict(skipped),
        count,
        seq_len,
        bytes_before,
        bytes_before - saved,
        seconds,
        repr(method),
        versions=_versions(place),
    )


def _evaluated(
    report: QuantReport, model: nn.Module, original: nn.Module, text: Tensor, seq_len: int, progress: bool
) -> QuantReport:
    """The report with what the model says on a text beside its original."""
    length = window_length(model, seq_len)
    surprise = perplexity(model, text, length, progress=progress).to_json()
    return replace(
        report, perplexity=surprise, comparison=compare(model, original, text, length, progress=progress).to_json()
    )
