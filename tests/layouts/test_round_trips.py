"""Every layout gives back, bit for bit, any weight that it takes, and says why it does not take the others."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qkernels import QuantScheme, QuantTensor
from qkernels.errors import ArgumentError, ConversionError, TensorError
from qkernels.layouts import LAYOUTS, Layout, get_layout, unpack_checked
from qkernels.scheme import ACTIVATIONS
from tests.strategies import random_weight, same_weight, scheme_taken, schemes

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@layouts
@settings(max_examples=150, deadline=None)
@given(
    scheme=schemes((1, 8, 16, 24, 32, 64, 128, "channel", "tensor")),
    N=st.integers(0, 70),
    K=st.integers(0, 300),
    act_order=st.booleans(),
    experts=st.sampled_from([(), (2,), (0,), (2, 3)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_unpack_inverts_pack(
    layout: Layout,
    scheme: QuantScheme,
    N: int,
    K: int,
    act_order: bool,
    experts: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
) -> None:
    assume(not experts or not ACTIVATIONS[scheme.act].static)
    weight = random_weight(scheme, N, K, seed=seed, act_order=act_order, dtype=dtype, experts=experts)
    if layout.reasons(N, K, scheme):
        with pytest.raises(ConversionError, match=f"layout {layout.name} cannot hold"):
            layout.pack(weight)
        return
    packed = layout.pack(weight)
    assert same_weight(layout.unpack(packed, N, K, scheme), weight)
    on_meta = layout.pack(weight.to("meta"))
    for name, t in packed.items():
        meta = on_meta[name]
        assert (t is None) == (meta is None)
        assert t is None or meta is None or (t.shape, t.dtype, t.stride()) == (meta.shape, meta.dtype, meta.stride())
    assert layout.unpack(on_meta, N, K, scheme).codes.shape == weight.codes.shape


@layouts
@pytest.mark.parametrize("bits", range(2, 9))
def test_strided_codes_and_groups(layout: Layout, bits: int) -> None:
    """Tensors as they come out of a file's transposes and slices."""
    scheme = scheme_taken(layout, f"w{bits}a16_g32_asym", f"w{bits}a8_g32")
    dense = random_weight(scheme, 40, 96, act_order=True)
    strided = QuantTensor(
        dense.codes.T.contiguous().T,
        torch.stack([dense.scales, dense.scales], -1)[..., 0],
        None if dense.zeros is None else dense.zeros.T.contiguous().T,
        torch.stack([dense.group_index, dense.group_index], -1)[:, 1],  # type: ignore[list-item]
        dense.scheme,
    )
    tensors = (strided.codes, strided.scales, strided.zeros, strided.group_index)
    assert not any(t.is_contiguous() for t in tensors if t is not None)
    packed, expected = layout.pack(strided), layout.pack(dense)
    assert all(t is None or torch.equal(t, expected[name]) for name, t in packed.items())  # type: ignore[arg-type]
    assert same_weight(layout.unpack(packed, 40, 96, dense.scheme), dense)


@layouts
def test_a_natural_group_index_that_is_spelled_out_survives(layout: Layout) -> None:
    plain = random_weight(scheme_taken(layout, "w4a16_g32", "w4a8_g32"), 8, 96)
    weight = QuantTensor(plain.codes, plain.scales, None, torch.arange(96, dtype=torch.int32) // 32, plain.scheme)
    assert same_weight(layout.unpack(layout.pack(weight), 8, 96, weight.scheme), weight)


def test_unknown_layouts_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"must be one of reference, reference_a8, cpu_tile_a16.*got 'mma'"):
        get_layout("mma")


# --- cpu_tile_a16 -----------------------------------------------------------------------------------------------------------

TILES = get_layout("cpu_tile_a16")


# Columns of a block, and the widths of its planes (3 bits: of its codes), as csrc/cpu/kernels.h has them.
BLOCKS = {2: (16, (2,)), 3: (32, (3,)), 4: (8, (4,)), 5: (32, (4, 1)), 6: (16, (4, 2)), 7: (8, (8,)), 8: (8, (8,))}


def three_by_contract(octet: int, column: int, int8: bool) -> list[tuple[int, int]]:
    """(line, bit) of the three bits of a code."""
    if int8:
        quad, byte = column // 4, 8 * (column % 4)
        if octet < 3:
            return [(octet, byte + 3 * quad + i) for i in range(3)]
        return [(quad, byte + 6), (quad, byte + 7), (2, byte + 6 + quad)]
    pair, word = column // 2, 16 * (column % 2)
    if octet < 3:
        return [(octet, word + 3 * pair + i) for i in range(3)]
    return [(pair, word + 12 + i) for i in range(3)] if pair < 3 else [(i, word + 15) for i in range(3)]


