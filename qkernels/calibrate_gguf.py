"""`quantize_gguf`: a GGUF file whose weights are calibrated, in the types of a mix: GPTQ or AWQ in llama.cpp's own blocks.

The run is that of `calibrate.quantize`: decoder layer by decoder layer, each on what the quantized layers before it put out, with
finished layers kept for `resume`. What it makes are the blocks of each tensor's type, as weights; the file takes them over bit
for bit. Tensors outside of decoder layers (embedding, head) are made by the better search, no column counting more than another.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, get_args

import torch

from .calibrate import check_model, report_of, versions_of, windows_for
from .checkpoint import open_checkpoint, plan_gguf
from .checkpoint.gguf_plan import GgufPlan
from .checkpoint.gguf_writing import check_suffix, fill_gguf
from .checkpoint.loading import model_of
from .errors import ArgumentError, ConversionError
from .formats.gguf import WRITABLE_TYPES
from .hub import local_copy
from .layerwise.gguf_blocks import BlockMethod, CalibratedBlocks
from .layerwise.hosts import DirectoryHost, Run
from .layerwise.limits import check_limits
from .layerwise.preview import check_disk, preview_of
from .layerwise.quantizing import quantize_linears
from .layerwise.running import Place, Routing
from .memory import GivingBack
from .models.gguf_mixes import MIXES
from .nn import Selection
from .quantizers import Options
from .reports import QuantPreview, QuantReport
from .storage import read_from
from .storage.gguf_writer import gguf_writer
from .texts import Calibration, capped

__all__ = ["quantize_gguf", "preview_gguf"]

_WHOLE: Final = "whole"  # in the work directory: all that is finished, as one native checkpoint


def quantize_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    calibration: Calibration,
    method: BlockMethod = "gptq",
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    samples: int = 128,
    seq_len: int = 2048,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    routing: Routing = "routed",
    progress: bool = True,
) -> tuple[GgufPlan, QuantReport]:
    """Write a float checkpoint as a GGUF file in a mix of types, its weights calibrated. Memory stays at one decoder layer plus
    the activations of the calibration; beside the file, the disk holds the finished layers twice until it is there.

    Args:
        source: a directory of safetensors, of an architecture in `models/gguf_names.py`.
        target, type, pure, tensor_types, overwrite: as of `checkpoint.to_gguf`; types are those that llama.cpp chooses where an
            importance matrix is at hand.
        calibration, samples, seq_len, device, resume, routing, progress: as of `quantize`.
        method: "gptq": GPTQ on the scales of each block's search. "awq": AWQ's scales folded into what feeds a layer, then the
            better search by importance. "awq+gptq": those scales, then GPTQ.

    Returns:
        The plan by which it was written, and how it went, layer by layer.

    Raises:
        ArgumentError: the source is quantized; no such type; no weight in a decoder layer would get a type of blocks.
        CalibrationError, CheckpointError, ConversionError: as `quantize` and `checkpoint.to_gguf`; gate and up of stacked
            experts, which are calibrated as one, were to have different types.

    >>> from qkernels.calibrate_gguf import quantize_gguf
    >>> # quantize_gguf("my-llama/", "my-llama-Q4_K_M.gguf", "Q4_K_M", [text])
    """
    if method not in get_args(BlockMethod):
        raise ArgumentError(f'method must be "gptq", "awq" or "awq+gptq", got {method!r:.40}')
    if routing not in get_args(Routing):
        raise ArgumentError(f'routing must be "routed" or "all", got {routing!r:.40}')
    check_suffix(target)
    began, place = time.perf_counter(), Place(torch.device(device))
    host, plan, main, methods, skipped = _asked(source, type, method, pure, tensor_types)
    windows = windows_for(host.model, main, calibration, samples, seq_len, host.tokenizer())
    assert windows is not None
    preview = preview_of(
        host.checkpoint, host.model, main, methods, skipped, sum(map(len, windows)), max(g.shape[1] for g in windows)
    )
    path = Path(target).expanduser()
    check_disk(_with_file(preview, plan), path)
    run = Run(main, methods, windows, False, path, resume, versions_of(place), routing)
    sources = read_from(plan.checkpoint.path)
    with (
        gguf_writer(path, plan.metadata, plan.planned(), overwrite, sources=sources) as writer,
        GivingBack(),
        host.running(run, place),
        torch.no_grad(),
    ):
        modules = quantize_linears(host, run, place, progress)
        with _whole(host) as directory:
            made = model_of(open_checkpoint(directory), torch.float32)[1]
            fill_gguf(writer, replace(plan, checkpoint=made), search="best")
    return plan, report_of(run, modules, Selection({}, skipped), host.bytes_before, began)


def preview_gguf(
    source: str | os.PathLike[str],
    type: str,
    method: BlockMethod = "gptq",
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    samples: int = 128,
    seq_len: int = 2048,
) -> tuple[GgufPlan, QuantPreview]:
    """What `quantize_gguf` would write, and what it needs; reads headers only.

    Args, raises: as `quantize_gguf` before the work begins.
    """
    host, plan, main, methods, skipped = _asked(source, type, method, pure, tensor_types)
    preview = preview_of(host.checkpoint, host.model, main, methods, skipped, samples, capped(host.model, seq_len))
    return plan, _with_file(preview, plan)


def _asked(
    source: str | os.PathLike[str], type: str, method: BlockMethod, pure: bool, tensor_types: Sequence[tuple[str, str]]
) -> tuple[DirectoryHost, GgufPlan, Options, dict[str, Options], dict[str, str]]:
    """The model, the plan of the file, the method of most weights, that of each, and why others are not calibrated."""
    path = local_copy(source)
    host = DirectoryHost.open(path)
    plan = plan_gguf(path, type, pure, tensor_types, calibrated=True)
    types, skipped = _calibrated(plan)
    if not types:
        raise ArgumentError(
            f"no weight of a decoder layer of {path} would get a type of blocks in {type}: there is nothing to calibrate; leave "
            f"out --method {method}"
        )
    methods: dict[str, Options] = {name: CalibratedBlocks.of_type(found, method) for name, found in types.items()}
    main = MIXES[type].type
    asked = CalibratedBlocks.of_type(main if main in WRITABLE_TYPES else next(iter(types.values())), method)
    check_limits(host, methods, "native", "reference")
    check_model(host.model, asked)
    return host, plan, asked, methods, skipped


def _calibrated(plan: GgufPlan) -> tuple[dict[str, str], dict[str, str]]:
    """The types of the linear layers and stacks of experts to calibrate, by their names in the model, in the file's order; and,
    for every other matrix of blocks, why it is not."""
    types: dict[str, str] = {}
    named: dict[str, str] = {}  # the tensor in the file that gave a type
    skipped: dict[str, str] = {}
    for name, entry in plan.entries.items():
        kind, type = entry.place.kind, entry.chosen.type
        if kind == "latent" and type in WRITABLE_TYPES:
            module = entry.place.name.removesuffix(".weight")
            skipped[module] = f"{type} by the better search: keys and values lie apart in the file, keys transposed"
        if kind not in ("linear", "experts", "embedding") or len(entry.shape) < 2 or type not in WRITABLE_TYPES:
            continue
        module = entry.place.name if kind == "experts" else entry.place.name.removesuffix(".weight")
        if not name.startswith("blk."):
            skipped[module] = (
                f"{type} by the better search: it is not in a decoder layer, and only those are calibrated"
            )
        elif types.setdefault(module, type) != type:
            raise ConversionError(
                f"{named[module]} was to be {types[module]} and {name} {type}, but they are calibrated as one weight, {module}; "
                "give them the same type (--tensor-type), or leave out --method"
            )
        named.setdefault(module, name)
    return types, skipped


def _with_file(preview: QuantPreview, plan: GgufPlan) -> QuantPreview:
    return replace(preview, disk_bytes=preview.disk_bytes + plan.file_nbytes)


@contextmanager
def _whole(host: DirectoryHost) -> Iterator[Path]:
    """All that is finished and what stayed as it was, as a native checkpoint, for a while."""
    directory = host.work.path / _WHOLE
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed here
    directory.mkdir()
    try:
        host.write(directory, "native")
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
