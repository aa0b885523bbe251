"""Checkpoints whose weights lie in a layout: the bytes that a kernel reads, written ahead of time.

| tensor       | content                                                                       |
|--------------|-------------------------------------------------------------------------------|
| qweight, scales, zeros, … | the buffers of `Layout.pack`, those that a weight can do without where there are any |
| weight_shape | int64 [..., N, K]                                                             |
| weight       | uint8 [0], as in the native format and for its reason                         |

`quantization_config`: that of the native format, with `layout` and `layout_version`, and `embeddings`: the modules that are
embeddings, if some lie packed. Every layout is a format of its own,
named after it, so that whatever reads, writes, converts and inspects formats does the same for packed checkpoints. A machine
whose kernels read another layout re-lays the weights out while it loads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, ConversionError
from ..factors import Factors
from ..formats import Config, Format, Parsed, Written, native
from ..formats.validation import naming
from ..kernels.catalogue import REFERENCES
from ..layouts import LAYOUTS, Layout, check_buffers, every_code_means_a_number, unpack_checked
from ..layouts.tiles import GROUPED, rows_of
from ..scheme import QuantScheme
from ..tensor import QuantTensor

EMBEDDINGS: Final = "embeddings"


def packed_format(layout: Layout) -> Format:
    """The format of checkpoints packed in `layout`; its name is that of the layout."""

    def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
        with naming(module):
            version = config.get("layout_version")
            if not layout.reads(version):
                raise CheckpointError(
                    f"it is packed in version {version!r} of layout {layout.name}, this qkernels reads version "
                    f"{layout.version}; pack the original checkpoint again (qkernels pack)"
                )
            scheme = native.scheme_of(module, config)
            native.check_guard(tensors)
            shape = native.weight_shape(tensors["weight_shape"])
            found = {buffer.name: tensors.get(buffer.name) for buffer in layout.buffers}
            buffers = layout.upgraded(version, found, shape[-2], shape[-1], scheme)
            return Parsed(unpack_checked(layout, buffers, shape[-2], shape[-1], scheme, tuple(shape[:-2])))

    def check(scheme: QuantScheme) -> None:
        # Asked for several groups: a scheme that the layout holds only for one is refused for all weights alike.
        if reasons := layout.reasons(8, 8 * scheme.group_length(8), scheme):
            raise ConversionError(f"layout {layout.name} cannot hold {scheme}: {'; '.join(reasons)}")

    def write(weight: QuantTensor) -> dict[str, Tensor]:
        check(weight.scheme)
        packed = {name: t for name, t in layout.pack(weight).items() if t is not None}
        return packed | {"weight_shape": native.shape_tensor(weight), native.GUARD: native.guard()}

    def config_of(written: Written) -> dict[str, Any]:
        for scheme in written.schemes:
            check(scheme)
        return native.config_of(written) | {"layout": layout.name, "layout_version": layout.version}

    return Format(
        name=layout.name,
        required=(*(buffer.name for buffer in layout.buffers if not buffer.optional), "weight_shape"),
        optional=(*(buffer.name for buffer in layout.buffers if buffer.optional), native.GUARD),
        matches=lambda config: config.get("quant_method") == native.METHOD and config.get("layout") == layout.name,
        parse=parse,
        write=write,
        config_of=config_of,
        stacks=True,
    )


def embedded(config: Config, format: Format, modules: Collection[str]) -> list[str]:
    """The modules that are embeddings, which only packed checkpoints have quantized.

    Raises:
        CheckpointError: the config names what is none of the quantized modules.
    """
    found = config.get(EMBEDDINGS, [])
    if format.name not in PACKED or found == []:
        return []
    if not isinstance(found, list) or not all(isinstance(name, str) and name in modules for name in found):
        raise CheckpointError(f"quantization_config.{EMBEDDINGS} must be names of quantized modules, got {found!r:.80}")
    return list(dict.fromkeys(found))


class Ready(NamedTuple):
    """The buffers of a weight `(N, K)` as the kernels of a layout read them, all their values checked."""

    layout: str
    buffers: dict[str, Tensor | None]
    shape: tuple[int, int]
    scheme: QuantScheme


def ready(format: Format, module: str, tensors: Mapping[str, Tensor], config: Config) -> Ready | None:
    """What `parse` of a packed format would take apart and `QuantLinear` put together again, of a layout of the CPU's kernels.

    None where more than scales and zeros has to be looked at: an older version, stacked experts, an order of columns, padding,
    codes that leave bits or mean infinity, scales that hang together.

    Raises:
        CheckpointError: as `parse`.
    """
    layout = LAYOUTS[format.name]
    others = {"k_order", "x_static"} & tensors.keys()
    if layout.backend != "cpu" or config.get("layout_version") != layout.version or others:
        return None
    with naming(module):
        scheme, shape = native.scheme_of(module, config), native.weight_shape(tensors["weight_shape"])
        if len(shape) != 2 or scheme.rows > 1 or scheme.group_size == "tensor":
            return None
        N, K = shape
        if not every_code_means_a_number(layout, N, K, scheme) or N % layout.rows_per_tile:
            return None
        native.check_guard(tensors)
        found = {buffer.name: tensors.get(buffer.name) for buffer in layout.buffers}
        check_buffers(layout, found, N, K, scheme)
        _check_groups(found, N, K, scheme)
    return Ready(layout.name, found, (N, K), scheme)


def _check_groups(buffers: Mapping[str, Tensor | None], N: int, K: int, scheme: QuantScheme) -> None:
    """Raise TensorError unless some codes and these scales and zeros are a weight."""
    if scheme.factors is not None:
        small, outer = buffers["scales"], buffers["outer_scales"]
        assert small is not None
        assert outer is not None
        Factors(small, outer, buffers.get("zeros"), buffers.get("outer_zeros")).check_values(scheme)
        return
    groups = {name: rows_of(t) for name in GROUPED if (t := buffers.get(name)) is not None}
    G = scheme.num_groups(K)
    of_one = replace(scheme, group_size=1)  # a weight of one code for each group
    codes = torch.zeros(N, G, dtype=torch.uint8)
    QuantTensor(codes, groups["scales"], groups.get("zeros"), None, of_one)


# One byte a code: nobody's kernel is faster for the references' layouts.
PACKED: Final[dict[str, Format]] = {
    layout.name: packed_format(layout)
    for layout in LAYOUTS.values()
    if layout.name not in {spec.layout for spec in REFERENCES}
}
