"""Stacked experts to calls of the launchers in csrc/cuda/experts.h, run on the CPU by `emulator`. As in `calls`, outputs and
workspaces start as NaN, and x lies in a larger tensor of STRAY."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import QuantTensor
from qkernels.ops.grouped import ACTIVATIONS
from tests.ops.helpers import integers
from tests.strategies import random_weight
from tests.triton.problems import ALPHA, LIMIT

from . import emulator
from .calls import TYPES, UNIT, Config, padded, scales_fragments, weight_arguments
from .emulator import Call

PAIRS = Config("decode", 8, 2, 4)  # as they come
FEW = Config("decode", 8, 1, 4)
TILES = (FEW, Config("decode", 16, 2, 2), Config("decode", 32, 1, 4), *(Config("gemm", n) for n in (32, 64, 128)))


@dataclass(frozen=True)
class Experts:
    """Stacked weights and their biases [E, N]."""

    weight: QuantTensor
    bias: Tensor | None

    @classmethod
    def exact(cls, scheme: str, count: int, N: int, K: int, dtype: torch.dtype, ordered: bool = False) -> Experts:
        weight = random_weight(scheme, N, K, act_order=ordered, exact=True, experts=(count,))
        return cls(weight, integers(count, N, dtype=dtype))

    def values(self) -> tuple[Tensor, Tensor]:
        """float64 [E, N, K] and [E, N]."""
        weight = self.weight.dequantize().double()
        return weight, torch.zeros(weight.shape[:2]).double() if self.bias is None else self.bias.double()

    def seen(self, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same as the kernel of a configuration multiplies them with x of `dtype`."""
        weight, bias = self.values()
        return weight.to(dtype).double() if scales_fragments(self.weight, config) else weight, bias

    def arguments(self, config: Config, prefix: str = "") -> tuple[dict[str, Tensor | None], dict[str, int]]:
        buffers, numbers = weight_arguments(self.weight)
        numbers |= {"experts": self.weight.codes.shape[0], **config.integers()}
        numbers["bias_type"] = TYPES[None if self.bias is None else self.bias.dtype]
        buffers["bias"] = self.bias
        return {prefix + name: t for name, t in buffers.items()}, {prefix + name: n for name, n in numbers.items()}


def _x_arguments(x: Tensor) -> tuple[dict[str, Tensor | None], dict[str, int]]:
    storage, offset = padded(x)
    return {"x": storage}, {
        "M": x.shape[0], "x_columns": x.shape[1], "row_stride": x.stride(0), "column_stride": x.stride(1),
        "x_offset": offset, "type": TYPES[x.dtype],
    }  # fmt: skip


def _with_workspace(launcher: str, asks: str, buffers: dict[str, Tensor | None], numbers: dict[str, int]) -> Call:
    """A poisoned workspace of exactly the size that is asked for."""
    size = torch.zeros(1, dtype=torch.int64)
    emulator.run(UNIT, Call(asks, {**buffers, "bytes": size}, numbers))
    return Call(launcher, {**buffers, "workspace": torch.full((int(size) // 4,), float("nan"))}, numbers)


def grouped_call(
    experts: Experts, x: Tensor, rows: Tensor, offsets: Tensor, config: Config, dtype: torch.dtype | None = None
) -> Call:
    dtype = dtype or x.dtype
    buffers, numbers = experts.arguments(config)
    of_x, x_numbers = _x_arguments(x)
    y = torch.full((len(rows), experts.weight.N), float("nan"), dtype=dtype)
    buffers |= {**of_x, "rows": rows, "offsets": offsets, "y": y}
    numbers |= {**x_numbers, "count": len(rows), "y_type": TYPES[dtype]}
    return _with_workspace("grouped_gemm", "grouped_workspace", buffers, numbers)


def block_call(
    up: Experts, down: Experts, x: Tensor, ids: Tensor, routing: Tensor, activation: str, configs: tuple[Config, Config],
    is_sorted: bool, most_bytes: int | None = None,
) -> Call:  # fmt: skip
    of_up, up_numbers = up.arguments(configs[0], "up_")
    of_down, down_numbers = down.arguments(configs[1], "down_")
    of_x, x_numbers = _x_arguments(x)
    y = torch.full((len(x), down.weight.N), float("nan"), dtype=x.dtype)
    buffers = {**of_up, **of_down, **of_x, "ids": ids, "weights": routing, "y": y}
    numbers = {
        **up_numbers, **down_numbers, **x_numbers, "id_words": ids.element_size() // 4, "per": ids.shape[1],
        "weights_type": TYPES[routing.dtype], "activation": ACTIVATIONS.index(activation), "sorted": int(is_sorted),
        "alpha_thousandths": int(ALPHA * 1000), "limit": int(LIMIT),
    }  # fmt: skip
    if most_bytes is not None:
        numbers["most_bytes"] = most_bytes
    return _with_workspace("experts", "experts_workspace", buffers, numbers)


def result(call: Call, schedule: str = "ascending") -> Tensor:
    emulator.run(UNIT, call, schedule)
    y = call.buffers["y"]
    assert y is not None
    return y


def check(got: Tensor, expected: Tensor, what: object) -> None:
    """Bit for bit."""
    wrong = (got != expected).nonzero()
    assert len(wrong) == 0, f"{what}: {len(wrong)} of {got.numel()} differ, the first at {wrong[0].tolist()}"


def kernels_of(call: Call) -> list[str]:
    """The names of the templates that a call launches."""
    kernels = [one.kernel.removeprefix("_ZN8qkernels4cuda") for one in emulator.record(UNIT, call)]
    found = [re.match(r"(\d+)(\w+)", kernel) for kernel in kernels]
    return [match[2][: int(match[1])] for match in found if match]
