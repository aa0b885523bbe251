"""Weights and activations to calls of the launchers in csrc/cuda, run on the CPU by `emulator`.

`multiply`, `dequantize` and `stage` are what the op does on a GPU, with the configuration given instead of chosen; outputs
and workspaces start as NaN, and x lies in a larger tensor of STRAY.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.codebooks import CODEBOOK_NUMBERS
from qkernels.layouts import Layout, get_layout
from qkernels.scheme import ACTIVATION_NUMBERS, FACTOR_NUMBERS
from tests.cuda import emulator
from tests.cuda.emulator import Call

UNIT = "mma_tile"
LAYOUT = get_layout("mma_tile")
DTYPES = (torch.float16, torch.bfloat16)
TYPES = {
    None: 0, torch.uint8: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4, torch.int8: 5, torch.float8_e8m0fnu: 6,
    torch.float8_e4m3fn: 7,
}  # enum Type of csrc/types.h  # fmt: skip
# What lies around x. Large, and finite: a kernel that reads NaN there, where it should read nothing, would find that its sum is
# not finite and add it again, rightly (sum_again.cuh).
STRAY = 4096.0
PATHS = {"decode": 0, "gemm": 1, "dequantize": 2, "gemm_sm90": 3, "gemm_a8": 4, "gemm_a8_sm90": 5}


@dataclass(frozen=True)
class Config:
    """`Config` of problem.h."""

    path: str
    tokens: int
    warps_n: int = 0
    warps_k: int = 0
    splits: int = 1
    half_accumulate: bool = False
    stages: int = 0

    def integers(self) -> dict[str, int]:
        return {name: int(value) for name, value in {**asdict(self), "path": PATHS[self.path]}.items()}


def decode(M: int, warps_n: int = 4, splits: int = 1) -> Config:
    """The decode configuration whose tokens fit M best."""
    return Config("decode", 8 if M <= 8 else 16 if M <= 16 else 32, warps_n, 8 // warps_n, splits)


def gemm(tokens: int, splits: int = 1, half_accumulate: bool = False) -> Config:
    return Config("gemm", tokens, 0, 0, splits, half_accumulate)


def gemm_sm90(tokens: int, splits: int = 1) -> Config:
    return Config("gemm_sm90", tokens, 0, 0, splits)


def scales_fragments(weight: QuantTensor, config: Config) -> bool:
    """Whether gemm_sm90 scales each weight before it multiplies it, and so rounds it to x's type."""
    scheme = weight.scheme
    short = scheme.num_groups(weight.K) > 1 and scheme.group_length(weight.K) < 64
    plain = scheme.bits in (4, 7, 8) and scheme.codebook is None and scheme.factors is None
    return config.path == "gemm_sm90" and (
        config.tokens == 256 or short or scheme.zeros in ("float", "offset") or not plain
    )


def rounding_of_fragments(weight: QuantTensor, x: Tensor, config: Config) -> Tensor | float:
    """float64 [M, N]: what it may change that weights are rounded to x's type: half a unit of the last bit, or of the smallest
    number."""
    if not scales_fragments(weight, config):
        return 0.0
    info, W = torch.finfo(x.dtype), weight.dequantize(torch.float32).double()
    rounding = torch.maximum(W.abs() * info.eps / 2, torch.tensor(info.smallest_normal * info.eps / 2).double())
    return x.double().abs() @ rounding.T


