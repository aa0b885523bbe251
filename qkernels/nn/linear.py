"""`QuantLinear`: a drop-in for `nn.Linear` whose weight is packed for one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from .. import ops
from ..errors import ArgumentError, QKernelsError, TensorError
from ..kernels.catalogue import OnUnsupported, Problem, arch_of, select
from ..layouts import LAYOUTS, empty_buffers, get_layout, unpack_checked
from ..quantizers import RTN, Options
from ..scheme import QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor, as_dtype
from ..text import dtype_name, dtype_names
from .huge_pages import on_huge_pages
from .packing import Packing, as_tensor, read_packing
from .pretrained import mind_save_pretrained
from .weight import READ_ONLY, PackedWeight

_PACKING = "_extra_state"
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        dtype: torch.dtype | str | None = None,
        ordered: bool = False,
        on_unsupported: OnUnsupported = "raise",
        layout: str | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device) if device is not None else torch.get_default_device()
        dtype = as_dtype(dtype) if dtype is not None else torch.get_default_dtype()
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
        dtype: torch.dtype | str | None = None,
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
        dtype = as_dtype(dtype)
        problem = Problem(weight.N, weight.K, weight.scheme, dtype, arch_of(device))
        layer = cls.__new__(cls)  # without empty buffers to be replaced at once
        nn.Module.__init__(layer)
        layer._describe(weight.K, weight.N, weight.scheme, dtype, on_unsupported)
        layer.layout = select(problem, on_unsupported).layout
        with torch.inference_mode(False):  # tensors made in it could neither be trained through nor loaded into outside
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
        try:
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
                y = self._checked_product(rows, self.bias)
            return y if flat else y.view(*x.shape[:-1], self.out_features)
        except TraceError:  # the `if` on a symbolic x; no test of x for it, since entering `try` costs nothing
            return self._as_leaf(x)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with another bias, or none: what `F.linear(x, layer.weight, bias)` is."""
        rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        return self._checked_product(rows, bias).view(*x.shape[:-1], self.out_features)

    def _checked_product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return ops.gemm(
            self.layout, rows, **self.packed(), bias=bias,
            in_features=self.in_features, out_features=self.out_features, scheme=self.scheme,
        )  # fmt: skip

    def _as_leaf(self, x: Any) -> Tensor:
        """What `torch.fx.symbolic_trace` records for torch's own layers: a call of the module. Hooks around `forward` were traced
        by now, and would run again with the module."""
        if self._forward_hooks or self._forward_pre_hooks:
            raise ArgumentError("torch.fx cannot trace a QuantLinear with forward hooks; trace first, then add them")
        for node in list(reversed(x.node.graph.nodes))[:2]:  # x.dim() == 2, which nobody asks for any more
            x.node.graph.erase_node(node)
        y: Tensor = x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        return y

    @property
    def weight(self) -> Tensor:
        """The weight `[N, K]` for code that looks at one instead of calling the layer: read-only, with the dtype of activations.

        Its shape, dtype and device cost no memory; its values are dequantized for each use and not kept (`PackedWeight`).
        `parameters()` and the state dict do not know it.
        """
        if torch.compiler.is_compiling():  # a plain op, which the graph drops where nobody uses its values
            values: Tensor = ops.dequantize(
                self.layout, **self.packed(), in_features=self.in_features, out_features=self.out_features,
                scheme=self.scheme, dtype=self.dtype,
            )  # fmt: skip
            return values
        return PackedWeight(self, self._buffers["qweight"].device)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise ArgumentError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module.

        Raises:
            ArgumentError: for "weight", which is packed.
        """
        if name == "weight":
            raise ArgumentError(READ_ONLY)
        super().register_parameter(name, param)

    def quant_tensor(self) -> QuantTensor:
        """The weight in canonical form, bit for bit what was packed."""
        return get_layout(self.layout).unpack(self.packed(), self.out_features, self.in_features, self.scheme)

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
            # Under the name of a module's extra state, but a buffer: loaders that set tensors one by one find it, too. First,
            # because torch.export 2.13 miscounts buffers that come after an absent one.
            self.register_buffer(_PACKING, as_tensor(self._own_packing(), device))
            for buffer in layout.buffers:
                t = buffers.get(buffer.name)
                self.register_buffer(buffer.name, t.clone() if t is not None and t.is_inference() else t)
        self._device_type = self.qweight.device.type

    def _drop_buffers(self) -> None:
        for name in (*_buffer_names(), _PACKING):
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
        if probe.dtype == torch.float64:  # no kernel has it; x in float64 is refused, with words, by forward
            return self._apply(lambda t: _narrowed(fn(t)), recurse)
        if probe.dtype not in FLOAT_DTYPES:
            raise ArgumentError(
                f"a QuantLinear computes in {dtype_names(FLOAT_DTYPES)} and cannot be cast to {dtype_name(probe.dtype)}; "
                f"cast the modules around it one by one, and x to one of these"
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
            error_msgs.append(f"{prefix.rstrip('.') or 'QuantLinear'}: {error}")
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
        weight = unpack_checked(source, given, self.out_features, self.in_features, self.scheme)
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
        return Packing(
            self.layout, get_layout(self.layout).version, str(self.scheme), (self.out_features, self.in_features)
        )

    def _check_packing(self, packing: Packing) -> None:
        layout = get_layout(packing.layout)
        if not layout.reads(packing.version):
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


def _narrowed(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.float64 else t


def _apply_bitwise(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    integers = t.view(_SAME_SIZE_INTEGER[t.element_size()])
    applied = fn(integers)
    # `Module.type` casts integers as well: what it does to the device is kept
    return applied.view(t.dtype) if applied.dtype == integers.dtype else t.to(applied.device)
