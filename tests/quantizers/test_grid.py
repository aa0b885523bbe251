"""The rules of `qkernels.quantizers.grid`, each in the smallest case that shows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkernels import QuantScheme
from qkernels.errors import ArgumentError
from qkernels.quantizers import AWQ, GPTQ, HQQ, NF4, RTN, Options
from qkernels.quantizers.grid import fit, nearest, stored_dtype


def quantize(values: list[float], scheme: str, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and restored weights of one row."""
    tensor = RTN(**options).with_scheme(scheme).quantize(torch.tensor([values]))
    return tensor.codes[0], tensor.dequantize()[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_is_not_clipped(sign: int) -> None:
    """AutoGPTQ mirrors the range only where it has a negative weight; a group without one is then clipped to 7/15."""
    values = [sign * v for v in (0.1, 0.5, 1.0, 0.25)]
    tensor = RTN(scale_dtype=torch.float32).with_scheme("w4a16_g4").quantize(torch.tensor([values]))
    assert tensor.scales.item() == pytest.approx(2 / 15)
    assert (tensor.dequantize() - torch.tensor([values])).abs().max() <= tensor.scales.item() / 2 * (1 + 1e-6)


def test_symmetric_scale_is_the_same_for_a_mirrored_weight() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RTN(group_size=16).quantize(w).scales, RTN(group_size=16).quantize(-w).scales)


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0], [5.0, 5.0, 0.0, 5.0]])
def test_asymmetric_range_includes_zero(values: list[float]) -> None:
    tensor = RTN(symmetric=False, group_size=4).quantize(torch.tensor([values]))
    largest = max(map(abs, values))
    assert tensor.scales.item() == torch.tensor(largest / 15).half()
    assert tensor.zeros is not None
    assert tensor.zeros.item() in (0, 15)
    padded = RTN(symmetric=False, group_size=5).quantize(torch.tensor([[*values, 0.0]]))
    assert padded.dequantize()[0, 4] == 0


@pytest.mark.parametrize("scheme", ["w4a16_g4", "w4a16_g4_asym", "w2a16_channel", "w8a16_tensor", "nf4_g4"])
def test_an_all_zero_group_has_scale_one_and_stays_zero(scheme: str) -> None:
    tensor = RTN(clip="mse").with_scheme(scheme).quantize(torch.zeros(2, 8))
    assert bool((tensor.scales == 1).all())
    assert bool((tensor.dequantize() == 0).all())


def test_a_group_too_small_for_its_row_counts_as_zero() -> None:
    weight = torch.tensor([[1.0] * 4 + [1e-9] * 4])
    tensor = RTN(group_size=4, scale_dtype=torch.float16).quantize(weight)
    assert tensor.scales.dtype == torch.float16
    assert tensor.scales[0, 1] == 1
    assert bool((tensor.dequantize()[0, 4:] == 0).all())


def test_a_scale_that_overflows_is_refused() -> None:
    scheme = QuantScheme.parse("w4a16_g4")
    with pytest.raises(
        ArgumentError, match=r"a scale of 1\.33e\+05 overflows float16 .* use scale_dtype=torch.float32"
    ):
        fit(torch.full((1, 4), 1e6), scheme, torch.float16)
    fit(torch.full((1, 4), 1e6), scheme, torch.float32)


