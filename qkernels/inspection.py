"""`inspect`: what a checkpoint holds, and whether it is sound."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from tqdm import tqdm

from .checkpoint import Checkpoint, open_checkpoint
from .engines import Engine, engines_for, unequal_merges
from .errors import CheckpointError
from .formats import Oddity, summary
from .formats.validation import boolean, first_of
from .hub import local_copy
from .reports import quality_line, readable_size
from .scheme import QuantScheme
from .tensor import QuantTensor
from .text import dtype_named, table

Columns = Literal["natural", "act-order", "static"]
MAX_ERRORS = 20


@dataclass(frozen=True)
class LayerInfo:
    """One quantized weight `[out_features, in_features]`, or `experts` of them in one stack.

    `columns`: how they fall into groups: "natural" (k // group_size), "act-order" (a group index, whose gather kernels pay
    for), "static" (quantized in act-order, but grouped naturally: free).
    """

    name: str
    out_features: int
    in_features: int
    scheme: str
    columns: Columns
    nbytes: int
    experts: int = 1

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return self.experts * self.out_features * self.in_features


@dataclass(frozen=True)
class TensorInfo:
    """One tensor that is not quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


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
        return sum(layer.weights for layer in self.layers)

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
        layers = [[x.name, _sizes(x), x.scheme, x.columns, readable_size(x.nbytes)] for x in self.layers]
        tensors = [[x.name, " x ".join(map(str, x.shape)), x.dtype, readable_size(x.nbytes)] for x in self.unquantized]
        engines = [
            [f"{x.name} {x.version}".rstrip(), "yes" if x.serves else "no", "; ".join(x.notes)] for x in self.engines
        ]
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


def inspect(directory: str | os.PathLike[str], revision: str | None = None) -> Inspection:
    """Check a checkpoint, a directory, a GGUF file or either by its id on the Hub (at `revision`), completely: headers first and
    then every quantized module, one in memory at a time.

    Raises:
        CheckpointError: it is not sound; names every broken module and its field (the first 20).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> from qkernels import inspect, replace_linear, save
    >>> model = LlamaForCausalLM(config)
    >>> report = replace_linear(model, "w4a16_g32")
    >>> save(model, "tiny-4bit")
    >>> found = inspect("tiny-4bit")
    >>> found.format, found.schemes, len(found.layers)
    ('native', {'w4a16_g32': 7}, 7)
    >>> round(found.bits_per_weight, 1)  # 4, and a scale of 16 bits for each 32 weights
    4.5
    """
    checkpoint = open_checkpoint(local_copy(directory, revision))
    layers: list[LayerInfo] = []
    oddities: list[tuple[str, Oddity]] = [*checkpoint.oddities]
    errors: list[str] = []
    schemes: dict[str, QuantScheme] = {}
    for module in tqdm(checkpoint.modules, desc="checking", unit="layer", leave=False, delay=2):
        try:
            weight, found = checkpoint.weight(module)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        oddities += [(module, oddity) for oddity in found]
        schemes[module] = weight.scheme
        layers.append(_layer(module, weight, checkpoint))
    in_blocks = [name for name in checkpoint.names() if dtype_named(checkpoint.stored_as(name)) is None]
    for name in tqdm(in_blocks, desc="checking", unit="tensor", leave=False, delay=2):
        try:
            checkpoint.read(name)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        layers += _layer_in_blocks(name, checkpoint)
    if errors:
        more = f" (and {len(errors) - MAX_ERRORS} more)" if len(errors) > MAX_ERRORS else ""
        listed = "\n  ".join(errors[:MAX_ERRORS])
        raise CheckpointError(
            f"{len(errors)} of {len(checkpoint.modules) + len(in_blocks)} quantized modules are broken{more}:\n  {listed}"
        )
    config = checkpoint.quantization
    listed_above = {full for layer in layers for full in (layer.name, f"{layer.name}.weight")}
    others = tuple(_tensor(checkpoint, name) for name in checkpoint.names() if name not in listed_above)
    architectures = checkpoint.config.get("architectures")
    format_name = None if checkpoint.format is None else checkpoint.format.name
    ordered = [layer.name for layer in layers if layer.columns == "act-order"]
    return Inspection(
        directory=str(checkpoint.path),
        architecture=str(architectures[0] if isinstance(architectures, list) and architectures else "unknown"),
        method=str(first_of(config, "quant_method", "method", default="unnamed" if config else "none")),
        version=str(first_of(config, "checkpoint_format", "version", "format", default="")),
        format=format_name,
        schemes=dict(Counter(layer.scheme for layer in layers).most_common()),
        layers=tuple(layers),
        unquantized=others,
        oddities=(*summary(oddities), *summary(_gaps(schemes, others))),
        engines=engines_for(format_name, schemes, ordered, _modules_of(others)),
        quality=quality_line(checkpoint.path),
    )


def _layer(module: str, weight: QuantTensor, checkpoint: Checkpoint) -> LayerInfo:
    columns: Columns = "natural"
    if weight.group_index is not None:
        columns = "act-order"
    elif boolean(checkpoint.quantization, "desc_act"):
        columns = "static"
    nbytes, experts = checkpoint.module_nbytes(module), math.prod(weight.codes.shape[:-2])
    return LayerInfo(module, weight.N, weight.K, str(weight.scheme), columns, nbytes, experts)


def _layer_in_blocks(name: str, checkpoint: Checkpoint) -> list[LayerInfo]:
    """A weight in blocks that no scheme holds: what they are called stands for the scheme."""
    shape = checkpoint.shape(name)
    kind, nbytes = checkpoint.stored_as(name), checkpoint.nbytes(name)
    if len(shape) == 3:
        return [LayerInfo(name, *shape[1:], kind, "natural", nbytes, shape[0])]
    if len(shape) != 2 or not name.endswith(".weight"):
        return []
    return [LayerInfo(name.removesuffix(".weight"), *shape, kind, "natural", nbytes)]


def _sizes(layer: LayerInfo) -> str:
    sizes = (layer.out_features, layer.in_features)
    return " x ".join(map(str, sizes if layer.experts == 1 else (layer.experts, *sizes)))


def _tensor(checkpoint: Checkpoint, name: str) -> TensorInfo:
    return TensorInfo(name, checkpoint.shape(name), checkpoint.stored_as(name), checkpoint.nbytes(name))


def _modules_of(others: Sequence[TensorInfo]) -> set[str]:
    return {tensor.name.removesuffix(".weight") for tensor in others}


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
    for module, detail in unequal_merges(schemes, _modules_of(others)).items():
        found.append((module, Oddity("modules that engines merge have different schemes", detail)))
    return found


def _kind(module: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)
