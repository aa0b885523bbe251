"""`quantize`: a float model in, a quantized one out, decoder layer by decoder layer.

Each decoder layer is calibrated on what the quantized layers before it put out, so that it can make up for their errors.
Memory stays at one layer plus the activations of the calibration windows.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from ._version import __version__
from .checkpoint.registry import get_format
from .errors import ArgumentError
from .evaluate import compare, perplexity
from .formats import Written
from .hub import local_copy
from .kernels.catalogue import OnUnsupported
from .layerwise.hollow import check_calibratable
from .layerwise.hosts import DirectoryHost, Host, Run, host_of
from .layerwise.limits import check_limits
from .layerwise.preview import preview_of
from .layerwise.quantizing import quantize_linears
from .layerwise.running import Place, Routing
from .memory import GivingBack
from .models.architectures import text_config
from .nn import ReplaceReport, Selection, select_linears
from .nn.selection import Overrides, Patterns
from .quantizers import QUANTIZERS, Options
from .reports import ModuleReport, QuantPreview, QuantReport, write_report
from .storage import atomic_directory, read_from
from .texts import (
    Calibration,
    Evaluation,
    Tokenizer,
    Windows,
    calibration_windows,
    capped,
    evaluation_ids,
    has_texts,
    needs_tokenizer,
    shape_of,
    window_length,
)

__all__ = ["quantize", "preview", "QuantReport", "QuantPreview"]


def quantize(
    model_or_dir: nn.Module | str | os.PathLike[str],
    method: Options,
    calibration: Calibration | None = None,
    save_to: str | os.PathLike[str] | None = None,
    format: str = "native",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    overrides: Overrides = None,
    tokenizer: Tokenizer | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    device: torch.device | str = "cpu",
    on_unsupported: OnUnsupported = "raise",
    evaluation: Evaluation = None,
    overwrite: bool = False,
    resume: bool = False,
    routing: Routing = "routed",
    revision: str | None = None,
    progress: bool = True,
) -> QuantReport:
    """Quantize the linear layers of a causal language model.

    Patterns are shell patterns on the module's name as `model.named_modules()` spells it, or on its last part.

    Args:
        model_or_dir: a model, whose linear layers are replaced by `QuantLinear` in place (after an error it may be changed in
            part); or a checkpoint directory, or one on the Hub by its id, which is read layer by layer and never as a whole.
        method: `GPTQ(…)`, `AWQ(…)` or `SmoothQuant(…)`; or `RTN(…)`, `HQQ(…)` or `NF4(…)`, which take any module and need no
            calibration.
        calibration: a list of texts, of chats (messages with a role and a content) or of token ids, what a tokenizer returns
            (its padding is taken off), or a tensor of token ids `[windows, seq_len]`; text like what the model will see. Cut into
            windows of `seq_len` tokens, of which `samples` are used (see `texts.calibration_windows`).
        save_to: the directory to make; needed with a directory. It appears complete or not at all.
        format: of `save_to`: "native", "gptq", "gptq_v2" or "awq".
        include: only layers that match; None means all.
        exclude: never these layers; None means heads (`lm_head`, `score`, `classifier`, …: see `nn.selection.heads`), unless
            `include` names them, and () means none.
        overrides: pattern -> scheme; the first match wins. The method and its other options stay.
        tokenizer: for texts; that of the directory if None.
        seq_len: capped to the model's longest.
        device: where layers are computed, in fp32.
        on_unsupported: for a model in memory, as in `replace_linear`: "raise" before anything is changed where no kernel takes
            a layer, or "reference" to allow the slow one, or "skip" to leave the layer. For a directory, whose checkpoint may run
            elsewhere, "raise" means a layer that no kernel of any machine takes.
        evaluation: texts, or token ids `[tokens]`, that the model has not seen: the report then says perplexity, and KL and top-1
            agreement with the original. For that both models are in memory at the end (of a model in memory, a copy is).
        overwrite: `save_to` may be a checkpoint that qkernels wrote and nobody changed since; never the source.
        resume: for a directory: go on with what an interrupted run for `save_to` has finished (see `layerwise/work.py`). The
            result has the same bits as that of one run, on the same machine with as many threads.
        routing: what the experts of a mixture are calibrated with: "routed", the tokens that the router sends to each, and those
            of all for one that gets fewer than 4 for each input channel; or "all" tokens for every expert. What an expert puts
            out is weighted as the router says either way. Measured in docs/decisions/0021.
        revision: of a model on the Hub.
        progress: show a progress bar.

    Returns:
        The report: per layer the relative error, seconds, and why it was rounded to nearest where the method failed.

    Raises:
        ArgumentError: a pattern matches nothing, no layer lets a scale through to those before (AWQ, SmoothQuant), or arguments
            contradict each other.
        CalibrationError: calibration is missing, too short, or gives NaN activations.
        SchemeError, UnsupportedProblem, CheckpointError, ConversionError: as they say.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> from qkernels import GPTQ, quantize
    >>> model = LlamaForCausalLM(config)
    >>> tokens = torch.randint(64, (8, 32))  # of a real text, for a real model
    >>> report = quantize(model, GPTQ(bits=4, group_size=32), calibration=tokens, seq_len=32, progress=False)
    >>> len(report.modules), report.skipped
    (7, {'lm_head': 'a head; name it in include to quantize it'})
    >>> model.model.layers[0].mlp.up_proj
    QuantLinear(in_features=64, out_features=96, bias=False, scheme=w4a16_g32, layout=cpu_tile_a16)
    """
    _check_method(method)
    if routing not in get_args(Routing):
        raise ArgumentError(f'routing must be "routed" or "all", got {routing!r:.40}')
    began = time.perf_counter()
    place = Place(torch.device(device))
    if not isinstance(model_or_dir, nn.Module):
        model_or_dir = local_copy(model_or_dir, revision)
    host = host_of(model_or_dir, on_unsupported)
    if host.needs_target and save_to is None:
        raise ArgumentError(f"quantizing the directory {model_or_dir} needs save_to=, the directory to make")
    selection, methods = _choose(host, method, include, exclude, overrides)
    if save_to is not None:
        _check_format(format, method, selection)
    check_limits(host, methods, format if save_to is not None else None, on_unsupported)
    if tokenizer is None and (needs_tokenizer(calibration) or has_texts(evaluation)):
        tokenizer = host.tokenizer()
    windows = windows_for(host.model, method, calibration, samples, seq_len, tokenizer)
    text = evaluation_ids(evaluation, tokenizer)
    run = Run(method, methods, windows, text is not None, save_to, resume, versions_of(place), routing)
    sources = () if isinstance(model_or_dir, nn.Module) else read_from(model_or_dir)
    with GivingBack(), host.running(run, place), _target_of(save_to, overwrite, sources) as target, torch.no_grad():
        modules = quantize_linears(host, run, place, progress)
        if target is not None:
            host.write(target, format)
        report = report_of(run, modules, selection, host.bytes_before, began)
        if text is not None:
            report = _evaluated(report, *host.evaluation_pair(target, place), text, seq_len, progress)
        if target is not None:
            write_report(target, report)
    return report


def preview(
    model_dir: str | os.PathLike[str],
    method: Options,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    overrides: Overrides = None,
    samples: int = 128,
    seq_len: int = 2048,
    format: str = "native",
    on_unsupported: OnUnsupported = "raise",
) -> QuantPreview:
    """What `quantize` would do with a checkpoint directory, and what it needs; reads headers only.

    Args: as for `quantize`.

    Raises:
        ArgumentError, SchemeError, CheckpointError, ConversionError, UnsupportedProblem: as `quantize` before the work begins.
    """
    _check_method(method)
    host = DirectoryHost.open(local_copy(model_dir))
    selection, methods = _choose(host, method, include, exclude, overrides)
    _check_format(format, method, selection)
    check_limits(host, methods, format, on_unsupported)
    check_model(host.model, method)
    seq_len = capped(host.model, seq_len)
    return preview_of(host.checkpoint, host.model, method, methods, selection.skipped, samples, seq_len)


def _check_method(method: object) -> None:
    if not isinstance(method, Options):
        by_needs = sorted(QUANTIZERS.values(), key=lambda known: known.needs == "moments")
        *names, last = (f"{known.__name__}(…)" for known in by_needs)
        raise ArgumentError(f"method must be {', '.join(names)} or {last}, got {method!r:.80}")


def _choose(
    host: Host, method: Options, include: Patterns, exclude: Patterns, overrides: Overrides
) -> tuple[Selection, dict[str, Options]]:
    """Which linear layers are quantized, and the method of each."""
    rules = {pattern: method.with_scheme(scheme) for pattern, scheme in (overrides or {}).items()}
    schemes = {pattern: rule.scheme for pattern, rule in rules.items()}
    selection = select_linears(host.model, method.scheme, include, exclude, schemes, host.on_unsupported)
    if not selection.every:
        raise ArgumentError(f"there is no linear layer to quantize:\n{ReplaceReport.of(selection)}")
    by_scheme = {rule.scheme: rule for rule in rules.values()} | {method.scheme: method}
    return selection, {name: by_scheme[scheme] for name, scheme in selection.every.items()}


def _check_format(format: str, method: Options, selection: Selection) -> None:
    """Raise before the work begins where the format has no spelling for these schemes."""
    get_format(format).config_of(Written.of(selection.every, method.orders_columns, selection.skipped))


def check_model(model: nn.Module, method: Options) -> None:
    """Raise before the work begins where the model cannot be calibrated as the method wants it."""
    if method.needs != "weight":
        check_calibratable(model)


def windows_for(
    model: nn.Module,
    method: Options,
    calibration: Calibration | None,
    samples: int,
    seq_len: int,
    tokenizer: Tokenizer | None,
) -> Windows | None:
    """What to calibrate on; whether the model can be calibrated so is asked before the work begins."""
    if method.needs == "weight":
        return None
    check_model(model, method)
    vocabulary = getattr(text_config(model), "vocab_size", None)
    return calibration_windows(calibration, samples, capped(model, seq_len), tokenizer, vocabulary)


@contextmanager
def _target_of(
    save_to: str | os.PathLike[str] | None, overwrite: bool, sources: Collection[Path]
) -> Iterator[Path | None]:
    """The directory that appears complete or not at all, if one is to be made."""
    if save_to is None:
        yield None
    else:
        with atomic_directory(save_to, overwrite, sources) as target:
            yield target


def versions_of(place: Place) -> dict[str, str]:
    """What computes: software and device."""
    found = {"qkernels": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    with suppress(PackageNotFoundError):  # a model in memory need not be one of transformers'
        found["transformers"] = version("transformers")
    return found | {"device": str(place.device)}


def report_of(
    run: Run, modules: Mapping[str, ModuleReport], selection: Selection, bytes_before: int, began: float
) -> QuantReport:
    saved = sum(module.bytes_before - module.bytes_after for module in modules.values())
    count, seq_len = shape_of(run.windows)
    return QuantReport(
        method=run.method.name,
        scheme=str(run.method.scheme),
        modules=tuple(modules.values()),
        skipped=dict(selection.skipped),
        calibration_windows=count,
        seq_len=seq_len,
        bytes_before=bytes_before,
        bytes_after=bytes_before - saved,
        seconds=time.perf_counter() - began,
        options=repr(run.method) + (f", routing={run.routing!r}" if run.routing != "routed" else ""),
        versions=run.versions,
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
