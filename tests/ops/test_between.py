"""What lies between products: PyTorch's results up to the rounding of sums, the same bits on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qkernels import extension
from qkernels.ops import between
from qkernels.tensor import FLOAT_DTYPES

dtypes = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
pytestmark = pytest.mark.skipif(not extension.status().loaded, reason="no compiled extension")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def units(dtype: torch.dtype) -> float:
    """The distance of two neighbours in a dtype, of the larger one."""
    return torch.finfo(dtype).eps


def assert_near(found: Tensor, expected: Tensor, rounded: int) -> None:
    """Sums of fp32 in another order move a value by less than 2^-20; where that tips a rounding, each of `rounded` roundings by a
    neighbour. Few do."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    a, b = found.double(), expected.double()
    assert ((a - b).abs() <= rounded * units(found.dtype) * b.abs() + 2**-20 * b.abs().max()).all()
    if found.dtype != torch.float32:
        assert (a != b).double().mean() < 0.01


@dtypes
@pytest.mark.parametrize("one_added", [False, True])
def test_norms(isa: str, dtype: torch.dtype, one_added: bool) -> None:
    x, weight = (3 * random(2, 5, 208)).to(dtype), random(208, seed=1).to(dtype)
    for scale in (1.0, 1e-3):  # where epsilon counts
        found = between.rms_norm(x * scale, weight, 1e-5, one_added)
        assert_near(found, between._rms_norm(x * scale, weight, 1e-5, one_added), 2)
    turned = between.rms_norm(x.transpose(0, 1), weight, 1e-5, one_added)
    assert torch.equal(turned.transpose(0, 1), between.rms_norm(x, weight, 1e-5, one_added))
    x[1, 2, 3] = torch.nan
    nan = between.rms_norm(x, weight, 1e-5, one_added).isnan()
    assert nan[1, 2].all() and nan.sum() == 208


@dtypes
@pytest.mark.parametrize("gelu", [False, True])
def test_gates(isa: str, dtype: torch.dtype, gelu: bool) -> None:
    gate, up = (4 * random(3, 5, 96)).to(dtype), random(3, 5, 96, seed=1).to(dtype)
    wide = gate.double()
    z = 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3) if gelu else wide
    # Not by PyTorch's own gelu, which cancels: 0.5 (1 + tanh(z / 2)).
    assert_near(between.gated(gate, up, gelu), (wide * z.sigmoid()).to(dtype) * up, 2)
    assert torch.allclose(between.gated(gate, up, gelu), between._gated(gate, up, gelu), rtol=1e-2, atol=1e-5)
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 60.0, -60.0, 1e-6] * 2).to(dtype)
    ones = torch.ones_like(edges)
    found, expected = between.gated(edges, ones, gelu), between._gated(edges, ones, gelu)
    assert torch.allclose(found[3:8].float(), expected[3:8].float(), atol=1e-12)
    assert found[0] == torch.inf and found[2].isnan()