def code_by_contract(qweight: torch.Tensor, bits: int, row: int, k: int, int8: bool) -> int:
    """One code, by the words of the contract: block after block, plane after plane, a line of 32 lanes after the other."""
    block, widths = BLOCKS[bits]
    if bits == 3:
        places = three_by_contract(k % 32 // 8, k % 8, int8)
        of_row = qweight[row // 32].view(-1, 3, 32, 4)[k // 32, :, row % 32].tolist()
        return sum((of_row[line][bit // 8] >> bit % 8 & 1) << i for i, (line, bit) in enumerate(places))
    at, code, low = k // block * block * 4 * sum(widths), 0, 0
    for width in widths:
        line, i = divmod(k % block, 32 // width)
        first = at + (line * 32 + row % 32) * 4
        word = int.from_bytes(bytes(qweight[row // 32, first : first + 4].tolist()), "little")
        bit = 8 * (i & 3) + width * (i >> 2) if int8 else 16 * (i & 1) + width * (i >> 1)
        code |= (word >> bit & ((1 << width) - 1)) << low
        at, low = at + block * 4 * width, low + width
    return code


@pytest.mark.parametrize("layout", ["cpu_tile_a16", "cpu_tile_a8"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bytes_are_those_of_the_contract(bits: int, layout: str) -> None:
    int8 = layout == "cpu_tile_a8"
    weight = random_weight(f"w{bits}a{8 if int8 else 16}_g8", 37, 44, act_order=True)
    order, qweight = weight.k_order(), get_layout(layout).pack(weight)["qweight"]
    block, widths = BLOCKS[bits]
    K_pad = -(-44 // block) * block
    assert order is not None
    assert qweight is not None
    assert list(qweight.shape) == [2, K_pad * 4 * sum(widths)]
    for row in (0, 1, 15, 16, 31, 32, 36, 37, 63):
        for k in range(K_pad):
            expected = int(weight.codes[row, order[k]]) if row < 37 and k < 44 else 0
            assert code_by_contract(qweight, bits, row, k, int8) == expected, (row, k)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bytes_of_kpack_are_those_of_the_contract(bits: int) -> None:
    """By its table: lines of bytes of each block, lowest plane first; field f of the narrowest plane is run f of columns."""
    block, run, lines = {
        2: (64, 16, [2]), 3: (128, 16, [2, 2, 1]), 4: (64, 32, [4]), 5: (128, 16, [4, 4, 4, 4, 1]), 6: (64, 16, [4, 4, 2]),
        7: (64, 64, [8]), 8: (64, 64, [8]),
    }[bits]  # fmt: skip
    weight = random_weight(f"w{bits}a16_g8", 67, 300, act_order=True)
    order, qweight = weight.k_order(), get_layout("kpack").pack(weight)["qweight"]
    assert order is not None
    assert qweight is not None
    K_pad = -(-300 // block) * block
    assert list(qweight.shape) == [2, 64, K_pad * (8 if bits == 7 else bits) // 8]
    for row, k in itertools.product((0, 1, 63, 64, 66, 67), range(K_pad)):
        first = k // block * run * len(lines)
        code = low = 0
        for width in sorted(set(lines), reverse=True):
            line, field = divmod(k % block // run, 8 // width)
            line += lines.index(width)
            byte = int(qweight[row // 64, row % 64, first + line * run + k % run])
            code |= (byte >> field * width & ((1 << width) - 1)) << low
            low += width
        assert code == (int(weight.codes[row, order[k]]) if row < 67 and k < 300 else 0), (row, k)


# What takes more than 4 % more than the information of a weight of whole tiles: codes of 7 bits take 8, integer zeros beside
# codes of 2 and 3 bits in short groups lie in bytes, and so do the factors of Q2_K, of 4 bits.
_FAT = {f"w7a16_g{group}{zeros}": 8 / 7 for group in (32, 128) for zeros in ("", "_asym")} | {
    "w2a16_g32_asym": 1.08, "q2_k": 1.2,
}  # fmt: skip
_FAT |= {"w3a16_g32_asym": 1.06}
FAT = {"cpu_tile_a16": _FAT, "cpu_tile_a8": _FAT, "kpack": _FAT}


@pytest.mark.parametrize("scheme", [
    *(f"w{bits}a16_g{group}{zeros}" for bits in range(2, 9) for group in (32, 128) for zeros in ("", "_asym")),
    "nf4_g64", "mxfp4_g32", "fp8_channel", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "nvfp4_g16",
])  # fmt: skip
def test_packed_weights_take_the_bytes_of_their_codes(scheme: str) -> None:
    for layout, fat in FAT.items():
        text = scheme.replace("a16", "a8") if layout == "cpu_tile_a8" else scheme
        parsed = QuantScheme.parse(text)
        if get_layout(layout).reasons(256, 1024, parsed):
            continue
        weight = random_weight(
            parsed, 256, 1024, dtype=torch.float8_e8m0fnu if scheme == "mxfp4_g32" else torch.float16
        )
        buffers = get_layout(layout).pack(weight)
        packed = sum(t.numel() * t.element_size() for name, t in buffers.items() if t is not None and name != "table")
        assert weight.nbytes <= packed <= weight.nbytes * fat.get(scheme, 1.04), (layout, packed / weight.nbytes)
        if scheme in fat:
            assert packed > weight.nbytes * 1.04, "no longer so fat"


@pytest.mark.parametrize("layout", ["cpu_tile_a16", "cpu_tile_a8"])
@pytest.mark.parametrize(("version", "bits"), [*((1, bits) for bits in range(2, 9)), (2, 3)])
def test_what_was_packed_with_wider_codes_is_read(layout: str, version: int, bits: int) -> None:
    """Version 1 by its own words: every code in 4 or 8 bits, an octet in one lane or two; so were 3 bits in version 2."""
    int8 = layout == "cpu_tile_a8"
    weight = random_weight(f"w{bits}a{8 if int8 else 16}_g8_asym", 37, 44)
    width, lanes = (4, 6) if bits <= 4 else (8, 12)
    old = torch.zeros(2, lanes * 128, dtype=torch.uint8)
    for row, k in itertools.product(range(37), range(44)):
        lane, i = divmod(k, 32 // width)
        bit = 8 * (i & 3) + width * (i >> 2) if int8 else 16 * (i & 1) + width * (i >> 1)
        old[row // 32, (lane * 32 + row % 32) * 4 + bit // 8] |= int(weight.codes[row, k]) << bit % 8
    value = get_layout(layout)
    packed = value.pack(weight)
    upgraded = value.upgraded(version, packed | {"qweight": old}, 37, 44, weight.scheme)
    for name, t in packed.items():
        assert t is None or torch.equal(upgraded[name], t), name
    short = packed | {"qweight": old[:, :-1]}
    with pytest.raises(TensorError, match="qweight must be uint8"):
        unpack_checked(value, value.upgraded(version, short, 37, 44, weight.scheme), 37, 44, weight.scheme)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("scheme", [*(f"w{bits}a16_g8_asym" for bits in range(2, 9)), "nf4_g8", "q3_k", "q6_k"])
def test_what_kpack_was_before_it_had_planes_is_read(scheme: str, version: int) -> None:
    """By the words of versions 1 and 2: a nibble (column j and, above it, j + 32 of 64) or a byte a code; 1 had the table of a
    codebook in the place of zeros."""
    weight, value = random_weight(scheme, 37, 300), get_layout("kpack")
    wide = torch.zeros(64, 320, dtype=torch.uint8)
    wide[:37, :300] = weight.codes
    halves = wide.view(64, 5, 2, 32)
    old = wide if weight.scheme.bits > 4 else (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(64, 160)
    packed = value.pack(weight)
    given = packed | {"qweight": old[None].clone()}
    if version == 1 and weight.scheme.codebook is not None:
        given |= {"zeros": given.pop("table")}
    upgraded = value.upgraded(version, given, 37, 300, weight.scheme)
    assert all(t is None or torch.equal(upgraded[name], t) for name, t in packed.items())  # type: ignore[arg-type]
    assert same_weight(unpack_checked(value, upgraded, 37, 300, weight.scheme), weight)
    short = given | {"qweight": old[None, :, :-1]}
    with pytest.raises(TensorError, match="qweight must be uint8"):
        unpack_checked(value, value.upgraded(version, short, 37, 300, weight.scheme), 37, 300, weight.scheme)


def test_columns_are_sorted_by_group_and_padding_is_zero() -> None:
    weight = random_weight("w4a16_g16_offset", 33, 40, act_order=True)
    packed = TILES.pack(weight)
    order, scales, zeros = packed["k_order"], packed["scales"], packed["zeros"]
    assert order is not None
    assert scales is not None
    assert zeros is not None
    groups = weight.column_groups()[order.long()].tolist()
    assert all(a <= b for a, b in pairwise(groups))
    assert list(scales.shape) == list(zeros.shape) == [2, 3, 32]
    assert torch.equal(scales[0, 2], weight.scales[:32, 2])
    assert torch.equal(zeros[1, :, 0], weight.zeros[32])  # type: ignore[index]
    assert not scales[1, :, 1:].any()
    assert not zeros[1, :, 1:].any()


@pytest.mark.parametrize(
    ("scheme", "K", "reason"),
    [
        ("w4a8_g32", 64, "8-bit activations"),
        ("w4a16_g12", 64, "group_size 12 is not a multiple of 8"),
        ("w4a16_g1", 2, "group_size 1 is not a multiple of 8"),
    ],
)
def test_reasons(scheme: str, K: int, reason: str) -> None:
    assert any(reason in text for text in TILES.reasons(32, K, QuantScheme.parse(scheme)))
    with pytest.raises(ConversionError, match=reason):
        TILES.pack(random_weight(scheme, 32, K))


@pytest.mark.parametrize("scheme", ["w4a16_g12", "w4a16_channel", "w8a16_tensor"])
def test_a_single_group_may_have_any_length(scheme: str) -> None:
    assert TILES.reasons(32, 11, QuantScheme.parse(scheme)) == []
    weight = random_weight(scheme, 5, 11)
    assert same_weight(TILES.unpack(TILES.pack(weight), 5, 11, weight.scheme), weight)
