"""Checkpoints whose weights lie in a layout: the bytes that a kernel reads, written ahead of time.

| tensor       | content                                                                       |
|--------------|-------------------------------------------------------------------------------|
| qweight, scales, zeros, … | the buffers of `Layout.pack`, those that a weight can do without where there are any |
| weight_shape | int64 [..., N, K]                                                             |
| weight       | uint8 [0], as in the native format and for its reason                         |

`quantization_config`: that of the native format, with `layout` and `layout_version`. Every layout is a format of its own,
named after it, so that whatever reads, writes, converts and inspects formats does the same for packed checkpoints. A machine
whose kernels read another layout re-lays the weights out while it loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from ..errors import CheckpointError, ConversionError
from ..formats import Config, Format, Parsed, Written, native
from ..formats.validation import naming
from ..kernels.catalogue import REFERENCES
from ..layouts import LAYOUTS, Layout, unpack_checked
from ..scheme import QuantScheme
from ..tensor import QuantTensor


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


# One byte a code: nobody's kernel is faster for the references' layouts.
PACKED: Final[dict[str, Format]] = {
    layout.name: packed_format(layout)
    for layout in LAYOUTS.values()
    if layout.name not in {spec.layout for spec in REFERENCES}
}
