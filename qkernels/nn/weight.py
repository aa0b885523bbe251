"""`QuantLinear.weight`: what code sees that looks at the weight of a linear layer instead of calling it.

Models do: T5 compares the weight's dtype with that of its input, Mamba multiplies by `dt_proj.weight` itself,
nn.TransformerEncoder asks whether its fast path may read the weights, fused projections are concatenated from
`to_q.weight.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ArgumentError
from ..tensor import FLOAT_DTYPES

READ_ONLY = (
    "the weight of a QuantLinear is packed, so it cannot be written; put a new layer in its place "
    "(QuantLinear.from_linear), or load packed buffers with load_state_dict"
)

# Answered by the wrapper itself, which has a shape, a dtype and a device, and no memory.
_PROPERTIES = (
    "dtype", "device", "shape", "ndim", "layout", "itemsize", "nbytes", "requires_grad", "grad", "grad_fn", "is_leaf",
    "is_cpu", "is_cuda", "is_meta", "is_mkldnn", "is_mps", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr",
    "is_xpu", "names", "output_nr", "retains_grad", "_version",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "is_inference", "is_conj", "is_neg", "get_device", "storage_offset", "data_ptr",
    "untyped_storage", "storage", "__len__",
)  # fmt: skip
_METADATA = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)]  # what this torch has of them
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.numel, torch.is_floating_point, torch.is_complex]
)
_SAME = frozenset([Tensor.detach, Tensor.data.__get__])  # type: ignore[attr-defined]
_IN_PLACE_OPERATORS = (
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__",
    "__ior__", "__ixor__", "__ilshift__", "__irshift__",
)  # fmt: skip


class Packed(Protocol):
    """The layer behind a weight."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[N, K]`."""
        ...

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + bias` on the layer's kernel."""
        ...


class PackedWeight(Tensor):
    """The weight `[N, K]` of a `QuantLinear`, without its values: an instance is a shape, a dtype, a device and the layer.

    Whatever computes with it gets the dequantized weight, made for that one call and not kept; `F.linear` runs on the layer's
    kernel. It is read-only, has no gradient, and `detach()` and `.data` are itself. A view or slice of it is a copy, and
    read-only, too.
    """

    layer: Packed
    _is_hf_initialized = True  # transformers initializes what it did not load, and asks its tensors (CLIP, Mamba)

    @staticmethod
    def __new__(cls, layer: Packed, device: torch.device) -> PackedWeight:
        shape = (layer.out_features, layer.in_features)
        weight: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=device)
        weight.layer = layer
        return weight

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.layer.dequantize(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Above autograd: what is asked about goes on as it is, what is computed with gets the values."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SAME:
            return args[0]
        if func is Tensor.requires_grad_ and not (kwargs.get("requires_grad", True) if len(args) < 2 else args[1]):
            return args[0]
        _refuse_writing(getattr(func, "__name__", ""), args, kwargs)
        if func is nn.functional.linear and (y := _on_the_kernel(*args, **kwargs)) is not None:
            return y
        made: list[Tensor] = []
        args, kwargs = tree_map(lambda value: _values(value, made), (tuple(args), dict(kwargs)))
        return _read_only(func(*args, **kwargs), made)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Below it, for what came past `__torch_function__`."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, PackedWeight):
                raise ArgumentError(READ_ONLY)
        args, kwargs = tree_map(_values, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)


class _Copy(Tensor):
    """Values that look like a view of the weight: what is written to them would be lost, so it is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_writing(getattr(func, "__name__", ""), args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            copies = [leaf for leaf in tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, _Copy)]
            return _read_only(func(*args, **kwargs), copies)


def _read_only(result: Any, values: Sequence[Tensor]) -> Any:
    """A function's result, whose tensors are `_Copy` where they lie in the memory of a weight's values."""
    memory = {t.untyped_storage().data_ptr() for t in values if _has_memory(t)}

    def mark(value: Any) -> Any:
        shares = _has_memory(value) and value.untyped_storage().data_ptr() in memory
        return value.as_subclass(_Copy) if shares else value

    return tree_map(mark, result) if memory else result


def _has_memory(t: Any) -> bool:
    return type(t) in (Tensor, _Copy) and not t.is_meta and t.layout == torch.strided and t.numel() > 0


def _values(value: Any, made: list[Tensor] | None = None) -> Any:
    """The values where a weight is meant; they are added to `made`."""
    if not isinstance(value, PackedWeight):
        return value
    values = value.layer.dequantize(value.dtype)
    if made is not None:
        made.append(values)
    return values


def _refuse_writing(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise where an in-place function, an `out=` or an attribute of the weight would be lost with the copy it wrote to."""
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    target = args[0] if args else next((kwargs[key] for key in ("self", "input", "tensor") if key in kwargs), None)
    written = [target] if in_place or name in ("__set__", "__delete__") else []
    if any(isinstance(leaf, PackedWeight | _Copy) for leaf in (*written, *tree_leaves(kwargs.get("out")))):
        raise ArgumentError(READ_ONLY)


def _on_the_kernel(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """`F.linear` without dequantizing, where the layer itself could have been called; else None."""
    if not isinstance(weight, PackedWeight) or type(input) is not Tensor or isinstance(bias, PackedWeight):
        return None
    if input.dtype not in FLOAT_DTYPES or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
        return None
    return weight.layer.product(input, bias)
