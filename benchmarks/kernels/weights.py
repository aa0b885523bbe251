"""Random quantized weights, for single layers and for whole models."""

from __future__ import annotations

from dataclasses import replace

import torch

from qkernels.formats.gguf import gguf_blocks, weight_of
from qkernels.quantizers import RTN
from qkernels.scheme import QuantScheme
from qkernels.tensor import QuantTensor

from ..peers.ggml import type_of


def random_weight(
    N: int, K: int, scheme: QuantScheme, dtype: torch.dtype, seed: int | None = 0, device: torch.device | None = None,
    centred: bool = False,
) -> QuantTensor:  # fmt: skip
    """A weight `[N, K]` of random codes, about 1 / sqrt(K) in size; never made from a float weight, which would not fit.

    Scales are bf16 and fp16 numbers at once, so that every peer can hold the values exactly.

    Args:
        N, K, scheme: of the weight.
        dtype: of the scales (fp32 activations: bf16).
        seed: of a generator of its own; None takes torch's, so that layers of a model differ.
        device: where it is made; None: the CPU.
        centred: for whole models (symmetric schemes). One scale, and no code 0, so that the codes' mean is the zero point. A mean
            weight would pull all outputs the same way, layer after layer, until the logits no longer depend on anything and
            comparing them proves nothing.
    """
    generator = None if seed is None else torch.Generator(device or "cpu").manual_seed(seed)
    if scheme.codebook is not None or scheme.factors is not None:  # what a quantizer makes of a normal weight
        normal, block = torch.randn(N, K, generator=generator, device=device) * K**-0.5, type_of(scheme)
        if block is not None:
            return replace(weight_of(gguf_blocks(normal, block), block), scheme=scheme)
        return replace(RTN().with_scheme(replace(scheme, act=None)).quantize(normal), scheme=scheme)
    first = 1 if centred else 0
    codes = torch.randint(first, scheme.max_code + 1, (N, K), generator=generator, dtype=torch.uint8, device=device)
    shape = (N, 1 if scheme.group_size in ("channel", "tensor") else scheme.num_groups(K))
    if centred:
        return QuantTensor(
            codes, torch.full(shape, 2.0 / scheme.max_code * K**-0.5, dtype=dtype, device=device), None, None, scheme
        )
    scales = 0.5 + torch.rand(shape, generator=generator, device=device)
    scales = (scales * 2.0 ** -round(scheme.bits + 0.5 * K.bit_length())).bfloat16()
    scales = scales.to(dtype if dtype.itemsize == 2 else torch.bfloat16)
    zeros = None
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, shape, generator=generator, dtype=torch.uint8, device=device)
        if scheme.zeros != "int":
            zeros = zeros.to(scales.dtype) if scheme.zeros == "float" else -zeros * scales
    return QuantTensor(codes, scales, zeros, None, scheme)
