"""AWQ files of the kinds "gemv" and "gemv_fast" (llm-awq writes the latter too), read only; 4 bits.

| tensor (gemv)       | dtype | shape       | content                                                                  |
|---------------------|-------|-------------|--------------------------------------------------------------------------|
| qweight             | int32 | [N, K / 8]  | codes, Stream(4) along K                                                 |
| qzeros              | int32 | [N, ZW]     | zero points, Stream(4) along the groups                                  |
| scales              | fp16  | [N, 8 * ZW] | columns from G on are padding                                            |

| tensor (gemv_fast)  | dtype | shape       | content                                                                  |
|---------------------|-------|-------------|--------------------------------------------------------------------------|
| qweight             | int16 | [N / 4, K]  | four rows interleaved, see below                                         |
| qzeros              | fp16  | [8 * ZW, N] | -scale * zero, rounded                                                   |
| scales              | fp16  | [8 * ZW, N] | rows from G on are padding                                               |

ZW = ceil(G / 8), rounded up to a multiple of 1 for groups of 128 and more, 2 for 64, 4 for 32.

gemv_fast: code (n, k) is in row n // 4, in the 64 words that belong to k // 64 at word 16 * (n % 4) + (k' % 64) // 4, nibble
k' % 4, where within 32 columns k = 8a + 2b + c moves to k' = 8b + 4c + a. Its zero points are recovered as
round(-qzeros / scale) and then verified: -scale * zero must round to the very qzeros of the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..scheme import QuantScheme
from ..tensor import QuantTensor
from . import Config, Format, Parsed, awq
from .bitstream import unpack
from .validation import check_float, check_scales, expect, first_of, naming

_ZERO_WORDS = {64: 2, 32: 4}  # ZW is a multiple of these


def parse_gemv(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module of the kind gemv; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field.
    """
    with naming(module):
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight must be [N, K / 8], got {list(qweight.shape)}")
        N, K = qweight.shape[0], qweight.shape[1] * 8
        scheme, words = _geometry(K, config)
        G, why = scheme.num_groups(K), f"N={N}, K={K}, group_size {scheme.group_size}"
        expect("qweight", qweight, (torch.int32,), (N, K // 8))
        expect("qzeros", qzeros, (torch.int32,), (N, words), why)
        check_float("scales", scales, (N, 8 * words), why)
        used = scales[:, :G].contiguous()
        check_scales(used)
        weight = QuantTensor(unpack(qweight, 4, K), used, unpack(qzeros, 4, G), None, scheme)
        return Parsed(weight, awq.denied_zeros(config))


def parse_gemv_fast(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    """Read one module of the kind gemv_fast; see the head of this file for `tensors`.

    Raises:
        CheckpointError: naming the module and the field; also where qzeros are no multiples of the scales.
    """
    with naming(module):
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        if qweight.dim() != 2:
            raise CheckpointError(f"qweight must be [N / 4, K], got {list(qweight.shape)}")
        N, K = qweight.shape[0] * 4, qweight.shape[1]
        if K % 64:
            raise CheckpointError(f"K={K} must be a multiple of 64 in a gemv_fast file")
        scheme, words = _geometry(K, config)
        G, why = scheme.num_groups(K), f"N={N}, K={K}, group_size {scheme.group_size}"
        expect("qweight", qweight, (torch.int16,), (N // 4, K))
        check_float("scales", scales, (8 * words, N), why)
        expect("qzeros", qzeros, (scales.dtype,), (8 * words, N), why)
        used = scales[:G].T.contiguous()
        check_scales(used)
        zeros = _integer_zeros(qzeros[:G].T.contiguous(), used)
        return Parsed(QuantTensor(_rows(qweight), used, zeros, None, scheme), awq.denied_zeros(config))


def _geometry(K: int, config: Config) -> tuple[QuantScheme, int]:
    """The scheme, and ZW."""
    scheme = awq.scheme_of(config)
    size = scheme.group_length(K)
    if K % size:
        raise CheckpointError(f"K={K} must be a multiple of group_size {size} in an AWQ file")
    if size < 128 and size not in _ZERO_WORDS:
        raise CheckpointError(f"group_size must be 32, 64, or 128 and more in a gemv file, got {size}")
    words, multiple = -(-scheme.num_groups(K) // 8), _ZERO_WORDS.get(size, 1)
    return scheme, -(-words // multiple) * multiple


def _rows(words: Tensor) -> Tensor:
    """int16 [N / 4, K] -> codes uint8 [N, K]."""
    quarter, K = words.shape
    nibbles = torch.stack([words >> (4 * i) & 15 for i in range(4)], -1).to(torch.uint8)
    moved = nibbles.reshape(quarter, K // 64, 4, 2, 4, 2, 4)  # k // 64, n % 4, half of 64, b, c, a
    return moved.permute(0, 2, 1, 3, 6, 4, 5).reshape(quarter * 4, K)  # … then k // 64, half, a, b, c


def _integer_zeros(scaled: Tensor, scales: Tensor) -> Tensor:
    """-scale * zero and scale, `[N, G]` -> uint8 zero points."""
    if not bool(torch.isfinite(scaled).all()):
        raise CheckpointError("qzeros must be finite")
    wide = scales.float()
    zeros = torch.where(wide == 0, torch.zeros_like(wide), (-scaled.float() / wide).round())
    wrong = ((-wide * zeros).to(scaled.dtype) != scaled) | (zeros < 0) | (zeros > 15)
    if bool(wrong.any()):
        n, g = (int(i) for i in wrong.nonzero()[0])
        raise CheckpointError(
            f"qzeros must be -scale * zero with zero points 0 … 15: {int(wrong.sum())} of {wrong.numel()} are not, "
            f"first row {n}, group {g}: {float(scaled[n, g]):.6g} with scale {float(wide[n, g]):.6g}"
        )
    return zeros.to(torch.uint8)


def _matches(versions: tuple[str, ...], config: Config) -> bool:
    legacy = "quant_method" not in config and "zero_point" in config and "w_bit" in config
    body = str(first_of(config, "version", "format", "checkpoint_format", default="gemm")).lower()
    return (legacy or first_of(config, "quant_method", "method") == "awq") and body in versions


GEMV: Format = Format(
    name="awq gemv",
    required=("qweight", "qzeros", "scales"),
    optional=(),
    matches=lambda config: _matches(("gemv",), config),
    parse=parse_gemv,
)
GEMV_FAST: Format = Format(
    name="awq gemv_fast",
    required=("qweight", "qzeros", "scales"),
    optional=(),
    matches=lambda config: _matches(("gemv_fast", "llm-awq"), config),
    parse=parse_gemv_fast,
)
