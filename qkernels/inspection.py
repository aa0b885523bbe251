"""`inspect`: what a checkpoint holds, and whether it is sound."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from tqdm import tqdm

from .errors import CheckpointError
from .formats import Oddity
from .formats.directory import QuantizedSource, summary
from .formats.validation import boolean, first_of
from .markdown import table
from .reports import quality_line, readable_size
from .scheme import QuantScheme
from .tensor import QuantTensor

Columns = Literal["natural", "act-order", "static"]
MAX_ERRORS = 20

# Modules that serving engines merge into one matrix, which needs one scheme.
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# What transformers itself needs for a format, by the beginning of its name; with `integrations.transformers.enable()` nothing.
_NEEDS = {
    "awq": "needs gptqmodel and accelerate",
    "compressed-tensors": "needs compressed-tensors",
    "bitsandbytes": "needs bitsandbytes",
    "hqq": "needs hqq",
    "auto-round": "needs auto-round",
    "torchao": "needs torchao",
}
_VLLM_GROUPS = (16, 32, 64, 128, "channel")


@dataclass(frozen=True)
class LayerInfo:
    """One quantized weight `[out_features, in_features]`.

    `columns`: how they fall into groups: "natural" (k // group_size), "act-order" (a group index, whose gather kernels pay
    for), "static" (quantized in act-order, but grouped naturally: free).
    """

    name: str
    out_features: int
    in_features: int
    scheme: str
    columns: Columns
    nbytes: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor that is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Engine:
    """Whether an inference engine can serve the checkpoint, and what it needs or why it cannot."""

    name: str
    serves: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A sound checkpoint, described. `method` and `version` are as config.json declares them; `format` is what they mean
    here, None where nothing is quantized; `quality` is a line of the report that `quantize` wrote beside it, if it did."""

    directory: str
    architecture: str
    method: str
    version: str
    format: str | None
    schemes: Mapping[str, int]
    layers: tuple[LayerInfo, ...]
    unquantized: tuple[TensorInfo, ...]
    oddities: tuple[str, ...]
    engines: tuple[Engine, ...]
    quality: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes for layer in self.layers) + sum(tensor.nbytes for tensor in self.unquantized)

    @property
    def quantized_weights(self) -> int:
        """How many weights are quantized."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits for each quantized weight, scales, zero points and group indices included."""
        if not self.quantized_weights:
            return None
        return sum(layer.nbytes for layer in self.layers) * 8 / self.quantized_weights

    def to_json(self) -> str:
        """Everything, as JSON."""
        totals = {
            "nbytes": self.nbytes,
            "quantized_weights": self.quantized_weights,
            "bits_per_weight": self.bits_per_weight,
        }
        return json.dumps(asdict(self) | totals, indent=2, ensure_ascii=False)

    def to_markdown(self) -> str:
        """Everything, as Markdown that also reads well in a terminal."""
        bits = f", {self.bits_per_weight:.3f} bits a quantized weight" if self.bits_per_weight is not None else ""
        schemes = ", ".join(f"{scheme} ({count})" for scheme, count in self.schemes.items()) or "none"
        facts = [
            ["architecture", self.architecture],
            ["method", f"{self.method}, version {self.version}" if self.version else self.method],
            ["schemes", schemes],
            ["quantized", f"{len(self.layers)} modules, {self.quantized_weights:,} weights"],
            ["size", readable_size(self.nbytes) + bits],
        ]
        facts += [["quality", self.quality]] if self.quality is not None else []
        layers = [
            [x.name, f"{x.out_features} x {x.in_features}", x.scheme, x.columns, readable_size(x.nbytes)]
            for x in self.layers
        ]
        tensors = [[x.name, " x ".join(map(str, x.shape)), x.dtype, readable_size(x.nbytes)] for x in self.unquantized]
        engines = [[x.name, "yes" if x.serves else "no", "; ".join(x.notes)] for x in self.engines]
        parts = [f"# {self.directory}", table(["", ""], facts)]
        if layers:
            parts += ["## Quantized", table(["module", "N x K", "scheme", "columns", "size"], layers)]
        if tensors:
            parts += ["## Not quantized", table(["tensor", "shape", "dtype", "size"], tensors)]
        if self.oddities:
            parts += ["## Oddities", "\n".join(f"- {line}" for line in self.oddities)]
        if engines:
            parts += ["## Served by, as far as the format decides", table(["engine", "", "notes"], engines)]
        return "\n\n".join(parts)


