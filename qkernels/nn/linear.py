"""`QuantLinear`: a drop-in for `nn.Linear` whose weight is packed for one kernel."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ArgumentError, QKernelsError, TensorError
from ..kernels.catalogue import OnUnsupported, Problem, arch_of, select
from ..layouts import LAYOUTS, empty_buffers, get_layout, unpack_checked
from ..quantizers import RTN, Options
from ..scheme import QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor
from .huge_pages import on_huge_pages
from .pretrained import mind_save_pretrained

_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Packing(NamedTuple):
    """How the buffers were packed; travels in the state dict as JSON bytes, so that another device can re-lay them out."""

    layout: str
    version: int
    scheme: str
    shape: tuple[int, int]


class QuantLinear(nn.Module):
    """`y = x W^T + bias` with a quantized `W` of `[out_features, in_features]`.

    The weight lives in plain buffers, so `state_dict`, `deepcopy`, pickling and `torch.compile` work as for any module.
    `.to(device)` re-lays it out where the other device's kernel reads another layout; `.to(dtype)` changes the dtype of
    activations and bias, never codes or scales.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        scheme: a `QuantScheme` or its short form.
        device: where the buffers live.
        dtype: of activations and bias; the default dtype if None.
        ordered: leave room for an act-order column index.
        on_unsupported: "raise", or "reference" to allow the plain-PyTorch kernel.
        layout: how to lay the weight out; the catalogue's first fit for `device` if None.

    Raises:
        SchemeError: `scheme` is not one.
        UnsupportedProblem: no kernel takes it; lists the reasons.

    >>> import torch
    >>> from qkernels import QuantLinear
    >>> layer = QuantLinear.from_linear(torch.nn.Linear(256, 128), "w4a16_g64")
    >>> layer(torch.zeros(2, 3, 256)).shape
    torch.Size([2, 3, 128])
    >>> weight = layer.quant_tensor()  # in canonical form, bit for bit what was packed
    >>> str(weight.scheme), torch.equal(weight.dequantize(), layer.dequantize())
    ('w4a16_g64', True)
    """

    _buffers: dict[str, Any]
    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    k_order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: QuantScheme | str = "w4a16_g128",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ordered: bool = False,
        on_unsupported: OnUnsupported = "raise",
        layout: str | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device) if device is not None else torch.get_default_device()
        dtype = dtype or torch.get_default_dtype()
        self._describe(in_features, out_features, QuantScheme.parse(scheme), dtype, on_unsupported)
        self.layout = layout or self._select(device, dtype)
        self._set_buffers(self._empty(dtype if dtype.itemsize == 2 else torch.float32, ordered, device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_quant_tensor(
        cls,
        weight: QuantTensor,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        on_unsupported: OnUnsupported = "raise",
    ) -> QuantLinear:
        """Pack a quantized weight `[N, K]` for the kernel of `device` (that of the weight if None).

        Args:
            weight: the weight; stacked experts are not taken here.
            bias: None or `[N]`.
            dtype: of activations and bias; that of the bias, else of 16-bit scales, else the default dtype.
        """
        if weight.codes.dim() != 2:
            raise ArgumentError(f"QuantLinear takes one [N, K] weight, got codes of shape {list(weight.codes.shape)}")
        if bias is not None and list(bias.shape) != [weight.N]:
            raise ArgumentError(f"bias must be [N] = [{weight.N}], got {list(bias.shape)}")
        if dtype is None:
            scales = weight.scales.dtype
            dtype = bias.dtype if bias is not None else scales if scales.itemsize == 2 else torch.get_default_dtype()
        device = torch.device(device) if device is not None else weight.device
        problem = Problem(weight.N, weight.K, weight.scheme, dtype, arch_of(device))
        layer = cls.__new__(cls)  # without empty buffers to be replaced at once
        nn.Module.__init__(layer)
        layer._describe(weight.K, weight.N, weight.scheme, dtype, on_unsupported)
        layer.layout = select(problem, on_unsupported).layout
        layer._pack(weight, device)
        layer.bias = None
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device, dtype).clone(), requires_grad=bias.requires_grad)
        return layer

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
        mind_save_pretrained(QuantLinear)

    @staticmethod
    def check_supported(linear: nn.Linear, scheme: QuantScheme, on_unsupported: OnUnsupported = "raise") -> None:
        """Raise `UnsupportedProblem` if no kernel would take this layer under `scheme`."""
        weight = linear.weight
        select(
            Problem(linear.out_features, linear.in_features, scheme, weight.dtype, arch_of(weight.device)),
            on_unsupported,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: QuantScheme | str,
        method: Options | None = None,
        on_unsupported: OnUnsupported = "raise",
        name: str = "weight",
    ) -> QuantLinear:
        """Quantize a float layer without calibration data.

        Args:
            linear: the layer; its device and dtype are kept.
            scheme: a `QuantScheme` or its short form.
            method: how to round; `RTN()` if None. `NF4(double_quant=True)` for a codebook whose scales are rounded, too.
            name: how error messages call the weight.

        Raises:
            ArgumentError: the weight has NaN or infinite entries.
            UnsupportedProblem: no kernel takes the scheme.
        """
        weight = (method or RTN()).with_scheme(scheme).quantize(linear.weight.detach().contiguous(), name=name)
        return cls.from_quant_tensor(weight, linear.bias, linear.weight.device, linear.weight.dtype, on_unsupported)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]` in x's dtype (under autocast: in autocast's)."""
        buffers = self._buffers  # `self.qweight` would be looked up in Python, 0.5 us each
        device = buffers["qweight"].device
        device_type = device.type
        if device_type != self._device_type:
            self._adopt_moved_buffers()
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        flat = x.dim() == 2
        rows = x if flat else x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        if rows.shape[1] == self.in_features and rows.dtype in FLOAT_DTYPES and rows.device == device:
            y = ops.call(ops.GEMM[self.layout], rows, buffers, self.bias, self._numbers)
        else:  # says what is wrong
            y = ops.gemm(
                self.layout, rows, **self._packed(), bias=self.bias,
                in_features=self.in_features, out_features=self.out_features, scheme=self.scheme,
            )  # fmt: skip
        return y if flat else y.view(*x.shape[:-1], self.out_features)

    def quant_tensor(self) -> QuantTensor:
        """The weight in canonical form, bit for bit what was packed."""
        return get_layout(self.layout).unpack(self._packed(), self.out_features, self.in_features, self.scheme)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[N, K]` in `dtype` (that of the activations if None)."""
        return self.quant_tensor().dequantize(dtype or self.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, layout={self.layout}"
        )

    # --- packing and moving -------------------------------------------------------------------------------------------

    def _select(self, device: torch.device, dtype: torch.dtype) -> str:
        problem = Problem(self.out_features, self.in_features, self.scheme, dtype, arch_of(device))
        return select(problem, self.on_unsupported).layout

    def _packed(self) -> dict[str, Any]:
        return {buffer.name: self._buffers[buffer.name] for buffer in get_layout(self.layout).buffers}

    def _set_buffers(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Take the buffers of `self.layout`, in the place of those that were there."""
        layout = get_layout(self.layout)
        self._numbers = layout.numbers_of(self.out_features, self.in_features, self.scheme)
        self._drop_buffers()
        for buffer in layout.buffers:
            self.register_buffer(buffer.name, buffers.get(buffer.name))
        self._device_type = self.qweight.device.type

    def _drop_buffers(self) -> None:
        for name in _buffer_names():
            self._buffers.pop(name, None)

    def _pack(self, weight: QuantTensor, device: torch.device) -> None:
        packed = get_layout(self.layout).pack(weight)
        self._set_buffers({name: None if t is None else on_huge_pages(t.to(device)) for name, t in packed.items()})

    def _empty(self, scale_dtype: torch.dtype, ordered: bool, device: torch.device) -> dict[str, Tensor | None]:
        layout = get_layout(self.layout)
        return empty_buffers(layout, self.out_features, self.in_features, self.scheme, scale_dtype, ordered, device)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # `fn` moves or casts. Casting must reach the bias but not the scales, whose dtype is that of their source: `fn` sees
        # the buffers as integers, which no float cast touches.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device))
        packed = self._packed()
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
        if probe.dtype.is_floating_point:
            self.dtype = probe.dtype
        return self

    # --- state dict ---------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The packing as JSON in a uint8 tensor: safetensors stores nothing but tensors."""
        return torch.tensor(list(json.dumps(self._own_packing()._asdict()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Present for `nn.Module`'s sake; `_load_from_state_dict` reads it together with the buffers."""

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
        """Take packed buffers from outside: validated first, re-laid out if they were packed for another device."""
        names = _buffer_names()
        given = {name: state_dict.get(prefix + name) for name in names}  # of whichever layout
        own = {prefix + name for name in (*names, "bias", "_extra_state")}
        unexpected_keys += [k for k in state_dict if strict and k.startswith(prefix) and k not in own]
        if given["qweight"] is None or given["scales"] is None:
            missing_keys += [prefix + name for name in ("qweight", "scales") if given[name] is None]
            return
        try:
            packing = _read_packing(state_dict.get(prefix + "_extra_state")) or self._own_packing()
            self._check_packing(packing)
            source = get_layout(packing.layout)
            weight = unpack_checked(source, given, self.out_features, self.in_features, self.scheme)
            bias = self._checked_bias(state_dict.get(prefix + "bias"), prefix, missing_keys, unexpected_keys)
        except QKernelsError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'QuantLinear'}: {error}")
            return
        device = self.qweight.device
        if packing.layout == self.layout:
            own_copy = {name: None if t is None else t.detach().to(device).clone() for name, t in given.items()}
            self._set_buffers({name: None if t is None else on_huge_pages(t) for name, t in own_copy.items()})
        else:
            self._pack(weight.to(device), device)
        if bias is not None and self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)

    def _checked_bias(
        self, bias: Tensor | None, prefix: str, missing_keys: list[str], unexpected_keys: list[str]
    ) -> Tensor | None:
        if bias is None and self.bias is not None:
            missing_keys.append(prefix + "bias")
        elif bias is not None and self.bias is None:
            unexpected_keys.append(prefix + "bias")
        elif bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            raise TensorError(f"bias must be {list(self.bias.shape)}, got {list(bias.shape)}")
        return bias

    def _own_packing(self) -> Packing:
        return Packing(
            self.layout, get_layout(self.layout).version, str(self.scheme), (self.out_features, self.in_features)
        )

    def _check_packing(self, packing: Packing) -> None:
        layout = get_layout(packing.layout)
        if packing.version != layout.version:
            raise TensorError(
                f"buffers were packed as {packing.layout} version {packing.version}, this qkernels reads version "
                f"{layout.version}; pack the checkpoint again (qkernels pack)"
            )
        want = (str(self.scheme), (self.out_features, self.in_features))
        if (packing.scheme, tuple(packing.shape)) != want:
            raise TensorError(
                f"buffers hold {packing.scheme} {list(packing.shape)}, this layer is {want[0]} {list(want[1])}"
            )


def _buffer_names() -> list[str]:
    """Of all layouts together."""
    return list(dict.fromkeys(buffer.name for layout in LAYOUTS.values() for buffer in layout.buffers))


def _apply_bitwise(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return fn(t.view(_SAME_SIZE_INTEGER[t.element_size()])).view(t.dtype)


def _read_packing(state: Any) -> Packing | None:
    """The packing stored beside the buffers, or None where an older or hand-made state dict has none."""
    if state is None:
        return None
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1 or state.numel() > 4096:
        raise TensorError("the extra state of a QuantLinear must be JSON in a uint8 tensor of at most 4096 bytes")
    try:
        fields = json.loads(bytes(state.tolist()))
        layout, version, scheme, (N, K) = (fields[name] for name in Packing._fields)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TensorError(
            f"the extra state of a QuantLinear must be JSON with {', '.join(Packing._fields)}: {error}"
        ) from None
    return Packing(str(layout), int(version), str(scheme), (int(N), int(K)))
