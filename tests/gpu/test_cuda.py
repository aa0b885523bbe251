"""On a GPU: the ops end to end, from a packed weight to y. `tests/cuda` emulates what is done for real here."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qkernels import QuantLinear, QuantTensor, extension
from qkernels.layouts import BUFFERS, Layout, get_layout
from tests.cuda import calls_a8, nonfinite
from tests.cuda.calls import PATHS, STRAY
from tests.cuda.instances import Forced, forced, rounded
from tests.ops.helpers import arguments, assert_like_a_float_layer, dequantize_arguments, exact_product, integers
from tests.strategies import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not extension.status().cuda, reason="the extension has no CUDA kernels"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ZEROS = ["", "_asym", "_fzero", "_offset"]
# Around every tile of tokens, and past the crossover to dequantize + mm.
TOKENS = [0, 1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 300]


@pytest.fixture(autouse=True)
def whole_sums_in_cublas() -> Iterator[None]:
    """dequantize + mm is exact only where cuBLAS adds the parts of a split K in fp32; torch lets it add them in 16 bits."""
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in before.items():
        setattr(settings, name, value)


def on_gpu(args: tuple[object, ...]) -> list[object]:
    return [a.cuda() if isinstance(a, Tensor) else a for a in args]


def run(op: str, weight: QuantTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    result = getattr(torch.ops.qkernels, op)(*on_gpu(arguments(weight, x, bias, layout="mma_tile")))
    assert isinstance(result, Tensor)
    return result.cpu()


@dtypes
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("group", ["g16", "g32", "g64", "g128", "g256", "channel"])
def test_products_are_exact_for_every_number_of_tokens(group: str, zeros: str, dtype: torch.dtype) -> None:
    N, K = 131, 520
    for bits in (4, 8):
        weight = random_weight(f"w{bits}a16_{group}{zeros}", N, K, seed=bits, exact=True)
        for M in TOKENS:
            x, bias = integers(M, K, dtype=dtype, most=1), integers(N, dtype=dtype)
            assert torch.equal(run("gemm_mma_tile", weight, x, bias), exact_product(weight, x, bias)), (bits, M)
            if M <= 32:
                assert torch.equal(run("gemv_mma_tile", weight, x, bias), exact_product(weight, x, bias)), (bits, M)


def forced_arguments(weight: QuantTensor, x: Tensor, layout: Layout) -> list[object]:
    """The forced op is told x_static and act in any case."""
    args = on_gpu(arguments(weight, x, layout=layout.name))
    if layout.buffers == BUFFERS:
        args.insert(1 + len(BUFFERS), None)
        args.append(0)
    return args


def run_forced(case: Forced, x: Tensor) -> Tensor:
    """The kernel that is asked for, whatever would be chosen."""
    c = case.config
    config = (PATHS[c.path], c.tokens, c.warps_n, c.warps_k, c.splits, c.half_accumulate, c.stages)
    result = torch.ops.qkernels_forced.multiply(*forced_arguments(case.weight(), x, case.layout), *config)
    assert isinstance(result, Tensor)
    return result.cpu()


PATHS_HERE = [path for path in PATHS if path != "dequantize"]


@pytest.mark.parametrize("path", PATHS_HERE)
def test_every_instance_is_right(path: str) -> None:
    """All calls of tests/cuda/instances.py, which reach every instance (test_instances.py holds that). The heuristic reaches a
    fraction of them for small problems."""
    if path.endswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is sm_90a's alone")
    cases = [case for case in forced() if case.config.path == path]
    assert cases
    wrong = [str(case) for case in cases if not torch.equal(run_forced(case, case.x()), case.expected())]
    assert wrong == [], f"{len(wrong)} of {len(cases)}"


@pytest.mark.parametrize("path", PATHS_HERE)
def test_every_instance_fills_its_tile(path: str) -> None:
    """One token more than a tile holds (decode: all that it holds), more columns than a ring, parts of K."""
    if path.endswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is sm_90a's alone")
    seen = set()
    for case in forced():
        key = (case.scheme, case.config, case.dtype)
        if case.config.path == path and key not in seen:
            seen.add(key)
            tokens = case.config.tokens
            config = replace(case.config, splits=2) if case.config.splits == 1 else case.config
            large = replace(case, N=263, K=2056, M=tokens if path == "decode" else tokens + 1, config=config)
            assert torch.equal(run_forced(large, large.x()), large.expected()), str(large)


def test_a_configuration_that_does_not_exist_is_an_error() -> None:
    case = next(forced())
    broken = replace(case, config=replace(case.config, tokens=24))
    with pytest.raises(RuntimeError, match="could not be launched"):
        run_forced(broken, case.x())


@pytest.mark.parametrize(
    "scheme",
    [
        "w8a8_channel",
        "w4a8_g128",
        "w4a8_g32",
        "w8a8_g64",
        "w8a8z_channel",
        "w8a8o6_channel",
        "w4a8s_g32",
        "w4a8sz_g128",
    ],
)
def test_int8_activations_are_exact(scheme: str) -> None:
    weight = random_weight(scheme, 131, 520, exact=True)
    for dtype, M in itertools.product((torch.bfloat16, torch.float16), TOKENS[1:]):
        x = calls_a8.noise(M, 520, dtype)
        x[M // 2, 7] = 8.0  # an outlier, where there is such a thing
        got = torch.ops.qkernels.gemm_mma_tile_a8(*on_gpu(arguments(weight, x, layout="mma_tile_a8"))).cpu()
        parts = [calls_a8.expected(weight, x, splits=splits) for splits in (1, 2, 3, 4)]
        assert any(torch.equal(got, y) for y in parts), (dtype, M)  # parts of K are rounded one by one


@dtypes
def test_act_order_odd_columns_and_strides(dtype: torch.dtype) -> None:
    weight = random_weight("w4a16_g32_asym", 67, 333, act_order=True, exact=True)
    args = on_gpu(arguments(weight, torch.zeros(1, 333, dtype=dtype), layout="mma_tile"))
    for M in TOKENS:
        x = integers(M, 333, dtype=dtype, most=2)
        room = torch.full((2 * M + 1, 3 * 333), STRAY, dtype=dtype, device="cuda")
        view = room[1::2, 5:338]
        view.copy_(x)
        assert torch.equal(torch.ops.qkernels.gemm_mma_tile(view, *args[1:]).cpu(), exact_product(weight, x)), M


@pytest.mark.parametrize("path", ["decode", "gemm", "gemm_sm90"])
def test_infinities_and_huge_numbers_give_what_a_float_layer_gives(path: str) -> None:
    if path.endswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is sm_90a's alone")
    for c, weight, x in (problem for problem in nonfinite.problems() if problem[0].path == path):
        config = (PATHS[c.path], c.tokens, c.warps_n, c.warps_k, c.splits, c.half_accumulate, c.stages)
        y = torch.ops.qkernels_forced.multiply(*forced_arguments(weight, x, get_layout("mma_tile")), *config)
        assert_like_a_float_layer(y.cpu(), weight, x)


def test_large_layers_split_over_the_whole_card() -> None:
    weight = random_weight("w4a16_g128_asym", 4096, 1024, exact=True)
    for M in (1, 16, 64, 512):
        x = integers(M, 1024, dtype=torch.bfloat16, most=1)
        assert torch.equal(run("gemm_mma_tile", weight, x), exact_product(weight, x)), M


@dtypes
@pytest.mark.parametrize(
    "scheme", ["nf4_g64", "mxfp4_g32", "iq4nl_g32", "fp8_channel", "fp8_g32", "nvfp4_g16", "nvfp4m_g16"]
)
def test_codebooks_with_scales_of_every_type(scheme: str, dtype: torch.dtype) -> None:
    """Within fp32's rounding of K sums, past the crossover (dequantize + mm) of every weight to x's type; and y's own."""
    scales = torch.float8_e8m0fnu if scheme == "mxfp4_g32" else torch.bfloat16
    weight = random_weight(scheme, 150, 200, act_order=True, dtype=scales)
    for M in TOKENS:
        x = torch.randn(M, 200, generator=torch.Generator().manual_seed(M)).to(dtype)
        w = rounded(weight, dtype)
        expected, size = x.double() @ w.T, x.double().abs() @ w.abs().T
        eps = torch.finfo(dtype).eps
        bound = ((weight.K + 8) * 2.0**-24 + (eps if M > 32 else 0)) * size + eps / 2 * expected.abs()
        assert bool(((run("gemm_mma_tile", weight, x).double() - expected).abs() <= bound).all()), M