def inspect(directory: str | os.PathLike[str]) -> Inspection:
    """Check a checkpoint completely, headers first and then every quantized module, one in memory at a time.

    Raises:
        CheckpointError: the directory is not sound; names every broken module and its field (the first 20).
    """
    quantized = QuantizedSource.open(directory)
    layers: list[LayerInfo] = []
    oddities: list[tuple[str, Oddity]] = []
    errors: list[str] = []
    schemes: dict[str, QuantScheme] = {}
    for module in tqdm(quantized.modules, desc="checking", unit="layer", leave=False, delay=2):
        try:
            weight, found = quantized.parse_with_oddities(module)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        oddities += [(module, oddity) for oddity in found]
        schemes[module] = weight.scheme
        layers.append(_layer(module, weight, quantized))
    if errors:
        more = f" (and {len(errors) - MAX_ERRORS} more)" if len(errors) > MAX_ERRORS else ""
        listed = "\n  ".join(errors[:MAX_ERRORS])
        raise CheckpointError(
            f"{len(errors)} of {len(quantized.modules)} quantized modules are broken{more}:\n  {listed}"
        )
    source, config = quantized.source, quantized.config
    others = tuple(_tensor(quantized, name) for name in quantized.others)
    architectures = source.config.get("architectures")
    return Inspection(
        directory=str(source.directory),
        architecture=str(architectures[0] if isinstance(architectures, list) and architectures else "unknown"),
        method=str(first_of(config, "quant_method", "method", default="unnamed" if config else "none")),
        version=str(first_of(config, "checkpoint_format", "version", "format", default="")),
        format=None if quantized.format is None else quantized.format.name,
        schemes=dict(Counter(layer.scheme for layer in layers).most_common()),
        layers=tuple(layers),
        unquantized=others,
        oddities=(*summary(oddities), *summary(_gaps(schemes, others))),
        engines=_engines(quantized, layers, schemes),
        quality=quality_line(source.directory),
    )


def _layer(module: str, weight: QuantTensor, quantized: QuantizedSource) -> LayerInfo:
    columns: Columns = "natural"
    if weight.group_index is not None:
        columns = "act-order"
    elif boolean(quantized.config, "desc_act"):
        columns = "static"
    return LayerInfo(module, weight.N, weight.K, str(weight.scheme), columns, quantized.nbytes(module))


def _tensor(quantized: QuantizedSource, name: str) -> TensorInfo:
    entry = quantized.source.entry(name)
    return TensorInfo(name, entry.shape, str(entry.dtype).removeprefix("torch."), entry.nbytes)


def _gaps(schemes: Mapping[str, QuantScheme], others: Sequence[TensorInfo]) -> list[tuple[str, Oddity]]:
    """Modules left in 16 bits whose likes in other layers are quantized, stacked experts, merged modules that differ."""
    found = []
    kinds = {_kind(module) for module in schemes}
    for tensor in others:
        module = tensor.name.removesuffix(".weight")
        shape = f"{tensor.dtype} {list(tensor.shape)}"
        if len(tensor.shape) == 2 and module != tensor.name and _kind(module) in kinds:
            found.append((module, Oddity("not quantized, although the same module of other layers is", shape)))
        elif schemes and len(tensor.shape) == 3 and ".experts." in tensor.name:
            found.append((tensor.name, Oddity("stacked experts are not quantized", shape)))
    floats = {tensor.name.removesuffix(".weight") for tensor in others}
    for module, detail in _unequal_merges(schemes, floats).items():
        found.append((module, Oddity("modules that engines merge have different schemes", detail)))
    return found


def _unequal_merges(schemes: Mapping[str, QuantScheme], floats: Collection[str]) -> dict[str, str]:
    """Parent -> its modules that engines merge although their schemes differ."""
    unequal = {}
    for parent in dict.fromkeys(module.rpartition(".")[0] for module in schemes):
        for names in _MERGED:
            paths = [f"{parent}.{name}" for name in names]
            found = {path: str(schemes.get(path, "float")) for path in paths if path in schemes or path in floats}
            if len(set(found.values())) > 1:
                unequal[parent] = ", ".join(f"{path.rpartition('.')[2]} {scheme}" for path, scheme in found.items())
    return unequal


def _kind(module: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def _engines(
    quantized: QuantizedSource, layers: Sequence[LayerInfo], schemes: Mapping[str, QuantScheme]
) -> tuple[Engine, ...]:
    """Who can serve it, as far as the formats decide; the state of 2026."""
    if quantized.format is None:
        return ()
    name = quantized.format.name
    own = Engine("qkernels", True, ())
    if name == "native":
        why = ("its format is our own; convert it with `qkernels pack … --format gptq`",)
        return own, Engine("transformers", False, why), Engine("vLLM", False, why)
    needs = next((text for start, text in _NEEDS.items() if name.startswith(start)), "needs optimum and gptqmodel")
    limits = []
    ordered = [layer.name for layer in layers if layer.columns == "act-order"]
    if ordered:
        limits.append(f"act-order was removed in 2026 (RFC 48148): {len(ordered)} modules, first {ordered[0]}")
    narrow = sorted({scheme.bits for scheme in schemes.values()} & {2, 3})
    if narrow:
        limits.append(f"no {' or '.join(map(str, narrow))}-bit kernels but Humming's")
    groups = sorted({str(s.group_size) for s in schemes.values() if s.group_size not in _VLLM_GROUPS})
    if groups:
        limits.append(f"group sizes are {', '.join(map(str, _VLLM_GROUPS))}, got {', '.join(groups)}")
    differing = list(_unequal_merges(schemes, {name.removesuffix(".weight") for name in quantized.others}))
    if differing:
        limits.append(f"merged modules need one scheme: {len(differing)} differ, first {differing[0]}")
    return own, Engine("transformers", True, (needs,)), Engine("vLLM", not limits, tuple(limits))
