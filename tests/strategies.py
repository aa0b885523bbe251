"""Random schemes and weights: hypothesis strategies, and seeded makers for parametrized tests."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from qkernels import QuantScheme, QuantTensor
from qkernels.codebooks import INTEGER_STEPS, width_of
from qkernels.factors import Factors, as_bytes
from qkernels.group_index import validated_group_index
from qkernels.layouts import Layout
from qkernels.scheme import ACTIVATIONS, CODEBOOKS, FACTORS, FactorKind


def schemes(
    group_sizes: tuple[int | str, ...] = (1, 8, 16, 32, 128, "channel", "tensor"),
) -> st.SearchStrategy[QuantScheme]:
    """Every valid scheme over the given group sizes, codebooks and int8 activations included."""
    integers = st.builds(
        QuantScheme,
        bits=st.integers(2, 8),
        group_size=st.sampled_from(group_sizes),
        zeros=st.sampled_from(["none", "int", "float", "offset"]),
        act=st.sampled_from(list(ACTIVATIONS)),
    )
    groups = st.sampled_from(group_sizes)
    books = st.one_of(
        *(
            st.builds(QuantScheme, bits=st.just(width_of(name)), group_size=groups, codebook=st.just(name))
            for name in CODEBOOKS
        )
    )
    integer_books = st.builds(
        QuantScheme, group_size=groups, act=st.just("int8"), codebook=st.sampled_from(list(INTEGER_STEPS))
    )
    named = [QuantScheme.parse(text) for kind in FACTORS.values() for text in kind.spelling]
    factored = st.sampled_from([*named, QuantScheme.parse("q4_k_a8"), QuantScheme.parse("iq4_xs_a8")])
    blocks = st.sampled_from(
        [QuantScheme.parse(text) for text in ("fp8_block128", "w4a16_block16_asym", "w8a8_block32")]
    )
    return st.one_of(integers, books, integer_books, factored, blocks)


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    """So that NaN, which tables of floating codes hold, is equal to itself. A copy: one entry alone may have any strides."""
    return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def random_weight(
    scheme: QuantScheme | str,
    N: int,
    K: int,
    seed: int = 0,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    exact: bool = False,
    experts: tuple[int, ...] = (),
) -> QuantTensor:
    """A weight with random codes, scales and zeros.

    Args:
        act_order: give it a random group_index.
        dtype: of scales and floating zeros.
        exact: scales are powers of two and floating zeros are multiples of them, so that integer inputs give results
            without rounding.
    """
    scheme = QuantScheme.parse(scheme)
    activation = ACTIVATIONS[scheme.act]
    static = torch.tensor([0.03125, 7.0 if activation.zero_points else 0.0]) if activation.static else None
    g = torch.Generator().manual_seed(seed)
    G = scheme.num_groups(K)
    shape = (*experts, N, G)
    codes = torch.randint(0, scheme.max_code + 1, (*experts, N, K), generator=g).to(torch.uint8)
    if scheme.codebook is not None:
        numbers = [code for code, value in enumerate(CODEBOOKS[scheme.codebook]) if math.isfinite(value)]
        codes = torch.tensor(numbers, dtype=torch.uint8)[torch.randint(len(numbers), codes.shape, generator=g)]
    group_index = None
    if act_order and K > 1:
        natural = torch.arange(K, dtype=torch.int32) // scheme.group_length(K)
        group_index = validated_group_index(natural[torch.randperm(K, generator=g)], K, scheme)
    if scheme.factors is not None:
        factors = random_factors(
            FACTORS[scheme.factors], shape, g, torch.float32 if dtype == torch.float8_e8m0fnu else dtype, exact
        )
        return QuantTensor.from_factors(codes, factors, scheme, group_index, static)
    if exact:
        scales = torch.full(shape, 0.25) * (1 - 2 * torch.randint(0, 2, shape, generator=g))
    else:
        scales = (torch.rand(shape, generator=g) + 0.5) * 0.02
    if scheme.rows > 1:
        scales = scales[..., :: scheme.rows, :].repeat_interleave(scheme.rows, dim=-2)[..., :N, :]
    if dtype == torch.float8_e8m0fnu:
        scales = scales.abs()
    if scheme.group_size == "tensor":
        scales = scales[..., :1, :1].expand(shape).contiguous()
    zeros = None
    if scheme.zeros == "int":
        zeros = torch.randint(0, scheme.max_code + 1, shape, generator=g).to(torch.uint8)
    elif scheme.zeros == "float":
        zeros = (torch.randint(0, 2 * scheme.max_code, shape, generator=g) / 2).to(dtype)
    elif scheme.zeros == "offset":
        zeros = (torch.randint(-scheme.max_code, scheme.max_code, shape, generator=g) * (0.25 if exact else 0.013)).to(
            dtype
        )
    return QuantTensor(codes, scales.to(dtype), zeros, group_index, scheme, x_static=static)


def random_factors(
    kind: FactorKind, shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype, exact: bool
) -> Factors:
    """Factors for scales of a shape `[..., N, G]`; exact: a few small integers under powers of two."""
    outer = (*shape[:-1], kind.outer_groups(shape[-1]))
    low, high = (max(kind.low, -3), min(kind.high, 3)) if exact else (kind.low, kind.high)

    def small() -> torch.Tensor:
        if kind.small == "float8_e4m3fn":
            return (torch.rand(shape, generator=g) * (0 if exact else 300) + 2).to(torch.float8_e4m3fn)
        return torch.randint(low, high + 1, shape, generator=g).to(getattr(torch, kind.small))

    def large() -> torch.Tensor:
        unit = 4.0 if kind.divides else 0.25
        return (
            torch.full(outer, unit)
            if exact
            else (torch.rand(outer, generator=g) + 0.5) * (50 if kind.divides else 0.002)
        ).to(dtype)

    if kind.zeros == "none":
        return Factors(small(), large())
    return Factors(small(), large(), small(), large())


def same_weight(a: QuantTensor, b: QuantTensor) -> bool:
    """Bit for bit the same codes, scales, zeros, group index and scheme."""

    def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(as_bytes(x), as_bytes(y))

    if (a.factors is None) != (b.factors is None):
        return False
    if a.factors is not None and b.factors is not None:
        names = ("small", "outer", "small_zeros", "outer_zeros")
        if not all(same(getattr(a.factors, name), getattr(b.factors, name)) for name in names):
            return False
    return a.scheme == b.scheme and all(
        same(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "zeros", "group_index", "x_static")
    )


def scheme_taken(layout: Layout, *schemes: str) -> str:
    """The first of the schemes that the layout can hold."""
    return next(s for s in schemes if not layout.reasons(64, 96, QuantScheme.parse(s)))
