"""The ops of GPTQ's loops against PyTorch, bit for bit, on every instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme, extension
from qkernels.errors import ArgumentError
from qkernels.quantizers import gptq, native
from qkernels.quantizers import grid as grids
from qkernels.quantizers.grid import Grid

pytestmark = pytest.mark.skipif(
    not extension.status().isas, reason=f"no compiled extension: {extension.status().error}"
)
ISAS = [isa for isa in ("scalar", "avx2", "avx512") if isa in extension.status().isas]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = extension.status().isa
    assert before is not None
    extension.use_isa(request.param)
    yield request.param
    extension.use_isa(before)


def total_in_order(terms: Tensor) -> Tensor:
    total = torch.zeros_like(terms[..., 0])
    for member in terms.unbind(-1):
        total = total + member
    return total


def twin(groups: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, importance: Tensor | None) -> Grid:
    """The search of `grid.fit`, with sums in order."""

    def error(grid: Grid) -> Tensor:
        scales, zeros = grid.scales.unsqueeze(-1), None if grid.zeros is None else grid.zeros.unsqueeze(-1)
        off = grids.decode(grids.encode(groups, scales, zeros, scheme), scales, zeros, scheme) - groups
        return total_in_order(off * off * (1 if importance is None else importance))

    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = grids._grid_of_range(low, high, scheme, scale_dtype)
    least = error(best)
    for share in grids.clip_shares(scheme.bits, weighted=importance is not None):
        trial = grids._grid_of_range(low * share, high * share, scheme, scale_dtype)
        loss = error(trial)
        better = loss < least
        least = torch.where(better, loss, least)
        zeros = None if trial.zeros is None or best.zeros is None else torch.where(better, trial.zeros, best.zeros)
        best = Grid(torch.where(better, trial.scales, best.scales), zeros)
    return best


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal ones with a loud column, a row of zeros, one of one sign, one whose scale is a subnormal half."""
    found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found[:, 1] *= 20
    found[2] = 0
    found[3].abs_()
    found[4] *= 1e-6
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["w4a16_g24", "w4a16_g24_asym", "w2a16_g24", "w3a16_g24_asym", "w8a16_g24_asym"])
def test_grids(name: str, dtype: torch.dtype, isa: str) -> None:
    scheme, groups = QuantScheme.parse(name), weights(14, 120).view(14, 5, 24)  # 70 groups: a last part of six
    importance = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) ** 4
    for weighed in (None, importance, importance[:1]):
        expected = twin(groups, scheme, dtype, weighed)
        shares = grids.clip_shares(scheme.bits, weighted=weighed is not None)
        found = native.clipped_grids(groups, scheme, dtype, shares, weighed)
        assert found is not None
        assert torch.equal(found[0], expected.scales)
        assert (found[1] is None) == (expected.zeros is None)
        assert found[1] is None or torch.equal(found[1], expected.zeros)
    # `fit` comes to it, and says the same as PyTorch's sums but for ranges that are as good.
    through = grids.fit(groups.flatten(1), scheme, dtype, "mse", importance.flatten())
    exact = grids.fit(groups.flatten(1).double(), scheme, dtype, "mse", importance.flatten().double())
    assert torch.equal(through.scales, twin(groups, scheme, dtype, importance).scales)
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert torch.isclose(through.scales.double(), exact.scales, rtol=rounding).float().mean() > 0.95


def test_another_importance_decides_otherwise() -> None:
    """Negative control: importance that is off by one column or one group."""
    scheme, groups = QuantScheme.parse("w4a16_g24"), weights(14, 120).view(14, 5, 24)
    importance = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) ** 4
    right = twin(groups, scheme, torch.float16, importance)
    for wrong in (importance.roll(1, 0), importance.roll(1, 1)):
        assert not torch.equal(twin(groups, scheme, torch.float16, wrong).scales, right.scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_scale_that_overflows_is_named(bad: float, isa: str) -> None:
    """By the PyTorch code, which the op leaves it to; it looks at every group."""
    scheme = QuantScheme.parse("w4a16_g24")
    for row in (0, 17, 39):
        values = weights(40, 24)
        values[row, 7] = bad
        assert native.clipped_grids(values, scheme, torch.float16, [0.9], None) is None
        with pytest.raises(ArgumentError, match="overflows float16"):
            grids.fit(values, scheme, torch.float16, "mse")


@pytest.mark.parametrize("name", ["w4a16_g16", "w4a16_g16_asym", "w2a16_g16", "w8a16_g16_asym"])
@pytest.mark.parametrize("count", [1, 37, 128])
def test_columns(name: str, count: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, columns = QuantScheme.parse(name), weights(37, count + 2).T[2:].contiguous()
    generator = torch.Generator().manual_seed(2)
    factor = (torch.randn(count, count, generator=generator) / 4).triu() + torch.eye(count)
    groups = torch.arange(count) // 16
    found = grids.fit(columns.T, scheme, torch.float16)
    scales, zeros = (None if t is None else t.T.contiguous() for t in (found.scales, found.zeros))
    assert scales is not None
    fast = gptq.rounded_columns(columns, factor, scheme, scales, zeros, groups)
    kept = columns.clone()
    monkeypatch.setattr(gptq, "takes", lambda *_: False)
    plain = gptq.rounded_columns(columns, factor, scheme, scales, zeros, groups)
    for one, other in zip(fast, plain, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert torch.equal(columns, kept)
    if count > 1:  # negative control: a fused product and sum rounds otherwise
        fused = columns.clone()
        errors = torch.empty_like(columns)
        for i in range(count):
            zero = None if zeros is None else zeros[groups[i]]
            value = grids.decode(
                grids.encode(fused[i], scales[groups[i]], zero, scheme), scales[groups[i]], zero, scheme
            )
            errors[i] = (fused[i] - value) / factor[i, i]
            fused[i + 1 :].addcmul_(factor[i, i + 1 :, None], errors[i], value=-1)
        assert not torch.equal(errors, fast[2])


def test_what_does_not_fit_is_refused() -> None:
    columns, factor, scales = torch.zeros(4, 8), torch.eye(4), torch.ones(2, 8)
    groups = torch.tensor([0, 0, 1, 2])
    with pytest.raises(RuntimeError, match=r"groups must be 0 to 1, got 2 for column 3"):
        native.round_columns(columns, factor, scales, None, groups, 4)
    with pytest.raises(RuntimeError, match=r"factor must be float32 \[4, 4\], got"):
        native.round_columns(columns, torch.eye(3), scales, None, groups.clamp(max=1), 4)
    with pytest.raises(RuntimeError, match=r"columns must be float32 \[up to 128, N\], got"):
        native.round_columns(torch.zeros(129, 8), torch.eye(129), scales, None, torch.zeros(129).long(), 4)
    with pytest.raises(RuntimeError, match=r"importance must be float32 \[1 or more, 24\], got"):
        native.clipped_grids(weights(5, 24), QuantScheme.parse("w4a16_g24"), torch.float16, [0.9], torch.ones(2, 23))
