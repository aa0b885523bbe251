"""`PackedModule`: a quantized weight in plain buffers, packed for one kernel: what `QuantLinear` and stacked experts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import ArgumentError, QKernelsError, TensorError
from ..kernels.catalogue import OnUnsupported, Problem, arch_of, select
from ..layouts import LAYOUTS, empty_buffers, get_layout, unpack_checked
from ..scheme import QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor
from ..text import dtype_name, dtype_names
from .huge_pages import on_huge_pages
from .packing import Packing, as_tensor, read_packing

_PACKING = "_extra_state"
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedModule(nn.Module):
    """A weight `[N, K]`, or of `experts` `[E, N, K]`, in the buffers of a layout, with a bias `[N]` or `[E, N]` beside it.

    `state_dict`, `deepcopy`, pickling and `torch.compile` work as for any module. `.to(device)` re-lays the weight out where the
    other device's kernel reads another layout; `.to(dtype)` changes the dtype of activations and bias, never codes or scales.
    """

    _buffers: dict[str, Any]
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    k_order: Tensor | None
    bias: nn.Parameter | None
    experts: int = 0  # 0: one weight
    _own_orders: bool = False  # whether experts have orders of columns of their own

    def _describe(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        dtype: torch.dtype,
        on_unsupported: OnUnsupported,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.dtype = scheme, dtype
        self.on_unsupported: OnUnsupported = on_unsupported

    @property
    def _lead(self) -> tuple[int, ...]:
        return (self.experts,) if self.experts else ()

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*self._lead, self.out_features, self.in_features)

    def quant_tensor(self) -> QuantTensor:
        """The weight in canonical form, bit for bit what was packed."""
        return get_layout(self.layout).unpack(self.packed(), self.out_features, self.in_features, self.scheme)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[N, K]` (`[E, N, K]`) in `dtype` (that of the activations if None)."""
        return self.quant_tensor().dequantize(dtype or self.dtype)

    # --- packing and moving -------------------------------------------------------------------------------------------

    def _select(self, device: torch.device, dtype: torch.dtype) -> str:
        problem = Problem(
            self.out_features, self.in_features, self.scheme, dtype, arch_of(device), self.experts, self._own_orders
        )
        return select(problem, self.on_unsupported).layout

    def packed(self) -> dict[str, Any]:
        """The buffers that the kernel reads, by name; None where the weight does without one."""
        return {buffer.name: self._buffers[buffer.name] for buffer in get_layout(self.layout).buffers}

    def _set_buffers(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Take the buffers of `self.layout`, in the place of those that were there."""
        layout = get_layout(self.layout)
        self._numbers = layout.numbers_of(self.out_features, self.in_features, self.scheme)
        self._drop_buffers()
        with torch.inference_mode(False):
            device = next(t.device for t in buffers.values() if t is not None)
            # Under the name of a module's extra state, but a buffer: loaders that set tensors one by one find it, too. What is
            # absent comes last, because torch.export 2.13 miscounts buffers that come after an absent one.
            self.register_buffer(_PACKING, as_tensor(self._own_packing(), device))
            for buffer in sorted(layout.buffers, key=lambda buffer: buffers.get(buffer.name) is None):
                t = buffers.get(buffer.name)
                self.register_buffer(buffer.name, t.clone() if t is not None and t.is_inference() else t)
        self._device_type = self.qweight.device.type

    def _drop_buffers(self) -> None:
        for name in (*_buffer_names(), _PACKING):
            self._buffers.pop(name, None)

    def _pack(self, weight: QuantTensor, device: torch.device) -> None:
        packed = get_layout(self.layout).pack(weight)
        self._set_buffers({name: None if t is None else on_huge_pages(t.to(device)) for name, t in packed.items()})

    def _pack_parts(self, parts: Iterable[QuantTensor], device: torch.device) -> None:
        """`_pack` of a weight that comes in parts, rows after rows: one at a time lies unpacked in memory."""
        layout = get_layout(self.layout)
        tiles = -(-self.out_features // layout.rows_per_tile)
        whole: dict[str, Tensor | None] = {}
        done = 0
        for part in parts:
            if done % layout.rows_per_tile or done + part.N > self.out_features:
                raise ArgumentError(
                    f"parts of a weight of {self.out_features} rows must be whole tiles of {layout.rows_per_tile} rows but for "
                    f"the last, got {part.N} more after {done}"
                )
            made = layout.pack(part)
            first = done // layout.rows_per_tile
            for buffer in layout.buffers:
                t = made[buffer.name]
                if t is None or not buffer.tiled:
                    whole[buffer.name] = None if t is None else t.to(device)
                    continue
                if done == 0:
                    empty = torch.empty((tiles, *t.shape[1:]), dtype=t.dtype, device=device)
                    whole[buffer.name] = on_huge_pages(empty)
                kept = whole[buffer.name]
                assert kept is not None
                kept[first : first + len(t)].copy_(t)
            done += part.N
        if done != self.out_features:
            raise ArgumentError(f"parts of a weight of {self.out_features} rows have only {done} rows")
        self._set_buffers(whole)

    def _empty(self, scale_dtype: torch.dtype, ordered: bool, device: torch.device) -> dict[str, Tensor | None]:
        layout = get_layout(self.layout)
        N, K = self.out_features, self.in_features
        return empty_buffers(layout, N, K, self.scheme, scale_dtype, ordered, device, self._lead)

    def _relayout(self, layout: str, device: torch.device) -> None:
        weight = self.quant_tensor()
        self.layout = layout
        self._pack(weight, device)

    def _adopt_moved_buffers(self) -> None:
        """Something replaced the buffers behind our back (device hooks do): make the layout fit their new device."""
        device = self.qweight.device
        layout = self._select(device, self.dtype)
        if layout != self.layout:
            self._relayout(layout, device)
        self._device_type = device.type

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `fn` moves or casts. Casting must reach the bias but not the scales, whose dtype is that of their source: `fn` sees
        # the buffers as integers, which no float cast touches.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device))
        if probe.dtype == torch.float64:  # no kernel has it; x in float64 is refused, with words, by forward
            return self._apply(lambda t: _narrowed(fn(t)), recurse)
        if probe.dtype not in FLOAT_DTYPES:
            raise ArgumentError(
                f"a {type(self).__name__} computes in {dtype_names(FLOAT_DTYPES)} and cannot be cast to "
                f"{dtype_name(probe.dtype)}; cast the modules around it one by one, and x to one of these"
            )
        packed = self.packed()
        self._drop_buffers()
        super()._apply(fn, recurse)
        was, now = self._device_type, probe.device.type
        layout = self.layout if now in (was, "meta") else self._select(probe.device, probe.dtype)
        if layout == self.layout:
            self._set_buffers({name: None if t is None else _apply_bitwise(fn, t) for name, t in packed.items()})
        elif was == "meta":
            ordered = packed["k_order"] is not None
            self.layout = layout
            scale_dtype = packed["scales"].dtype if packed["scales"] is not None else probe.dtype
            self._set_buffers(self._empty(scale_dtype, ordered, probe.device))
        else:
            self._set_buffers(packed)
            self._relayout(layout, probe.device)
        self.dtype = probe.dtype
        return self

    # --- state dict ---------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take packed buffers from outside: validated first, re-laid out if they were packed for another device.

        They come together or not at all; the bias may come alone. With `assign=True` the layer takes the tensors themselves.
        """
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        given = {name: state_dict.get(prefix + name) for name in _buffer_names()}  # of whichever layout
        own = {prefix + name for name in (*given, "bias", _PACKING)}
        unexpected_keys += [k for k in state_dict if strict and k.startswith(prefix) and k not in own]
        absent = [name for name in ("qweight", "scales") if given[name] is None]
        missing_keys += [prefix + name for name in absent]
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            bias = self._checked_bias(state_dict.get(prefix + "bias"), prefix, missing_keys, unexpected_keys)
            if found := [name for name, t in given.items() if t is not None]:
                if absent:
                    raise TensorError(
                        f"the buffers of a packed weight are loaded together, got {', '.join(found)} without {', '.join(absent)}"
                    )
                self._check_reachable(given["qweight"], assign)
                self._load_packed(given, state_dict.get(prefix + _PACKING), assign)
        except QKernelsError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if bias is None or self.bias is None:
            return
        if assign:
            parameter = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
            parameter.requires_grad = self.bias.requires_grad
            self.bias = parameter
        else:
            with torch.no_grad():
                self.bias.copy_(bias)

    def _load_packed(self, given: Mapping[str, Tensor | None], state: Any, assign: bool) -> None:
        packing = read_packing(state) or self._own_packing()
        self._check_packing(packing)
        source = get_layout(packing.layout)
        given = source.upgraded(packing.version, given, self.out_features, self.in_features, self.scheme)
        weight = unpack_checked(source, given, self.out_features, self.in_features, self.scheme, self._lead)
        device, wanted = self.qweight.device, self.layout
        if assign:
            device = weight.device
            wanted = wanted if device.type == self._device_type else self._select(device, self.dtype)
        with torch.inference_mode(False):
            if packing.layout != wanted:
                self.layout = wanted
                self._pack(weight.to(device), device)
            elif assign:
                self._set_buffers({name: None if t is None else t.detach() for name, t in given.items()})
            else:
                own_copy = {name: None if t is None else t.detach().to(device).clone() for name, t in given.items()}
                self._set_buffers({name: None if t is None else on_huge_pages(t) for name, t in own_copy.items()})

    def _check_reachable(self, qweight: Any, assign: bool) -> None:
        """Raise where tensors would be copied from or to meta, which moves nothing."""
        if assign or not isinstance(qweight, Tensor) or qweight.is_meta == self.qweight.is_meta:
            return
        if qweight.is_meta:
            raise TensorError("the state dict is on meta and has no values to load")
        raise TensorError(
            "the layer is on meta, so a copy would load nothing; pass assign=True to load_state_dict, or call "
            "to_empty(device=…) first"
        )

    def _checked_bias(
        self, bias: Any, prefix: str, missing_keys: list[str], unexpected_keys: list[str]
    ) -> Tensor | None:
        """The bias to load, or None. One that nn.Linear would not load either is named."""
        if bias is None:
            missing_keys += [] if self.bias is None else [prefix + "bias"]
            return None
        if self.bias is None:
            unexpected_keys.append(prefix + "bias")
            return None
        if not isinstance(bias, Tensor) or bias.shape != self.bias.shape or bias.dtype not in FLOAT_DTYPES:
            got = f"{list(bias.shape)} {dtype_name(bias.dtype)}" if isinstance(bias, Tensor) else type(bias).__name__
            raise TensorError(f"bias must be {list(self.bias.shape)}, got {got}")
        return bias

    def _own_packing(self) -> Packing:
        return Packing(self.layout, get_layout(self.layout).version, str(self.scheme), self._shape)

    def _check_packing(self, packing: Packing) -> None:
        layout = get_layout(packing.layout)
        if not layout.reads(packing.version):
            raise TensorError(
                f"buffers were packed as {packing.layout} version {packing.version}, this qkernels reads version "
                f"{layout.version}; pack the checkpoint again (qkernels pack)"
            )
        want = (str(self.scheme), self._shape)
        if (packing.scheme, tuple(packing.shape)) != want:
            raise TensorError(
                f"buffers hold {packing.scheme} {list(packing.shape)}, this layer is {want[0]} {list(want[1])}"
            )


def _buffer_names() -> list[str]:
    """Of all layouts together."""
    return list(dict.fromkeys(buffer.name for layout in LAYOUTS.values() for buffer in layout.buffers))


def _narrowed(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.float64 else t


def _apply_bitwise(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    integers = t.view(_SAME_SIZE_INTEGER[t.element_size()])
    applied = fn(integers)
    # `Module.type` casts integers as well: what it does to the device is kept
    return applied.view(t.dtype) if applied.dtype == integers.dtype else t.to(applied.device)
