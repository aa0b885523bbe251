"""`plan`: whether a model fits on a device, in which form, and what to take."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ..engines import Engine, engines_for, engines_of_floats
from ..errors import ArgumentError
from ..models.architectures import text_config
from ..models.experts import experts_of
from ..nn.selection import select_linears
from ..reports import readable_size
from ..scheme import QuantScheme
from ..text import dtype_name, table
from ..texts import capped
from .cache import KV_DTYPES, Cache, cache_of
from .deciding import Prefer, costs, decision, taken
from .devices import Device, device_of, with_bandwidth
from .gguf import gguf_forms
from .measured import CANDIDATES, CPU_SHARE, GGUF, Candidate, Seconds, seconds_of
from .models import Planned, planned_model
from .rows import HEADER, PlanRow, Verdict, cells
from .weights import TORCH, Inventory, Sizes, described, in_scheme, inventory, sizes_as_floats, sizes_in

SPARE = 0.1  # of a device's memory: with less left over it is tight
CONTEXT = 4096
MOST_CONTEXT = 2**24


@dataclass(frozen=True)
class Plan:
    """The answer for a model. `classes`: bytes of its weights in memory by class, of the first row."""

    model: str
    architecture: str
    described: str
    devices: tuple[Device, ...]
    context: int
    batch: int
    cache_kinds: dict[str, int]
    kv_dtype: str
    classes: dict[str, int]
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]
    decision: str

    @property
    def fits(self) -> bool:
        """Whether any row does."""
        return any(row.fits for row in self.rows)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps({**asdict(self), "fits": self.fits}, indent=2, ensure_ascii=False)

    def to_markdown(self) -> str:
        """Everything, as Markdown that also reads well in a terminal."""
        places = "; ".join(_place(device) for device in self.devices)
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.cache_kinds.items()) or "none"
        classes = ", ".join(f"{name} {readable_size(nbytes)}" for name, nbytes in self.classes.items() if nbytes)
        return "\n".join(
            [
                f"# {self.model}: {self.architecture}, {self.described}",
                "",
                f"- device: {places}",
                f"- {self.context} tokens of context, batch {self.batch}; cache in {self.kv_dtype}, layers: {kinds}",
                f"- weights in memory as in the first row: {classes}",
                "",
                table(HEADER, [cells(row) for row in self.rows]),
                "",
                *(f"- {note}" for note in self.notes),
                "",
                self.decision,
            ]
        )


def plan(
    model: str,
    devices: Sequence[str] = ("cpu",),
    context: int | None = None,
    batch: int = 1,
    kv_dtype: str | None = None,
    dtype: torch.dtype | None = None,
    schemes: Sequence[str] = (),
    prefer: Prefer = "quality",
    bench: str | Sequence[str] = (),
    revision: str | None = None,
    types: Sequence[str] = (),
) -> Plan:
    """Whether a model fits, and in which form it should be taken; reads headers only (of a quantized checkpoint also scales and
    zero points of one module of each kind).

    Args:
        model: a checkpoint directory, a GGUF file, a config.json alone, or a Hub id, of which headers alone are fetched.
        devices: one, or two: a GPU, and what takes the layers that it has no room for; see `planning.devices`.
        context: tokens of each sequence, prompt and answer together; 0 counts no cache; None: 4096, at most the model's longest.
        batch: sequences at a time.
        kv_dtype: of the cache, a key of `KV_DTYPES`; None: the model's.
        dtype: of activations and unquantized weights; None: that of the checkpoint.
        schemes: rows of the table, in short form.
        types: rows of it, mixes of GGUF types as `qkernels quantize --type` takes them. Neither schemes nor types: those that
            were measured (`planning.measured`).
        prefer: what decides among rows that fit.
        bench: results of this machine: of `qkernels bench --json`, whose read rate takes the place of the first device's, and of
            `python -m benchmarks.models.quantize_speed`, whose times take the place of ours.

    Raises:
        ArgumentError: an argument is out of its range.
        CheckpointError: there is no such model, or it is malformed.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
    ... )
    >>> config.save_pretrained("tiny")
    >>> from qkernels.planning import plan
    >>> found = plan("tiny/config.json", ["24GiB"], context=1024)
    >>> found.rows[0].scheme, found.rows[0].cache  # 1 layer x 1024 tokens x (keys, values) x 64 channels x 2 bytes
    ('as it is', 262144)
    >>> found.fits
    True
    """
    if not 1 <= len(devices) <= 2:
        raise ArgumentError(f"one device, or two that share a model, got {len(devices)}")
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise ArgumentError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r:.40}")
    seconds, rates = seconds_of([bench] if isinstance(bench, str) else bench)
    if len(rates) > 1:
        raise ArgumentError(f"one result of qkernels bench at most, got {', '.join(rates)}")
    first = with_bandwidth(device_of(devices[0]), rates[0] if rates else None)
    places = (first, *(with_bandwidth(device_of(name), None) for name in devices[1:]))
    if len(places) == 2 and first.is_cpu:
        raise ArgumentError(
            f"of two devices the first is a GPU, and the second takes what that has no room for, got {' and '.join(devices)}"
        )
    if len(places) == 2 and first.here and first.name == places[1].name:
        raise ArgumentError(f"{first.name} is one device, and its memory is there once: name it once")
    with planned_model(model, dtype, revision) as planned:
        return _plan(planned, places, context, batch, kv_dtype, (schemes, types), prefer, seconds)


def _plan(
    planned: Planned,
    devices: tuple[Device, ...],
    context: int | None,
    batch: int,
    kv_dtype: str | None,
    asked: tuple[Sequence[str], Sequence[str]],
    prefer: Prefer,
    seconds: Seconds,
) -> Plan:
    longest = _longest_of(planned.model)
    context = min(CONTEXT, longest) if context is None else context
    cache = cache_of(planned.model, kv_dtype) if context else Cache((), kv_dtype or dtype_name(planned.dtype))
    rows: list[PlanRow] = []
    notes = list(planned.notes)
    if context > longest:
        notes.append(f"{context} tokens are more than the {longest} that this model was made for")
    classes: dict[str, int] = {}
    # which matrices are chosen does not depend on the scheme, as long as nobody asks for kernels
    selection = planned.selection() if planned.schemes else select_linears(planned.model, QuantScheme())
    found = inventory(planned.model, selection, planned.dtype, batch, planned.keep)
    candidates, forms, why_not = _candidates(planned, *asked)
    notes += [why_not] if why_not else []
    for candidate in candidates:
        form, held = planned, found
        if candidate.format == GGUF:
            form = forms[str(candidate.scheme)]
            held = inventory(form.model, form.selection(), form.dtype, batch, form.keep)
        sizes, engines = _sizes(form, held, candidate, devices[0])
        classes = classes or {str(name): nbytes for name, nbytes in sizes.memory.items()}
        fit = _Fit(form.model, held, sizes, cache, devices, context, batch)
        rows.append(_row(planned, candidate, sizes, engines, fit))
        notes += [f"{name} does not run {rows[-1].scheme}: {why}" for name, why in sizes.passed.items()]
        notes += [f"no kernel for {count} matrices in {rows[-1].scheme}: {why}" for why, count in sizes.lacking.items()]
    best = taken(rows, prefer)
    chosen = None if best is None else candidates[rows.index(best)]
    cost = (
        None
        if best is None or chosen is None
        else costs(planned, chosen, selection, _weights(found), best.file, seconds)
    )
    notes += [*_assumptions(devices, planned, cache), *([cost] if cost else [])]
    return Plan(
        planned.name,
        type(planned.model).__name__,
        described(found),
        devices,
        context,
        batch,
        cache.kinds(),
        cache.dtype,
        classes,
        tuple(rows),
        tuple(dict.fromkeys(notes)),
        decision(rows, prefer),
    )


def _weights(found: Inventory) -> int:
    return sum(matrix.count for matrix in found.matrices.values())


def _candidates(
    planned: Planned, schemes: Sequence[str], types: Sequence[str]
) -> tuple[list[Candidate], dict[str, Planned], str | None]:
    """The rows, of a quantized checkpoint the one that it is; the model as those of them that are GGUF files; why there are none
    of these."""
    if planned.schemes:
        if schemes or types:
            raise ArgumentError(
                f"{planned.name} is quantized already, and planned as it is; quantize the original to have another scheme"
            )
        return [CANDIDATES[0]], {}, None
    known = {candidate.scheme: candidate for candidate in CANDIDATES}
    if schemes or types:
        asked = [str(QuantScheme.parse(scheme)) for scheme in schemes]
        chosen = [known.get(scheme, Candidate(scheme, "rtn", None)) for scheme in asked]
        chosen += [known.get(mix, Candidate(mix, "", None, GGUF)) for mix in map(str.upper, types)]
    else:
        mixture = bool(experts_of(planned.model))
        chosen = [c for c in CANDIDATES if not (mixture and not c.takes_experts)]
    mixes = [str(candidate.scheme) for candidate in chosen if candidate.format == GGUF]
    forms, why_not = gguf_forms(planned, mixes, bool(types)) if mixes else ({}, None)
    return [c for c in chosen if c.format != GGUF or c.scheme in forms], forms, why_not


def _sizes(planned: Planned, found: Inventory, candidate: Candidate, device: Device) -> tuple[Sizes, tuple[str, ...]]:
    """What a form takes, and who else serves its file."""
    engines: tuple[Engine, ...]
    if planned.schemes:
        sizes = sizes_in(found, planned.weights, device, planned.ordered.__contains__)
        sizes = replace(sizes, file=planned.file or sizes.file)
        if planned.dequantizes and sizes.lacking:  # blocks that no kernel takes are dequantized: larger, but they run
            sizes = replace(sizes, kernels={**sizes.kernels, TORCH: sum(sizes.lacking.values())}, lacking={})
        engines = engines_for(planned.format, planned.schemes, sorted(planned.ordered), ())
    elif candidate.scheme is None:
        return sizes_as_floats(found, planned.file), engines_of_floats()
    else:
        scheme, in_order = QuantScheme.parse(candidate.scheme), candidate.orders_columns
        sizes = sizes_in(
            found, in_scheme(found, scheme), device, lambda name: in_order and not found.matrices[name].experts
        )
        every = dict.fromkeys(found.matrices, scheme)
        engines = engines_for(candidate.format, every, sorted(every) if in_order else [], ())
    return sizes, tuple(engine.name for engine in engines if engine.serves and engine.name != "qkernels")


class _Fit:
    """How one form of a model and its cache lie on one device or two."""

    def __init__(
        self,
        model: nn.Module,
        found: Inventory,
        sizes: Sizes,
        cache: Cache,
        devices: tuple[Device, ...],
        context: int,
        batch: int,
    ) -> None:
        self.sizes, self.cache, self.devices, self.found = sizes, cache, devices, found
        self.context, self.batch = context, batch
        config: Any = text_config(model)
        self.longest_known = _longest_of(model)
        self.width = int(getattr(config, "hidden_size", 0) or 0)
        inner = getattr(config, "intermediate_size", None)
        self.inner = int(max(inner) if isinstance(inner, (list, tuple)) else inner or 4 * self.width)
        self.vocabulary = int(getattr(config, "vocab_size", 0) or 0)

    def activations(self, context: int) -> int:
        """Of the pass over a prompt of that length: in and out of a layer and of attention, three inner products of the MLP, the
        logits of each sequence's last token in float32, and the layer of the cache that is copied as it grows."""
        tokens = self.batch * context
        live = tokens * (6 * self.width + 3 * self.inner) * self.found.dtype.itemsize
        largest = max((layer.nbytes(context) for layer in self.cache.layers), default=0) * self.batch
        return live + 4 * self.batch * self.vocabulary + largest

    def total(self, context: int) -> int:
        held = self.sizes.total + self.cache.nbytes(context, self.batch)
        return held + self.activations(context) + self.devices[0].overhead

    def layers_on(self, context: int) -> int | None:
        """How many decoder layers the first device has room for; None: all."""
        first = self.devices[0]
        if self.total(context) <= first.memory or len(self.devices) == 1:
            return None
        moved = self.sizes.memory["linears"] + self.sizes.memory["experts"] + self.cache.nbytes(context, self.batch)
        fixed = self.total(context) - moved
        return max(0, min(self.found.layers, int((first.memory - fixed) * self.found.layers // max(moved, 1))))

    def short(self, context: int) -> int:
        """Bytes that are missing, of both devices together where there are two."""
        total = self.total(context)
        room = self.devices[0].memory
        on_first = self.layers_on(context)
        if on_first is not None:
            moved = self.sizes.memory["linears"] + self.sizes.memory["experts"] + self.cache.nbytes(context, self.batch)
            kept = total - moved + moved * on_first // self.found.layers
            second = moved - moved * on_first // self.found.layers + self.devices[1].overhead
            return max(0, kept - room) + max(0, second - self.devices[1].memory)
        return max(0, total - room)

    def tight(self) -> bool:
        room = (
            sum(device.memory for device in self.devices)
            if self.layers_on(self.context) is not None
            else self.devices[0].memory
        )
        return self.total(self.context) > (1 - SPARE) * room

    def longest(self) -> int:
        """Tokens of context that fit, at most the model's."""
        if self.short(1):
            return 0
        low, high = 1, self.longest_known
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if self.short(middle) else (middle, high)
        return low

    def tokens_per_s(self) -> tuple[float, float] | None:
        """Of all sequences together, at the end of the context: bandwidth over what a step reads. On a CPU times the shares that
        were measured, on a card a ceiling."""
        read = self.sizes.read + self.cache.nbytes(self.context, self.batch)
        on_first = self.layers_on(self.context)
        shares = [1.0] if on_first is None else [on_first / self.found.layers, 1 - on_first / self.found.layers]
        if any(device.gbs is None for device, share in zip(self.devices, shares, strict=False) if share):
            return None
        bounds = []
        for end in (0, 1):
            seconds = sum(
                read * share / ((device.gbs or 1.0) * 1e9 * (CPU_SHARE[end] if device.is_cpu else 1.0))
                for device, share in zip(self.devices, shares, strict=False)
            )
            bounds.append(self.batch / seconds)
        return bounds[0], bounds[1]


def _longest_of(model: nn.Module) -> int:
    """The longest context that the config of a model speaks of."""
    longest = capped(model, MOST_CONTEXT)
    return longest if isinstance(longest, int) else MOST_CONTEXT


def _row(planned: Planned, candidate: Candidate, sizes: Sizes, engines: tuple[str, ...], fit: _Fit) -> PlanRow:
    short = fit.short(fit.context)
    verdict: Verdict = "short" if short else "tight" if fit.tight() else "fits"
    if sizes.lacking:
        verdict, short = "no kernel", 0
    as_it_is = candidate.scheme is None
    layers_on = fit.layers_on(fit.context) if verdict != "no kernel" else None
    scheme = "as it is" if as_it_is else str(candidate.scheme)
    return PlanRow(
        scheme,
        "+".join(candidate.parts) or (GGUF if candidate.format == GGUF else ""),
        sizes.bits if sizes.weights[0] else None,
        sizes.file,
        sizes.total,
        fit.cache.nbytes(fit.context, fit.batch),
        fit.activations(fit.context),
        fit.total(fit.context),
        verdict,
        short,
        0 if sizes.lacking else fit.longest(),
        None if sizes.lacking else fit.tokens_per_s(),
        None if planned.schemes else candidate.kl,
        dict(sizes.kernels),
        tuple(sizes.lacking),
        engines,
        _command(planned, candidate, fit.devices, layers_on),
        layers_on,
    )


def _command(planned: Planned, candidate: Candidate, devices: tuple[Device, ...], layers_on: int | None) -> str:
    """What makes the form, or runs a model that is to stay as it is."""
    name = shlex.quote(planned.name) if planned.file is not None else "MODEL"
    if candidate.scheme is None:
        where = f"--device {devices[0].name if devices[0].here else 'cuda'}"
        if layers_on is not None:
            where = f"--gpu-layers {layers_on}" if devices[1].is_cpu else "--device auto"
        return f"qkernels generate {name} --prompt 'It was' {where}"
    if candidate.format == GGUF:
        return f"qkernels quantize {name} OUT.gguf --type {candidate.scheme}"
    words = ["qkernels quantize", name, "OUT", "--method", candidate.method, "--scheme", candidate.scheme]
    words += [f"--{name.replace('_', '-')} {choice}" for name, choice in candidate.choices]
    words += ["--calibration text.txt"] if candidate.calibrated else []
    words += [f"--format {candidate.format}"] if candidate.format != "native" else []
    return " ".join(words)


def _assumptions(devices: Sequence[Device], planned: Planned, cache: Cache) -> list[str]:
    notes = [
        f"total = weights + KV + activations of one pass over the prompt + {readable_size(devices[0].overhead)} for "
        + ("the interpreter" if devices[0].is_cpu else "the CUDA context (usual, not measured)"),
    ]
    if any(not device.is_cpu for device in devices):
        notes.append("tokens/s on a GPU is the ceiling that its bandwidth sets; nothing of ours was measured on one")
    if any(device.is_cpu for device in devices):
        notes.append(
            f"tokens/s on a CPU: {CPU_SHARE[0]} to {CPU_SHARE[1]} of the bandwidth, as measured for 1.2 billion parameters"
        )
    if not planned.schemes:
        notes.append("KL in nats a token is that of a bundled model of 8 million parameters: an order, no forecast")
    if cache.dtype == "fp8":
        notes.append("a cache in fp8 is an engine's (vLLM: --kv-cache-dtype fp8); transformers keeps the model's dtype")
    return notes


def _place(device: Device) -> str:
    rate = f", {device.gbs:.0f} GB/s" if device.gbs is not None else ""
    return f"{device.name} ({device.arch}, {readable_size(device.memory)}{rate}; {device.source})"