@dtypes
def test_rotations_are_those_of_transformers_bit_for_bit(isa: str, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = random(2, 7, 3, 64).to(dtype).transpose(1, 2)  # as views of projections lie
    for batch in (1, 2):
        angles = random(batch, 7, 32, seed=2).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
        found = between.rotated(x, cos, sin)
        assert torch.equal(found, expected) and found.is_contiguous()
        assert torch.equal(between._rotated(x, cos, sin), expected)


def exactly(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    times = q.shape[1] // keys.shape[1]
    q, keys, values = q.double(), keys.double().repeat_interleave(times, 1), values.double().repeat_interleave(times, 1)
    scores = (q @ keys.transpose(2, 3)) * scale
    if mask is not None:
        seen = mask[:, None, None]
        scores = scores.masked_fill(~seen, -torch.inf) if mask.dtype == torch.bool else scores + seen.double()
    return scores.softmax(-1) @ values


@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 4, 2, 5, 64), (2, 6, 6, 33, 32), (2, 8, 2, 300, 80), (1, 12, 2, 37, 48), (1, 3, 1, 1, 256)], ids=str
)
def test_attention_of_one_token(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    B, H, G, P, D = shape
    q = random(B, 1, H, D).to(dtype).transpose(1, 2)
    keys, values = (
        random(B, G, P + 3, D, seed=1).to(dtype)[:, :, :P],
        random(B, P, G, D, seed=2).to(dtype).transpose(1, 2),
    )
    seen = random(B, P, seed=3) > -0.5
    seen[:, 0] = True
    added = torch.where(seen, random(B, P, seed=4), -torch.inf).to(dtype)
    for mask in (None, seen, added, seen[:1]):
        found = between.attended(q, keys, values, mask, D**-0.5)
        exact = exactly(q, keys, values, mask, D**-0.5)
        # Scores are off by less than D 2^-24 |q| |k| and so are weights, relatively; then one rounding.
        bound = units(dtype) / 2 * exact.abs() + 3e-5 * values.abs().max().double()
        assert ((found.double() - exact).abs() <= bound).all(), mask is None
    nothing = torch.zeros(B, P, dtype=torch.bool)
    assert (between.attended(q, keys, values, nothing, 1.0) == 0).all(), "as scaled_dot_product_attention has it"
    assert (between._attended(q, keys, values, nothing, 1.0) == 0).all()


def test_positions_before_and_after_all_that_a_mask_shows_are_not_read(isa: str) -> None:
    """A cache of fixed length is mostly empty. Sums are of sixteen positions at a time, and begin at one of these."""
    q, keys, values = random(1, 8, 1, 32), random(1, 2, 100, 32, seed=1), random(1, 2, 100, 32, seed=2)
    seen = torch.zeros(1, 100, dtype=torch.bool)
    seen[:, 35:50] = True
    unread = torch.ones(100, dtype=torch.bool)
    unread[32:64] = False
    for mask in (seen, torch.where(seen, random(1, 100, seed=3), -torch.inf)):
        here = between.attended(q, keys[:, :, 32:50], values[:, :, 32:50], mask[:, 32:50], 1.0)
        assert torch.equal(between.attended(q, keys, values, mask, 1.0), here)
        empty = keys.clone(), values.clone()
        for t in empty:
            t[:, :, unread] = torch.nan
        assert torch.equal(between.attended(q, *empty, mask, 1.0), here)


@dtypes
def test_heads_that_are_worked_on_together_have_the_bits_of_each_alone(isa: str, dtype: torch.dtype) -> None:
    q, keys, values = (random(1, n, p, 96, seed=n).to(dtype) for n, p in ((14, 1), (2, 77), (2, 77)))
    seen = random(1, 77, seed=3) > -0.5
    together = between.attended(q, keys, values, seen, 0.1)
    for h in range(14):
        of_group = slice(h // 7, h // 7 + 1)
        alone = between.attended(q[:, h : h + 1], keys[:, of_group], values[:, of_group], seen, 0.1)
        assert torch.equal(together[:, h : h + 1], alone)


def test_nan_and_far_scores_stay_where_they_are(isa: str) -> None:
    q, keys, values = random(1, 2, 1, 32), random(1, 1, 40, 32, seed=1), random(1, 1, 40, 32, seed=2)
    values[0, 0, 7, 3] = torch.nan
    found = between.attended(q, keys, values, None, 1.0)
    assert found[..., 3].isnan().all() and not found[..., 4:].isnan().any()
    keys[0, 0, 39] = torch.nan
    assert between.attended(q, keys, values, None, 1.0).isnan().all()
    q, keys, values = 100 * q, 100 * random(1, 1, 40, 32, seed=1), random(1, 1, 40, 32, seed=2)
    far = between.attended(q, keys, values, None, 1.0)
    assert torch.allclose(far.double(), exactly(q, keys, values, None, 1.0), atol=1e-5)


def test_bits_are_the_same_on_every_instruction_set_and_with_any_number_of_threads() -> None:
    status, found, threads = extension.status(), [], torch.get_num_threads()
    x, weight = random(40, 2048).bfloat16(), random(2048, seed=1).bfloat16()
    q, keys, values = (random(2, n, p, 64, seed=n).bfloat16() for n, p in ((8, 1), (2, 700), (2, 700)))
    try:
        for isa in status.isas:
            for count in (1, 3):
                extension.use_isa(isa)
                torch.set_num_threads(count)
                found.append(
                    [
                        between.rms_norm(x, weight, 1e-6, False),
                        between.gated(x, x + 1, True),
                        between.attended(q, keys, values, None, 0.125),
                    ]
                )
    finally:
        extension.use_isa(status.isa or "scalar")
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_they_are_ops_that_torch_accepts() -> None:
    x, weight, turn = random(2, 3, 32), random(32), random(1, 3, 32)
    heads, keys = random(2, 4, 1, 32), random(2, 2, 5, 32)
    for op, arguments in (
        (between.rms_norm, (x, weight, 1e-6, False)),
        (between.gated, (x, x, False)),
        (between.rotated, (x[:, None], turn, turn)),
        (between.attended, (heads, keys, keys, None, 1.0)),
    ):
        opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_what_does_not_fit_is_refused() -> None:
    x, heads, keys = random(2, 32), random(1, 4, 1, 32), random(1, 2, 5, 32)
    for op, arguments, words in (
        (between.rms_norm, (x, random(16), 1e-6, False), "n a multiple of 16"),
        (between.rms_norm, (x, random(32).half(), 1e-6, False), "weight must have the dtype"),
        (between.rms_norm, (x.double(), random(32).double(), 1e-6, False), "must be float32, bfloat16 or float16"),
        (between.gated, (x, x[:1], False), "one shape"),
        (between.rotated, (x[None, None], random(1, 3, 32), random(1, 3, 32)), "contiguous .B or 1, T, D."),
        (between.attended, (heads, random(1, 3, 5, 32), random(1, 3, 5, 32), None, 1.0), "share keys evenly"),
        (between.attended, (heads, keys, keys, torch.ones(1, 4), 1.0), "mask must be contiguous"),
        (between.attended, (random(1, 4, 2, 32), keys, keys, None, 1.0), "must be .B, H, 1, D."),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*arguments)
