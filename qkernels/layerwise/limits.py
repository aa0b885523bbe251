"""Limits of formats and kernels, asked about every layer before the first one is quantized: shapes are known from headers."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from ..checkpoint.registry import get_format
from ..errors import ArgumentError, ConversionError, UnsupportedProblem
from ..kernels.catalogue import KERNELS, OnUnsupported, Problem, arch_of
from ..layouts import get_layout
from ..models.experts import PARTS, parameter_of, stack_at
from ..models.linears import linear_of
from ..quantizers import Options
from ..tensor import FLOAT_DTYPES
from ..text import dtype_name
from .hosts import Host
from .preview import as_quantized

log = logging.getLogger(__name__)


def check_limits(host: Host, methods: Mapping[str, Options], format: str | None, on_unsupported: OnUnsupported) -> None:
    """Raise, before any work, where a layer cannot be quantized, the format cannot store it, or (of a directory, for what is in
    memory was asked already) no kernel of any machine would run it.

    Args:
        methods: by the name of the linear layer.
        format: to be written, if one is.
        on_unsupported: what a layer without a kernel means; only "raise" raises.

    Raises:
        ArgumentError: a weight is of a dtype that is not quantized, fp8 for example.
        ConversionError, UnsupportedProblem: naming the layer, the limit and the way out.
    """
    asked, warned = set(), set()
    for name, method in methods.items():
        weight = parameter_of(host.model, name)
        dtype, (N, K) = host.dtype(weight), _shape(host.model, name, format)
        if (method, dtype, N, K) in asked:
            continue
        asked.add((method, dtype, N, K))
        if dtype not in (*FLOAT_DTYPES, torch.float64):
            raise ArgumentError(
                f"{weight} is {dtype_name(dtype)}, and only float16, bfloat16, float32 and float64 weights are quantized: "
                f"dequantize the model first, or leave the layer out with exclude"
            )
        if format is not None:
            try:
                get_format(format).write(as_quantized((N, K), dtype, method))
            except ConversionError as error:
                raise ConversionError(
                    f"{name}: {error}; or leave the layer out with exclude, or change its group size"
                ) from None
        if host.needs_target and on_unsupported == "raise":
            able = _able_kernels(name, N, K, method)
            if method.scheme not in warned and not _runs_here(N, K, method, dtype):
                warned.add(method.scheme)
                log.warning(
                    "%s: no kernel of this machine takes %s, N=%d K=%d (%s does); here the checkpoint loads with "
                    "on_unsupported='reference' only, which is slow; `qkernels doctor` lists what each kernel takes",
                    name, method.scheme, N, K, ", ".join(able),
                )  # fmt: skip


def _shape(model: nn.Module, name: str, format: str | None) -> tuple[int, int]:
    """N and K of a layer; of experts those of what is written: one expert, and gate apart from up, but for the native format."""
    found = stack_at(model, name)
    if found is None:
        N, K = linear_of(model, name).weight.shape
        return N, K
    _, form, projection = found
    N, K = form.shape(projection)
    return (N if format in (None, "native") else N // len(PARTS[projection])), K


def _able_kernels(name: str, N: int, K: int, method: Options) -> list[str]:
    """The kernels that take a layer, on whatever machine; raises where there is none."""
    reasons = {spec.name: get_layout(spec.layout).reasons(N, K, method.scheme) for spec in KERNELS}
    if all(reasons.values()):
        lines = "\n".join(f"  {kernel:<16} {'; '.join(why)}" for kernel, why in reasons.items())
        raise UnsupportedProblem(
            f"{name}: no kernel of any machine takes {method.scheme}, N={N} K={K}, and the slow reference alone would"
            f" run it\n{lines}\n"
            f'choose another scheme or group size (128, 64, 32), or pass on_unsupported="reference"'
        )
    return [kernel for kernel, why in reasons.items() if not why]


def _runs_here(N: int, K: int, method: Options, dtype: torch.dtype) -> bool:
    """Whether a kernel of this machine takes a layer, on the CPU or a GPU."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    problems = [Problem(N, K, method.scheme, dtype, arch_of(torch.device(device))) for device in devices]
    return any(not spec.reasons(problem) for spec in KERNELS for problem in problems)
