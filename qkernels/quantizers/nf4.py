"""NF4 (and FP4): codes are indices into a table of 16 values, spaced as a normal distribution's quantiles. No calibration.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs" (2023). Section numbers below are
that paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError, SchemeError
from ..scheme import GroupSize
from ..tensor import QuantTensor
from .grid import Grid, assemble, checked_weight, fit, nearest, stored_dtype
from .options import Options

# Scales that share a second scale (section 3, "Double Quantization").
NESTED_BLOCK = 256


@dataclass(frozen=True)
class NF4(Options):
    """NF4. Options as in `Options` (groups of 64, as in the paper; `codebook="fp4"` is the other table), and:

    Args:
        double_quant: scales are rounded to 8 bits in blocks of 256, after their mean was taken out. The `QuantTensor` holds
            the scales that come out, in fp32: the error is that of double quantization, the bytes are not saved, because
            no format written here has a spelling for nested scales.

    Raises:
        SchemeError, ArgumentError: an option is out of range.

    >>> import torch
    >>> from qkernels import NF4
    >>> weight = NF4(double_quant=True).quantize(torch.randn(8, 128))
    >>> str(weight.scheme), weight.scales.dtype
    ('nf4_g64', torch.float32)
    """

    integer_zeros: ClassVar[bool] = False

    group_size: GroupSize = 64
    codebook: str | None = "nf4"
    double_quant: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook is None:
            raise SchemeError(f"NF4 needs a codebook (nf4_g64, fp4_g64), got {self.scheme}; RTN takes any scheme")
        if not isinstance(self.double_quant, bool):
            raise ArgumentError(f"double_quant must be True or False, got {self.double_quant!r}")
        if self.double_quant and (self.scale_dtype not in (None, torch.float32) or self.clip != "none"):
            raise ArgumentError(
                f"double_quant gives float32 scales of the full range: it takes scale_dtype=None or torch.float32 and "
                f'clip="none", got {self.scale_dtype} and {self.clip!r}'
            )
        if self.double_quant and self.group_size == "tensor":
            raise ArgumentError("double_quant needs several scales, got group_size='tensor'")

    def with_scales_for(self, dtype: torch.dtype) -> NF4:
        """Double quantization has fp32 scales, whatever the weight."""
        return self if self.double_quant else super().with_scales_for(dtype)

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """Quantize a weight `[..., N, K]` (leading dimensions are experts): absmax scales, nearest table entry (section 2).

        Codes are chosen for the scale as it is stored, also after double quantization; bitsandbytes chooses them before.

        Args:
            weight: floating, on any device; a meta tensor gives the shapes and dtypes of the result.
            moments: not looked at.
            name: how error messages call it.

        Raises:
            ArgumentError: the weight is not floating `[..., N, K]`, or has NaN or infinite entries.
        """
        values = checked_weight(weight, name)
        scheme = self.scheme
        if not self.double_quant:
            scale_dtype = stored_dtype(weight, self.scale_dtype, self.scheme)
            grid = fit(values, scheme, scale_dtype, self.clip)
            return assemble(nearest(values, grid, scheme), grid, scheme, scale_dtype)
        length = scheme.group_length(values.shape[-1])
        width = scheme.num_groups(values.shape[-1]) * length
        largest = pad(values.abs(), (0, width - values.shape[-1])).unflatten(-1, (-1, length)).amax(-1).float()
        scales = largest if largest.is_meta else twice_quantized(largest)
        # the offset can take a small scale to 0: then the weights are, as for an all-zero group
        grid = Grid(torch.where(scales == 0, torch.ones_like(scales), scales).to(values.dtype), None)
        return assemble(nearest(values, grid, scheme), grid, scheme, torch.float32)


def twice_quantized(scales: Tensor) -> Tensor:
    """fp32 scales of any shape, as they come out of double quantization (section 3).

    The mean is taken out; blocks of 256 scales, as they lie in memory, are divided by their largest magnitude; each is
    replaced by the nearest entry of `dynamic_map` (bitsandbytes' 8-bit code). The error of a scale is at most half of the
    table's widest gap, 0.9 / 128 (the bins between 0.1 and 1 for 64 fractions, 0.9 / 64, halved), times the block's largest.
    """
    flat = scales.float().flatten()
    offset = flat.mean()
    blocks = pad(flat - offset, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    table = dynamic_map().to(flat.device)
    relative = blocks * (1 / torch.where(largest == 0, torch.ones_like(largest), largest))
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2)
    return ((table[codes] * largest).flatten()[: len(flat)] + offset).view(scales.shape)


def dynamic_map() -> Tensor:
    """fp32 `[256]`, sorted: the signed dynamic data type of bitsandbytes (Dettmers 2015, "8-Bit Approximations for Parallelism
    in Deep Learning", section 2): for e = 0 … 6, 2^e fractions in the middle of equal parts of [0.1, 1], times 10^(e - 6),
    of both signs; 0; 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [sign * middle for middle in middles for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float32)