@dtypes
@pytest.mark.parametrize(
    "scheme",
    ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "w2a16_g64", "w3a16_g128_asym", "w5a16_g32_offset", "w6a16_channel"],
)
def test_k_quants_and_codes_in_planes(scheme: str, dtype: torch.dtype) -> None:
    """Exact on the fused kernels; past the crossover (dequantize + mm) every weight is rounded to x's type."""
    weight = random_weight(scheme, 131, 520, act_order=True, exact=True)
    w = weight.dequantize().double()
    for M in TOKENS:
        x = integers(M, 520, dtype=dtype, most=1)
        y, expected = run("gemm_mma_tile", weight, x), exact_product(weight, x)
        eps = torch.finfo(dtype).eps if M > 32 else 0
        assert bool(
            ((y - expected).double().abs() <= eps * (x.double().abs() @ w.abs().T + expected.double().abs())).all()
        ), M
        if M <= 32:
            assert torch.equal(run("gemv_mma_tile", weight, x), expected), M


@pytest.mark.parametrize(
    "scheme",
    ["w4a16_g16_fzero", "w4a16_g128", "w8a16_g64_asym", "w3a16_channel_offset", "nf4_g64", "fp8_g32", "nvfp4_g16", "q4_k",
     "q6_k", "iq4_xs"],
)  # fmt: skip
def test_dequantize_is_the_definition_bit_for_bit(scheme: str) -> None:
    weight = random_weight(scheme, 150, 200, act_order=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = torch.ops.qkernels.dequantize_mma_tile(*on_gpu(dequantize_arguments(weight, dtype, "mma_tile")))
        assert torch.equal(got.cpu(), weight.dequantize(dtype))


def test_packing_on_the_gpu_is_packing_on_the_cpu() -> None:
    layout = get_layout("mma_tile")
    for scheme in ("w4a16_g128_asym", "w8a16_channel", "w2a16_g16_fzero", "w3a16_g128", "q5_k", "q6_k"):
        weight = random_weight(scheme, 150, 264, act_order=True)
        there = layout.pack(weight.to("cuda"))
        for name, buffer in layout.pack(weight).items():
            made = there[name]
            assert (buffer is None) == (made is None)
            assert buffer is None or made is None or torch.equal(buffer, made.cpu()), name


def test_the_op_passes_opcheck_and_compiles_with_dynamic_tokens() -> None:
    weight = random_weight("w4a16_g32_asym", 40, 96, exact=True)
    args = on_gpu(arguments(weight, integers(3, 96, dtype=torch.bfloat16), layout="mma_tile"))
    result = opcheck(torch.ops.qkernels.gemm_mma_tile.default, (args[0].requires_grad_(), *args[1:]))  # type: ignore[attr-defined]
    assert set(result.values()) == {"SUCCESS"}, result

    layer = QuantLinear.from_quant_tensor(weight, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for M in (2, 5, 64):
            x = integers(M, 96, dtype=torch.bfloat16).cuda()
            assert torch.equal(compiled(x), layer(x))


def test_wrong_tensors_raise_before_any_launch() -> None:
    weight = random_weight("w4a16_g32", 40, 96, exact=True)
    x, *rest = on_gpu(arguments(weight, integers(3, 96, dtype=torch.bfloat16), layout="mma_tile"))
    shifted = torch.empty(rest[0].numel() + 1, dtype=torch.uint8, device="cuda")[1:].view(rest[0].shape)  # type: ignore[attr-defined]
    for args, message in [
        ((x.float(), *rest), "no float32"),  # type: ignore[attr-defined]
        ((x.cpu(), *rest), "cuda"),  # type: ignore[attr-defined]
        ((x, rest[0].cpu(), *rest[1:]), "qweight must be on a CUDA device"),  # type: ignore[attr-defined]
        ((x, shifted, *rest[1:]), "multiple of 16 bytes"),
        ((x[:, :64], *rest), "qweight must be uint8"),  # type: ignore[index]
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.qkernels.gemm_mma_tile(*args)
    torch.cuda.synchronize()  # and nothing ran into an error later


def test_each_choice_is_logged_once() -> None:
    program = (
        "import torch; from qkernels import QuantLinear\n"
        "layer = QuantLinear(128, 64, scheme='w4a16_g64', device='cuda', dtype=torch.bfloat16)\n"
        "x = torch.ones(3, 128, device='cuda', dtype=torch.bfloat16)\n"
        "with torch.inference_mode(): [layer(x) for _ in range(3)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "QKERNELS_LOG": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("qkernels: M=3 N=64 K=128, 4 bit, bfloat16") == 1
