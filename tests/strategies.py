"""Random schemes and weights: hypothesis strategies, and seeded makers for parametrized tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from qkernels import QuantScheme, QuantTensor
from qkernels.layouts import Layout
from qkernels.scheme import ACTIVATIONS
from qkernels.tensor import validated_group_index


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
    nf4 = st.builds(QuantScheme, group_size=st.sampled_from(group_sizes), codebook=st.just("nf4"))
    return st.one_of(integers, nf4)


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
    g = torch.Generator().manual_seed(seed)
    G = scheme.num_groups(K)
    shape = (*experts, N, G)
    codes = torch.randint(0, scheme.max_code + 1, (*experts, N, K), generator=g).to(torch.uint8)
    if exact:
        scales = torch.full(shape, 0.25) * (1 - 2 * torch.randint(0, 2, shape, generator=g))
    else:
        scales = (torch.rand(shape, generator=g) + 0.5) * 0.02
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
    group_index = None
    if act_order and K > 1:
        natural = torch.arange(K, dtype=torch.int32) // scheme.group_length(K)
        group_index = validated_group_index(natural[torch.randperm(K, generator=g)], K, scheme)
    return QuantTensor(codes, scales.to(dtype), zeros, group_index, scheme)


def same_weight(a: QuantTensor, b: QuantTensor) -> bool:
    """Bit for bit the same codes, scales, zeros, group index and scheme."""

    def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(x, y)

    return a.scheme == b.scheme and all(
        same(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "zeros", "group_index")
    )


def scheme_taken(layout: Layout, *schemes: str) -> str:
    """The first of the schemes that the layout can hold."""
    return next(s for s in schemes if not layout.reasons(64, 96, QuantScheme.parse(s)))
