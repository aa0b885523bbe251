"""The ops of mma_tile without a GPU: what is registered, shapes on fake CUDA tensors, errors before any launch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import _scoped_library, opcheck

from qkernels import extension
from qkernels.errors import ArgumentError, ConversionError, UnsupportedProblem
from qkernels.kernels.catalogue import Problem, list_kernels, select
from qkernels.layouts import get_layout
from qkernels.scheme import QuantScheme
from tests.ops.helpers import arguments, dequantize_arguments, exact_product, integers, layer_in
from tests.strategies import random_weight

compiled = pytest.mark.skipif(not extension.status().cuda, reason="the extension has no CUDA kernels")


@pytest.fixture
def built_for_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue of a build that does not say what it lacks; the tests' own is for two architectures (`make test`)."""
    status = replace(extension.status(), architectures=())
    monkeypatch.setattr(extension, "status", lambda: status)


def reasons(
    scheme: str = "w4a16_g128",
    dtype: torch.dtype = torch.bfloat16,
    arch: str = "sm90",
    kernel: str = "cuda.mma_tile",
    K: int = 256,
) -> tuple[str, ...]:
    return dict(list_kernels(Problem(64, K, QuantScheme.parse(scheme), dtype, arch)).rows)[kernel]


@compiled
@pytest.mark.usefixtures("built_for_every_card")
def test_the_catalogue_prefers_it_on_cuda() -> None:
    for arch in ("sm80", "sm86", "sm89", "sm90", "sm120", "cuda"):
        assert select(Problem(64, 256, QuantScheme(), torch.bfloat16, arch)).name == "cuda.mma_tile"
    assert reasons() == ()


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"arch": "sm75"}, "needs compute capability 8.0"),
        ({"arch": "cpu"}, "runs on CUDA devices"),
        ({"dtype": torch.float32}, "activations must be bfloat16 or float16"),
        ({"scheme": "w4a16_g24"}, "neither 16 nor 32 nor a multiple of 64"),
        ({"scheme": "w4a8_g128"}, "8-bit activations: these kernels take bfloat16"),
        ({"scheme": "q4_k_a8"}, "8-bit activations: these kernels take bfloat16"),
    ],
)
def test_the_catalogue_says_why_not(problem: dict[str, object], reason: str) -> None:
    assert any(reason in text for text in reasons(**problem))  # type: ignore[arg-type]


@compiled
@pytest.mark.usefixtures("built_for_every_card")
@pytest.mark.parametrize(
    "scheme",
    [
        "w8a8_channel",
        "w4a8_g128",
        "w4a8_g32",
        "w8a8_tensor",
        "w8a8z_channel",
        "w8a8o6_channel",
        "w4a8s_g32",
        "w8a8sz_channel",
    ],
)
def test_int8_activations_have_a_kernel_of_their_own(scheme: str) -> None:
    for arch in ("sm80", "sm90", "sm120"):
        assert select(Problem(70, 200, QuantScheme.parse(scheme), torch.float16, arch)).name == "cuda.mma_tile_a8"


def test_asymmetric_weights_with_int8_activations_have_no_kernel_on_cuda() -> None:
    """They raise, with every kernel's reason; nothing quietly takes 16-bit activations instead."""
    for zeros in ("asym", "fzero", "offset"):
        problem = Problem(70, 200, QuantScheme.parse(f"w4a8_g128_{zeros}"), torch.float16, "sm90")
        with pytest.raises(
            UnsupportedProblem, match="with int8 activations these kernels take symmetric weights alone"
        ):
            select(problem)
        assert select(problem, "reference").name == "reference_a8"


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (
            {"scheme": "w4a16_g128"},
            "16-bit activations: these kernels quantize them to int8, which a scheme like w4a8_g128 asks for",
        ),
        ({"scheme": "w4a8_g128_asym"}, "zeros='int': with int8 activations these kernels take symmetric weights alone"),
        ({"scheme": "w4a8_g128_offset"}, "zeros='offset': with int8 activations these kernels take symmetric"),
        ({"scheme": "w4a8_g16"}, "neither 32 nor a multiple of 64"),
        ({"scheme": "w8a8_channel", "K": 131073}, "groups of 131073 columns: an int32 sum is exact over 131072"),
        ({"scheme": "w8a8_channel", "dtype": torch.float32}, "activations must be bfloat16 or float16"),
        ({"scheme": "w8a8_channel", "arch": "cpu"}, "runs on CUDA devices"),
    ],
)
def test_the_catalogue_says_why_not_with_int8_activations(problem: dict[str, object], reason: str) -> None:
    why = reasons(**problem, kernel="cuda.mma_tile_a8")  # type: ignore[arg-type]
    assert any(re.search(reason, text) for text in why)


def test_the_bytes_of_int8_activations_are_the_same() -> None:
    for bits, group in ((4, "g32"), (8, "channel")):
        a16, a8 = (random_weight(f"w{bits}a{act}_{group}", 70, 200, act_order=True) for act in (16, 8))
        one, other = get_layout("mma_tile").pack(a16), get_layout("mma_tile_a8").pack(a8)
        for name in ("qweight", "scales", "k_order"):
            assert (one[name] is None and other[name] is None) or torch.equal(one[name], other[name])  # type: ignore[arg-type]
        assert get_layout("mma_tile_a8").unpack(other, 70, 200, a8.scheme).scheme == a8.scheme
    with pytest.raises(ConversionError, match="layout mma_tile_a8 cannot hold w4a16_g32"):
        get_layout("mma_tile_a8").pack(random_weight("w4a16_g32", 70, 200))


