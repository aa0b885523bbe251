"""`RTN` and the options that all methods share."""

from __future__ import annotations

import pytest
import torch

from qkernels import QuantScheme
from qkernels.errors import ArgumentError, SchemeError
from qkernels.quantizers import AWQ, GPTQ, QUANTIZERS, RTN


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [1, 32, 48, 1000, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step(bits: int, group_size: int | str, symmetric: bool) -> None:
    """K = 100 is divided by none of the group sizes but 1. fp32 scales round by a relative 2^-24, so the ends of the range
    reach at most 2^bits · 2^-24 steps beyond their code."""
    w = torch.randn(6, 100, generator=torch.Generator().manual_seed(bits))
    tensor = RTN(bits, group_size, symmetric, scale_dtype=torch.float32).quantize(w)
    step = tensor.scales[:, tensor.column_groups()]
    assert bool(((tensor.dequantize() - w).abs() <= step * (0.5 + 2**bits * 2**-22)).all())
    assert QuantScheme(bits, group_size).num_groups(100) == tensor.G


def test_experts_are_quantized_like_single_weights() -> None:
    w = torch.randn(3, 8, 32)
    whole = RTN(group_size=16, symmetric=False).quantize(w)
    for expert in range(3):
        one = RTN(group_size=16, symmetric=False).quantize(w[expert])
        assert torch.equal(whole.codes[expert], one.codes)
        assert torch.equal(whole.scales[expert], one.scales)


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w3a16_g48_asym", "w8a16_tensor", "nf4_g64", "w4a16_g32_fzero"])
def test_meta_weights_give_shapes(scheme: str) -> None:
    method = RTN().with_scheme(scheme)
    real, meta = method.quantize(torch.randn(8, 96)), method.quantize(torch.empty(8, 96, device="meta"))
    assert meta.codes.is_meta
    assert meta.scales.shape == real.scales.shape
    assert meta.scales.dtype == real.scales.dtype


@pytest.mark.parametrize("method", [RTN(), GPTQ(), AWQ()])
@pytest.mark.parametrize(
    "scheme", ["w3a16_g64", "w8a16_channel", "w4a16_g32_asym", "nf4_g64", "w4a8_g128", "w4a16_g32_fzero"]
)
def test_with_scheme_keeps_the_other_options(method: RTN | GPTQ | AWQ, scheme: str) -> None:
    changed = method.with_scheme(scheme)
    assert str(changed.scheme) == scheme
    assert type(changed) is type(method)
    assert changed.clip == method.clip


def test_registry_names_are_the_methods_own() -> None:
    assert {name: method().name for name, method in QUANTIZERS.items()} == {name: name for name in QUANTIZERS}


@pytest.mark.parametrize("method", [RTN, GPTQ, AWQ])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits must be an integer from 2 to 8, got 9"),
        ({"group_size": 0}, 'group_size must be a positive integer, "channel" or "tensor", got 0'),
        ({"group_size": -1}, 'the -1 of GPTQ configs is spelled "channel" here'),
        ({"symmetric": 1}, "symmetric must be True or False, got 1"),
        ({"symmetric": True, "zeros": "int"}, "zeros='int' contradicts symmetric=True"),
        ({"symmetric": True, "act": "int4"}, "act must be None .* or \"int8\" or .*, got 'int4'"),
        ({"codebook": "nf5"}, "codebook must be one of nf4, fp4, .*, got 'nf5'"),
    ],
)
def test_options_that_make_no_scheme(method: type[RTN], options: dict[str, object], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        method(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (RTN, {"clip": "max"}, 'clip must be "none" or "mse", got \'max\''),
        (RTN, {"scale_dtype": torch.int8}, "scale_dtype must be None .*, got torch.int8"),
        (GPTQ, {"act_order": "desc"}, 'act_order must be "none", "group" or "static", got \'desc\''),
        (GPTQ, {"damping": 0}, r"damping .* must be in \(0, 1\], got 0"),
        (AWQ, {"grid": 0}, "grid must be a positive integer, got 0"),
        (AWQ, {"search_tokens": True}, "search_tokens must be a positive integer, got True"),
        (AWQ, {"duo_scaling": "both"}, "duo_scaling must be True or False, got 'both'"),
    ],
)
def test_options_out_of_range(method: type[RTN], options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        method(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    w = torch.randn(4, 8)
    w[1, 2] = value
    with pytest.raises(ArgumentError, match=r"layers\.3\.q_proj\.weight \[4, 8\] has 1 NaN or infinite entries"):
        RTN(group_size=8).quantize(w, name="layers.3.q_proj.weight")


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, 0), [[1.0]]])
def test_what_is_not_a_weight(weight: object) -> None:
    with pytest.raises(ArgumentError, match=r"weight must be a floating-point tensor \[\.\.\., N, K\] with K > 0"):
        RTN().quantize(weight)  # type: ignore[arg-type]