def padded(x: Tensor) -> tuple[Tensor, int]:
    """The storage that x is a view of, flat, and x's offset in it."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage, int(x.storage_offset())


def in_room(x: Tensor) -> Tensor:
    """x as rows of a larger tensor of STRAY: 16-byte aligned, so that the kernels copy 16 bytes at a time where K allows."""
    M, K = x.shape
    room = torch.full((M + 2, -(-K // 8) * 8 + 16), STRAY, dtype=x.dtype)
    view = room[1 : M + 1, 8 : 8 + K]
    return view.copy_(x)


def weight_arguments(weight: QuantTensor, layout: Layout = LAYOUT) -> tuple[dict[str, Tensor | None], dict[str, int]]:
    packed = layout.pack(weight)
    scales, zeros = packed["scales"], packed["zeros"]
    outer, outer_zeros = packed["outer_scales"], packed["outer_zeros"]
    assert scales is not None
    buffers = {
        "codes": packed["qweight"],
        "scales": scales,
        "zeros": zeros,
        "k_order": packed["k_order"],
        "outer": outer,
        "outer_zeros": outer_zeros,
        "x_static": packed.get("x_static"),
    }
    integers = {
        "N": weight.N, "K": weight.K, "bits": weight.scheme.bits, "group": weight.scheme.group_length(weight.K),
        "scale_type": TYPES[scales.dtype], "zero_type": TYPES[None if zeros is None else zeros.dtype],
        "zeros_are_offsets": int(weight.scheme.zeros == "offset"), "act": ACTIVATION_NUMBERS[weight.scheme.act],
        "codebook": CODEBOOK_NUMBERS[weight.scheme.codebook], "factors": FACTOR_NUMBERS[weight.scheme.factors],
        "outer_type": TYPES[None if outer is None else outer.dtype],
        "outer_zero_type": TYPES[None if outer_zeros is None else outer_zeros.dtype],
    }  # fmt: skip
    return buffers, integers


def x_arguments(x: Tensor) -> tuple[dict[str, Tensor | None], dict[str, int]]:
    storage, offset = padded(x)
    return {"x": storage}, {
        "M": x.shape[0], "K": x.shape[1], "row_stride": x.stride(0), "column_stride": x.stride(1), "x_offset": offset,
    }  # fmt: skip


def multiply_call(
    weight: QuantTensor, x: Tensor, config: Config, bias: Tensor | None = None, layout: Layout = LAYOUT
) -> Call:
    """`multiply` with a poisoned y and a poisoned workspace of exactly the size that is asked for."""
    weight_buffers, weight_integers = weight_arguments(weight, layout)
    x_buffers, x_integers = x_arguments(x)
    integers = {
        **weight_integers, **x_integers, **config.integers(), "type": TYPES[x.dtype],
        "bias_type": TYPES[None if bias is None else bias.dtype],
    }  # fmt: skip
    size = torch.zeros(1, dtype=torch.int64)
    buffers: dict[str, Tensor | None] = {**weight_buffers, **x_buffers, "bias": bias}
    emulator.run(UNIT, Call("workspace", {**buffers, "bytes": size}, integers))
    buffers["workspace"] = torch.full((int(size) // 4,), float("nan"))
    buffers["y"] = torch.full((x.shape[0], weight.N), float("nan"), dtype=x.dtype)
    return Call("multiply", buffers, integers)


def multiply(
    weight: QuantTensor,
    x: Tensor,
    config: Config,
    bias: Tensor | None = None,
    schedule: str = "ascending",
    seed: int = 1,
) -> Tensor:
    """y `[M, N]`."""
    call = multiply_call(weight, x, config, bias)
    emulator.run(UNIT, call, schedule, seed)
    y = call.buffers["y"]
    assert y is not None
    return y


def dequantize(
    weight: QuantTensor,
    dtype: torch.dtype,
    columns: int,
    ordered: bool = False,
    first: int = 0,
    count: int | None = None,
) -> Tensor:
    """Rows of strips first ... first + count - 1, `columns` each; `ordered`: in the order of x."""
    buffers, integers = weight_arguments(weight)
    count = -(-weight.N // 64) - first if count is None else count
    rows = min(weight.N - first * 64, count * 64)
    to = torch.full((rows, columns), float("nan"), dtype=dtype)
    if not ordered:
        buffers["k_order"] = None
    more = {"first": first, "count": count, "columns": columns, "type": TYPES[dtype]}
    emulator.run(UNIT, Call("dequantize", {**buffers, "to": to}, {**integers, **more}))
    return to


def stage(weight: QuantTensor, x: Tensor) -> Tensor:
    """x gathered and padded `[M, K_pad]`."""
    buffers, integers = weight_arguments(weight)
    x_buffers, x_integers = x_arguments(x)
    to = torch.full((x.shape[0], -(-weight.K // 64) * 64), float("nan"), dtype=x.dtype)
    emulator.run(UNIT, Call("stage", {**buffers, **x_buffers, "to": to}, {**integers, **x_integers}))
    return to


@cache
def why_not() -> str | None:
    return emulator.WHY_NOT