METHODS = {"RTN": RTN(), "mse": RTN(clip="mse"), "GPTQ": GPTQ(), "AWQ": AWQ(), "HQQ": HQQ(), "NF4": NF4()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("asked", [None, torch.float16])
@pytest.mark.parametrize("size", [3e-4, 1e-5, 1e-7, 3e-11, 1e-20, 1e6, 1e12])
def test_weights_of_any_size_are_as_good_as_weights_of_one(name: str, asked: torch.dtype | None, size: float) -> None:
    """No magnitude costs accuracy: the error relative to the weight is that of the same weight times 1."""
    schemes = {"NF4": ["nf4_g32"], "HQQ": ["w4a16_g32_fzero"], "AWQ": ["w4a16_g32", "w4a16_g32_asym"]}
    for scheme in schemes.get(
        name, ["w8a16_g32", "w8a16_g32_asym", "w4a16_channel", "w8a16_tensor", "w4a16_g32_offset"]
    ):
        method = replace(METHODS[name].with_scheme(scheme), scale_dtype=asked)
        weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        moments = torch.eye(64) if name in ("GPTQ", "AWQ") else None

        def lost(
            factor: float, method: Options = method, weight: Tensor = weight, moments: Tensor | None = moments
        ) -> float:
            scaled = weight.double() * factor
            back = method.quantize(scaled.float(), moments).dequantize().double()
            return float((back - scaled).norm() / scaled.norm())

        assert lost(size) <= 1.05 * lost(1.0) + 1e-4, scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_tiny_row_among_usual_ones_is_kept(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1e-5
    tensor = RTN(8, 32).quantize(weight.to(dtype))
    assert tensor.scales.dtype == torch.float32
    kept = weight.to(dtype)[3].float()
    assert float((tensor.dequantize()[3] - kept).norm() / kept.norm()) < 0.01


def test_a_file_s_own_dtype_of_scales_gives_way_too() -> None:
    """What a run settles from the checkpoint (`with_scales_for`) is a wish like any other."""
    method = RTN(8, 32).with_scales_for(torch.float16)
    assert method.scale_dtype == torch.float16
    assert method.quantize(torch.randn(4, 64)).scales.dtype == torch.float16
    assert method.quantize(torch.randn(4, 64) * 1e-6).scales.dtype == torch.float32
    assert method.quantize(torch.zeros(4, 64)).scales.dtype == torch.float16
    assert method.quantize(torch.zeros(4, 64, device="meta")).scales.dtype == torch.float16


def test_dtypes_are_taken_by_name() -> None:
    assert RTN(scale_dtype="bfloat16") == RTN(scale_dtype=torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="scale_dtype must be .* got 'half16'"):
        RTN(scale_dtype="half16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_scales_take_the_dtype_of_a_16_bit_weight(weight: torch.dtype, expected: torch.dtype) -> None:
    assert RTN(group_size=8).quantize(torch.randn(4, 8).to(weight)).scales.dtype == expected
    assert stored_dtype(torch.empty(0, dtype=weight), torch.float32, RTN().scheme) == torch.float32


@settings(deadline=None, max_examples=60)
@given(
    scheme=st.sampled_from(["w2a16_g8", "w3a16_g16_asym", "w4a16_g7", "w4a16_channel_asym", "w8a16_tensor", "w5a16_g8_fzero",
                            "w4a16_g16_offset", "nf4_g8", "w4a8_g8"]),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_codes_are_the_nearest_for_the_stored_scale(scheme: str, scale_dtype: torch.dtype, seed: int) -> None:
    """No other code comes closer to any weight: checked against all of them."""
    w = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    tensor = RTN(scale_dtype=scale_dtype).with_scheme(scheme).quantize(w)
    error = (tensor.dequantize() - w).abs()
    for code in range(tensor.scheme.max_code + 1):
        other = type(tensor)(torch.full_like(tensor.codes, code), tensor.scales, tensor.zeros, None, tensor.scheme)
        # 4 roundings in fp32 between the two computations of the same distance
        slack = 4 * torch.finfo(torch.float32).eps * (w.abs() + other.dequantize().abs())
        assert bool(((other.dequantize() - w).abs() + slack >= error).all())


@pytest.mark.parametrize(
    "scheme", ["w3a16_g16", "w4a16_g16_asym", "w4a16_channel", "w2a16_tensor", "nf4_g16", "w3a16_g15_fzero"]
)
def test_clipping_never_has_more_error_in_any_group(scheme: str) -> None:
    w = torch.distributions.StudentT(4.0).sample((16, 64))
    plain, clipped = (RTN(clip=clip).with_scheme(scheme).quantize(w) for clip in ("none", "mse"))

    def errors(tensor: object) -> torch.Tensor:
        return (tensor.dequantize() - w).square()  # type: ignore[attr-defined]

    assert float(errors(clipped).sum()) < float(errors(plain).sum())
    if isinstance(plain.scheme.group_size, int):
        size = plain.scheme.group_size
        for before, after in zip(errors(plain).split(size, 1), errors(clipped).split(size, 1), strict=True):
            assert bool((after.sum(1) <= before.sum(1) * (1 + 1e-5)).all())


def test_clipping_by_output_error_uses_the_second_moments() -> None:
    """The error it minimizes is that of the output; measured there, it beats clipping by the weights' error."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(32, 48, generator=g)
    x = torch.randn(200, 48, generator=g) @ torch.randn(48, 48, generator=g) * torch.logspace(-1, 1, 48)
    gram = x.T @ x
    scheme = QuantScheme(3, 48)

    def loss(importance: torch.Tensor | None) -> float:
        grid = fit(w, scheme, torch.float16, "mse", importance)
        difference = (nearest(w, grid, scheme) - scheme.mid_code) * grid.scales - w
        return float(((difference @ gram) * difference).sum())

    assert loss(gram) < loss(gram.diagonal()) < loss(None) * 1.5
    assert loss(gram) < loss(None)


def test_blocks_of_second_moments_are_cut_for_short_last_groups() -> None:
    w = torch.randn(4, 20)
    gram = torch.eye(20)
    scheme = QuantScheme(3, 8)
    by_weight, by_gram = fit(w, scheme, torch.float16, "mse"), fit(w, scheme, torch.float16, "mse", gram)
    assert torch.equal(by_weight.scales, by_gram.scales)


@pytest.mark.parametrize("name", ["w4a16_g32", "w4a16_g32_asym", "w3a16_g32", "w8a16_g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # in C++, and in PyTorch
def test_a_column_that_costs_little_may_be_clipped_to_a_quarter(name: str, dtype: torch.dtype) -> None:
    """Weights within ±0.25 beside -1 and 1 whose errors are free: a quarter of the range holds all that count."""
    scheme = QuantScheme.parse(name)
    weight = torch.linspace(-0.25, 0.25, 32, dtype=dtype).repeat(4, 1)
    weight[:, 5], weight[:, 6] = 1, -1
    free = torch.ones(32, dtype=dtype)
    free[5:7] = 0
    grid = fit(weight, scheme, torch.float32, "mse", free)
    whole = fit(weight, scheme, torch.float32)
    assert (grid.scales < 0.35 * whole.scales).all(), grid.scales / whole.scales
    assert (fit(weight, scheme, torch.float32, "mse").scales > 0.35 * whole.scales).all()  # where it counts, it stays
