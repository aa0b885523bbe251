"""`QuantLinear`: a drop-in for `nn.Linear` whose weight is packed for one kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from .. import ops
from ..errors import ArgumentError
from ..kernels.catalogue import OnUnsupported, Problem, arch_of, select
from ..quantizers import RTN, Options
from ..scheme import QuantScheme
from ..tensor import FLOAT_DTYPES, QuantTensor, as_dtype
from .huge_pages import on_huge_pages
from .packed import PackedModule
from .pretrained import mind_save_pretrained
from .weight import READ_ONLY, PackedWeight


class QuantLinear(PackedModule):
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
        mind_save_pretrained(PackedModule)
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
        layer = cls._unpacked(weight.N, weight.K, weight.scheme, device, dtype, on_unsupported)
        with torch.inference_mode(False):  # tensors made in it could neither be trained through nor loaded into outside
            layer._pack(weight, device)
            layer._set_bias(bias, device, dtype)
        return layer

    @classmethod
    def from_parts(
        cls,
        parts: Iterable[QuantTensor],
        out_features: int,
        device: torch.device | str,
        dtype: torch.dtype | str,
        on_unsupported: OnUnsupported = "raise",
        bias: Tensor | None = None,
    ) -> QuantLinear:
        """`from_quant_tensor` of a weight that comes in parts: one at a time lies unpacked in memory.

        Args:
            parts: `[n, K]`, rows after rows, of one scheme and without a group index; n a multiple of 64 but for the last.
            out_features: rows of all.
            device, dtype, on_unsupported, bias: as there.

        Raises:
            ArgumentError: there is no part, one is no whole number of the layout's tiles, or their rows are not `out_features`.
            UnsupportedProblem: no kernel takes the weight.
        """
        rest = iter(parts)
        first = next(rest, None)
        if first is None:
            raise ArgumentError(f"a weight of {out_features} rows has no part")
        device, dtype = torch.device(device), as_dtype(dtype)
        layer = cls._unpacked(out_features, first.K, first.scheme, device, dtype, on_unsupported)
        with torch.inference_mode(False):
            layer._pack_parts(chain([first], rest), device)
            layer._set_bias(bias, device, dtype)
        return layer

    def _set_bias(self, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(device, dtype).clone(), requires_grad=bias.requires_grad)

    @classmethod
    def from_buffers(
        cls,
        layout: str,
        buffers: Mapping[str, Tensor | None],
        shape: tuple[int, int],
        scheme: QuantScheme,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        on_unsupported: OnUnsupported = "raise",
    ) -> QuantLinear | None:
        """A layer of buffers that are checked and lie in memory as `layout` packs a weight `(N, K)` of that shape; None where the
        kernel of `device` reads another layout.

        Raises:
            UnsupportedProblem: no kernel takes the weight.
        """
        layer = cls._unpacked(*shape, scheme, device, dtype, on_unsupported)
        if layer.layout != layout:
            return None
        with torch.inference_mode(False):
            layer._set_buffers({n: None if t is None else on_huge_pages(t.to(device)) for n, t in buffers.items()})
            layer._set_bias(bias, device, dtype)
        return layer

    @classmethod
    def _unpacked(
        cls,
        N: int,
        K: int,
        scheme: QuantScheme,
        device: torch.device,
        dtype: torch.dtype,
        on_unsupported: OnUnsupported,
    ) -> QuantLinear:
        """A layer that is told what it holds, and has no buffer yet."""
        problem = Problem(N, K, scheme, dtype, arch_of(device))
        layer = cls.__new__(cls)  # without empty buffers to be replaced at once
        nn.Module.__init__(layer)
        mind_save_pretrained(PackedModule)
        layer._describe(K, N, scheme, dtype, on_unsupported)
        layer.layout = select(problem, on_unsupported).layout
        return layer

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
        buffers = self._buffers
        device = buffers["qweight"].device
        known = bias is None or (
            bias.shape == (self.out_features,) and bias.dtype in FLOAT_DTYPES and bias.device == device
        )
        here = rows.device == device and device.type == self._device_type
        if (
            known and here and rows.shape[1] == self.in_features and rows.dtype in FLOAT_DTYPES
        ):  # 30 us a call instead of 105
            y = ops.call(ops.GEMM[self.layout], rows, buffers, bias, self._numbers)
        else:
            y = self._checked_product(rows, bias)
        return y.view(*x.shape[:-1], self.out_features)

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

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, layout={self.layout}"
        )
