"""Bytes of a model's weights in memory, by class, as they are and with its linear layers in a scheme; and who would run them.

Nothing is read but headers: a packed weight's bytes are those of its layout's buffers on meta.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn

from ..kernels.catalogue import KERNELS, KernelSpec, Problem
from ..layerwise.preview import as_quantized
from ..layouts import get_layout
from ..models.experts import experts_of
from ..nn.selection import Selection, heads
from ..quantizers import RTN
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from ..text import dtype_name
from .devices import Device

Class = Literal["linears", "experts", "embeddings", "head", "norms and others"]
CLASSES: Final[tuple[Class, ...]] = ("linears", "experts", "embeddings", "head", "norms and others")
TORCH: Final = "torch"  # what multiplies weights that are not quantized


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight, or the stack of a projection of `experts` experts.

    Args:
        layer: number of the decoder layer that it is in; None: outside.
        used: share of its bytes that a token needs.
        embeds: whether it is an embedding, of which a token reads a row; all of it if a head is tied to it.
    """

    name: str
    N: int
    K: int
    experts: int
    used: float
    embeds: bool = False

    @property
    def kind(self) -> Class:
        """The class that it belongs to."""
        return "experts" if self.experts else "embeddings" if self.embeds else "linears"

    @property
    def count(self) -> int:
        return self.N * self.K * max(1, self.experts)


@dataclass(frozen=True)
class Sizes:
    """What a model takes in one form.

    Args:
        memory: bytes by class.
        file: bytes of all tensors in a file of this form.
        read: bytes of weights that a token reads.
        kernels: how many matrices each kernel runs.
        lacking: for matrices that none runs, the reasons, with how many they are.
        passed: kernels of this device that stand before those that run, and why they do not.
        weights: how many numbers the quantized matrices hold, and in how many bytes of the file.
    """

    memory: Mapping[Class, int]
    file: int
    read: float
    kernels: Mapping[str, int]
    lacking: Mapping[str, int]
    passed: Mapping[str, str]
    weights: tuple[int, int]

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def bits(self) -> float:
        """Stored bits a weight, over the matrices that are quantized."""
        count, nbytes = self.weights
        return 8 * nbytes / count if count else math.nan


@dataclass(frozen=True)
class Inventory:
    """A model on meta, sorted.

    Args:
        matrices: what `selection` has chosen, by name.
        rest: bytes of everything else by class, in `dtype`.
        rest_read: bytes of it that a token reads: all but embeddings, of which it reads a row.
        layers: how many decoder layers there are.
        parameters: of the whole model, tied ones once.
    """

    matrices: Mapping[str, Matrix]
    rest: Mapping[Class, int]
    rest_read: int
    layers: int
    parameters: int
    dtype: torch.dtype


