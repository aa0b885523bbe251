"""NF4 and FP4: nearest entries, and double quantization against its definition, written out entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qkernels import NF4, RTN, QuantLinear, replace_linear
from qkernels.errors import ArgumentError, SchemeError
from qkernels.quantizers.nf4 import dynamic_map, twice_quantized
from qkernels.scheme import CODEBOOKS


def weights(rows: int, columns: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_codes_are_the_nearest_entries(codebook: str) -> None:
    w = weights(6, 130)
    made = NF4(codebook=codebook, scale_dtype=torch.float32).quantize(w)
    assert str(made.scheme) == f"{codebook}_g64"
    scales = made.scales[:, made.column_groups()]
    distance = (w.unsqueeze(-1) / scales.unsqueeze(-1) - torch.tensor(CODEBOOKS[codebook])).abs()
    chosen = distance.gather(-1, made.codes.long().unsqueeze(-1)).squeeze(-1)
    assert bool((chosen <= distance.amin(-1) + 2**-23).all())  # ties of midpoints that were rounded to fp32
    largest = torch.stack([part.abs().amax(-1) for part in w.split(64, -1)], -1)
    assert torch.equal(made.scales, largest)


def test_it_is_round_to_nearest_with_a_codebook() -> None:
    w = weights(6, 130)
    one, other = NF4().quantize(w), RTN().with_scheme("nf4_g64").quantize(w)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_dynamic_map() -> None:
    """Entries of bitsandbytes' table: 127 of each sign, 0 and 1; 64 of them between 0.1 and 1, one near 5.5e-7."""
    table = dynamic_map()
    assert table.shape == (256,)
    assert bool((table[1:] > table[:-1]).all())
    assert int((table > 0).sum()) == 128
    assert int((table < 0).sum()) == 127
    positive = table[table > 0]
    assert float(positive[0]) == pytest.approx(0.55e-6)
    assert float(positive[-1]) == 1
    assert float(positive[-2]) == pytest.approx(1 - 0.9 / 128)
    assert int(((positive > 0.1) & (positive < 1)).sum()) == 64


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 13)])
def test_twice_quantized_scales_follow_the_definition(shape: tuple[int, int]) -> None:
    scales = weights(*shape).abs() + 0.01
    got = twice_quantized(scales).flatten()
    mean, table = scales.mean(), dynamic_map()
    centred = scales.flatten() - mean
    for start in range(0, len(centred), 256):
        block = centred[start : start + 256]
        largest = block.abs().max()
        for value, restored in zip(block, got[start : start + 256], strict=True):
            relative = value / largest if largest > 0 else value
            nearest = (table - relative).abs().min()
            # fp32: the subtraction of the mean, and its addition, each to half a unit of at most 0.2
            assert abs(restored - mean - value) <= largest * nearest + 2**-24
            assert abs(restored - mean - value) <= largest * 0.9 / 128 + 2**-24


def test_double_quantization_costs_little_and_says_its_bytes() -> None:
    w = weights(64, 512)
    plain, double = NF4(scale_dtype=torch.float32).quantize(w), NF4(double_quant=True).quantize(w)
    assert double.scales.dtype == torch.float32
    assert double.nbytes == plain.nbytes == 64 * 512 // 2 + 4 * 64 * 8
    assert not torch.equal(double.scales, plain.scales)
    error = [float((made.dequantize() - w).norm()) for made in (plain, double)]
    # the codes are the nearest for the new scales, so no worse than the old ones: table entries are at most 1
    change = (double.scales - plain.scales)[:, plain.column_groups()]
    assert error[1] <= error[0] + float(change.norm())


def test_zero_groups_and_meta_weights() -> None:
    w = weights(4, 128)
    w[0] = 0
    restored = NF4(double_quant=True).quantize(w).dequantize()
    assert bool((restored[0] == 0).all())
    meta = NF4(double_quant=True).quantize(w.to("meta"))
    assert (meta.codes.shape, meta.scales.shape, meta.scales.dtype) == ((4, 128), (4, 2), torch.float32)


def test_refusals() -> None:
    with pytest.raises(SchemeError, match="NF4 needs a codebook .*, got w4a16_g64"):
        NF4().with_scheme("w4a16_g64")
    with pytest.raises(ArgumentError, match="double_quant must be True or False, got 1"):
        NF4(double_quant=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="float32 scales of the full range: .* got torch.float16"):
        NF4(double_quant=True, scale_dtype=torch.float16)
    with pytest.raises(ArgumentError, match="double_quant needs several scales"):
        NF4(double_quant=True, group_size="tensor")
    with pytest.raises(SchemeError, match="takes zeros=.none., got bits=3"):
        NF4(bits=3)


@pytest.mark.parametrize("scheme", ["nf4_g64", "fp4_g32"])
def test_replace_linear_runs_codebooks(scheme: str) -> None:
    """What `dequantize` says, gradient included."""
    model = nn.Sequential(nn.Linear(128, 32), nn.Linear(32, 8))
    replace_linear(model, scheme, progress=False)
    layer, x = model[0], torch.randn(5, 128, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.dequantize().T + layer.bias, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(5, 128))
    twin = QuantLinear(128, 32, scheme=scheme)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), y)