@compiled
def test_kernels_are_registered_for_cuda() -> None:
    for op in (
        "gemm_mma_tile", "gemv_mma_tile", "dequantize_mma_tile", "gemm_mma_tile_a8", "dequantize_mma_tile_a8",
        "grouped_gemm_mma_tile", "experts_mma_tile",
    ):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qkernels::{op}", "CUDA")


def test_fake_cuda_tensors_give_shapes() -> None:
    weight = random_weight("w4a16_g64_asym", 70, 200, act_order=True)
    args = arguments(weight, torch.zeros(5, 200, dtype=torch.float16), layout="mma_tile")
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_cuda = [
            torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, torch.Tensor) else a for a in args
        ]
        y = torch.ops.qkernels.gemm_mma_tile(*on_cuda)
        assert (list(y.shape), y.dtype, y.device.type, y.is_contiguous()) == ([5, 70], torch.float16, "cuda", True)
        plain = dequantize_arguments(weight, torch.bfloat16, "mma_tile")
        w = torch.ops.qkernels.dequantize_mma_tile(
            *(torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, torch.Tensor) else a for a in plain)
        )
        assert (list(w.shape), w.dtype, w.device.type) == ([70, 200], torch.bfloat16, "cuda")
        with pytest.raises(ArgumentError, match="qweight must be uint8"):
            torch.ops.qkernels.gemm_mma_tile(
                on_cuda[0], torch.empty(1, 8192, dtype=torch.uint8, device="cuda"), *on_cuda[2:]
            )


def test_one_graph_with_dynamic_tokens_traces_on_meta() -> None:
    """The shape function alone: `torch.export` with a symbolic M on meta tensors."""
    weight = random_weight("w4a16_g64", 70, 200)
    args = [
        a.to("meta") if isinstance(a, torch.Tensor) else a
        for a in arguments(weight, torch.zeros(5, 200).half(), layout="mma_tile")
    ]

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.qkernels.gemm_mma_tile(x, *args[1:])

    exported = torch.export.export(
        Layer(), (args[0],), dynamic_shapes={"x": {0: torch.export.Dim("M", min=2, max=4096)}}
    )
    assert "gemm_mma_tile" in exported.graph_module.code


def test_cpu_tensors_are_told_where_to_go() -> None:
    args = arguments(random_weight("w4a16_g64", 70, 200), torch.zeros(5, 200).half(), layout="mma_tile")
    for op in ("gemm_mma_tile", "gemv_mma_tile"):
        with pytest.raises(UnsupportedProblem, match="runs on CUDA devices, got tensors on cpu"):
            getattr(torch.ops.qkernels, op)(*args)


def test_dequantize_on_the_cpu_is_the_reference() -> None:
    weight = random_weight("w4a16_g64_offset", 70, 200, act_order=True)
    w = torch.ops.qkernels.dequantize_mma_tile(*dequantize_arguments(weight, torch.float16, "mma_tile"))
    assert torch.equal(w, weight.dequantize(torch.float16))


# ---- what torch asks of an op, with a stand-in for the kernels ----
#
# Fakes, autograd, graphs and dispatch are those of the CUDA ops; only the product itself is plain PyTorch. tests/gpu/test_cuda.py
# asks the same of the kernels.


def stand_in(layout: str, x: Tensor, *arguments: Any) -> Tensor:
    count = len(get_layout(layout).buffers)
    *buffers, bias, N = arguments[: count + 2]
    dequantize = getattr(torch.ops.qkernels, f"dequantize_{layout}")
    weight = dequantize(*buffers, N, x.shape[1], *arguments[count + 2 :], torch.float32)
    y = x.float() @ weight.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.fixture
def on_this_machine() -> Iterator[None]:
    with _scoped_library("qkernels", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Warning only once for all operators"
        )  # that a kernel is overridden, on purpose
        for op, layout in (
            ("gemm_mma_tile", "mma_tile"),
            ("gemv_mma_tile", "mma_tile"),
            ("gemm_mma_tile_a8", "mma_tile_a8"),
        ):
            library.impl(op, partial(stand_in, layout), "CPU", allow_override=True)
        yield


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("op", "scheme"),
    [
        ("gemm_mma_tile", "w4a16_g32_asym"),
        ("gemm_mma_tile", "w8a16_g16_offset"),
        ("gemv_mma_tile", "w3a16_channel_fzero"),
        ("gemm_mma_tile", "q4_k"),
        ("gemm_mma_tile_a8", "w4a8_g32"),
        ("gemm_mma_tile_a8", "w8a8sz_channel"),
    ],
)
def test_opcheck_of_the_cuda_ops(op: str, scheme: str, grad: bool) -> None:
    layout = op.partition("_")[2]
    weight = random_weight(scheme, 40, 96, act_order=grad)
    for M, bias in [(0, None), (1, None), (5, integers(40, dtype=torch.bfloat16).requires_grad_(grad))]:
        args = arguments(weight, integers(M, 96, dtype=torch.bfloat16).requires_grad_(grad), bias, layout)
        result = opcheck(getattr(torch.ops.qkernels, op).default, args)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w4a8_g32"])
def test_a_layer_with_the_cuda_layout_is_one_graph_for_any_number_of_tokens(scheme: str) -> None:
    layout = "mma_tile_a8" if scheme == "w4a8_g32" else "mma_tile"
    weight = random_weight(scheme, 40, 96, exact=True)
    layer = layer_in(layout, weight, dtype=torch.bfloat16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled_layer = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for M in (2, 5, 64):
            x = integers(M, 96, dtype=torch.bfloat16)
            assert torch.equal(compiled_layer(x), exact_product(weight, x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert layer.layout == layout
    torch._dynamo.reset()


def test_the_stand_ins_are_gone() -> None:
    test_cpu_tensors_are_told_where_to_go()