def active_share(model: nn.Module, experts: int, batch: int) -> float:
    """How much of stacked experts a step of `batch` tokens reads: those that are chosen, at most all."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "top_k_experts",
        "moe_k",
        "moe_topk",
        "num_selected_experts",
    )
    chosen = next((v for name in names if isinstance(v := getattr(config, name, None), int) and v > 0), None)
    return 1.0 if chosen is None else min(1.0, batch * chosen / experts)


def inventory(
    model: nn.Module, selection: Selection, dtype: torch.dtype, batch: int, keep: Callable[[str], bool]
) -> Inventory:
    """Sort the weights of a model.

    Args:
        model: parameters on meta.
        selection: what is or would be quantized.
        batch: sequences in a step, of which experts are chosen for each.
        keep: whether a parameter stays in float32 whatever the dtype.
    """
    forms, ends = experts_of(model), heads(model)
    modules = dict(model.named_modules())
    matrices: dict[str, Matrix] = {}
    rest: dict[Class, int] = dict.fromkeys(CLASSES, 0)
    read, parameters = 0.0, 0
    seen: set[int] = set()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in model.named_parameters():
        if id(tensor) in seen or name in tied:
            continue
        seen.add(id(tensor))
        parameters += tensor.numel()
        owner, _, leaf = name.rpartition(".")
        nbytes = tensor.numel() * (4 if keep(name) or not tensor.is_floating_point() else dtype.itemsize)
        if owner in forms:
            form = forms[owner]
            share = active_share(model, form.experts, batch)
            if leaf in (form.up, form.down) and name in selection.every:
                matrices[name] = Matrix(name, *form.shape(leaf), form.experts, share)
                continue
            kind: Class = "experts"
            read += nbytes * share
        elif leaf == "weight" and owner in selection.chosen:
            N, K = tensor.shape if tensor.dim() == 2 else (tensor.shape[0], tensor[0].numel())
            embeds = isinstance(modules.get(owner), nn.Embedding)
            shared = any(name in pair and pair[0] != pair[1] for pair in tied.items())
            matrices[owner] = Matrix(owner, N, K, 0, 1.0 if shared or not embeds else 0.0, embeds)
            continue
        elif isinstance(modules.get(owner), nn.Embedding):
            kind = "embeddings"
        else:
            kind = "head" if owner in ends else "linears" if tensor.dim() == 2 else "norms and others"
            read += nbytes
        rest[kind] += nbytes
    if any(name.rpartition(".")[0] in ends for pair in tied.items() for name in pair):  # the head reads them
        read += rest["embeddings"]
    rest["norms and others"] += sum(buffer.nbytes for buffer in model.buffers())
    numbers = {int(part) for name in modules for part in name.split(".")[1:3] if part.isdecimal()}
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(config, "num_hidden_layers", None) or max(numbers, default=0) + 1
    return Inventory(matrices, rest, int(read), int(layers), parameters, dtype)


def sizes_as_floats(found: Inventory, file: int | None) -> Sizes:
    """With all weights in the dtype of activations."""
    memory: dict[Class, int] = dict(found.rest)
    read = float(found.rest_read)
    for matrix in found.matrices.values():
        nbytes = matrix.count * found.dtype.itemsize
        memory[matrix.kind] += nbytes
        read += nbytes * matrix.used
    total = sum(memory.values())
    return Sizes(memory, total if file is None else file, read, {TORCH: len(found.matrices)}, {}, {}, (0, 0))


def in_scheme(found: Inventory, scheme: QuantScheme) -> dict[str, QuantTensor]:
    """Every matrix as rounding to nearest would make it, on meta."""
    method = RTN(scale_dtype=torch.bfloat16 if found.dtype == torch.bfloat16 else torch.float16).with_scheme(scheme)
    weights = {}
    for name, matrix in found.matrices.items():
        shape = (*((matrix.experts,) if matrix.experts else ()), matrix.N, matrix.K)
        weights[name] = as_quantized(shape, found.dtype, method)
    return weights


def sizes_in(
    found: Inventory, weights: Mapping[str, QuantTensor], device: Device, ordered: Callable[[str], bool]
) -> Sizes:
    """With quantized matrices, each packed by the kernel that takes it on this device; those that no kernel takes are counted as
    floats, and `lacking` says why.

    Args:
        weights: on meta, by matrix.
        ordered: whether a matrix comes with an order of columns, which is no part of these weights.
    """
    memory: dict[Class, int] = dict(found.rest)
    file, read = float(sum(found.rest.values())), float(found.rest_read)
    kernels: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    passed: dict[str, str] = {}
    count = stored = 0
    known: dict[Any, _Packed] = {}
    for name, matrix in found.matrices.items():
        weight = weights[name]
        key = (weight.codes.shape, weight.scales.dtype, weight.scheme)
        if key not in known:
            known[key] = _packed(weight, device, found.dtype)
        done = known[key]
        order = 4 * matrix.K if ordered(name) else 0
        if done.kernel is None:
            lacking["; ".join(f"{kernel}: {why}" for kernel, why in done.against.items())] += 1
        else:
            kernels.update([done.kernel] if matrix.used else [])
            passed.update(done.against)
        memory[matrix.kind] += done.nbytes + order
        read += (done.nbytes + order) * matrix.used
        file += weight.nbytes + order
        count, stored = count + matrix.count, stored + weight.nbytes + order
    return Sizes(memory, int(file), read, dict(kernels), dict(lacking), passed, (count, stored))


@dataclass(frozen=True)
class _Packed:
    """The kernel of a matrix, if there is one, its bytes in memory, and why the kernels before it do not run."""

    kernel: str | None
    nbytes: int
    against: Mapping[str, str]


def _packed(weight: QuantTensor, device: Device, dtype: torch.dtype) -> _Packed:
    experts = weight.codes.shape[0] if weight.codes.dim() == 3 else 0
    problem = Problem(weight.N, weight.K, weight.scheme, dtype, device.arch, experts)
    against: dict[str, str] = {}
    for spec in KERNELS:
        if _of_other_devices(spec, device):
            continue
        why = spec.reasons(problem, installed=device.here)
        if not why:
            buffers = get_layout(spec.layout).pack(weight)
            return _Packed(spec.name, sum(t.nbytes for t in buffers.values() if t is not None), against)
        if weight.scheme.act in get_layout(spec.layout).acts:  # else it is of other activations, and no better one
            against[spec.name] = why[0]
    return _Packed(None, weight.codes.numel() * dtype.itemsize, against)


def _of_other_devices(spec: KernelSpec, device: Device) -> bool:
    return (get_layout(spec.layout).backend == "cpu") != device.is_cpu


def described(found: Inventory) -> str:
    """One line: how many parameters, layers, in which dtype."""
    unit, size = ("billion", 1e9) if found.parameters >= 1e9 else ("million", 1e6)
    return f"{found.parameters / size:.3g} {unit} parameters, {found.layers} layers, {dtype_name(found.dtype)}"
