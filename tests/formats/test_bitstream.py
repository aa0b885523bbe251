"""Stream(b) against a bit-by-bit definition, and the pictures in its description."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels.errors import ArgumentError
from qkernels.formats.bitstream import pack, pack_bytes, unpack, unpack_bytes, word_count


def words_by_definition(codes: list[int], bits: int) -> list[int]:
    """Element i has bits b*i … b*i + b - 1 of one long little-endian number."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return [(number >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]


def unsigned(words: torch.Tensor) -> list[int]:
    return [int(w) & 0xFFFFFFFF for w in words.flatten()]


@given(bits=st.integers(2, 8), data=st.data())
def test_pack_is_the_definition_and_unpack_its_inverse(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=100))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert unsigned(packed) == words_by_definition(codes, bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@given(bits=st.integers(2, 8), shape=st.lists(st.integers(0, 4), max_size=2), count=st.integers(0, 70))
def test_leading_dimensions_and_strides(bits: int, shape: list[int], count: int) -> None:
    codes = torch.randint(0, 2**bits, (*shape, count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert list(packed.shape) == [*shape, word_count(count, bits)]
    assert torch.equal(unpack(packed, bits, count), codes)
    strided = torch.stack([codes, codes], -1)[..., 0]
    assert torch.equal(pack(strided, bits), packed)
    words = torch.stack([packed, packed], -1)[..., 0]
    assert torch.equal(unpack(words, bits, count), codes)


@given(bits=st.integers(2, 8), count=st.integers(0, 70))
def test_bytes_are_the_same_stream_cut_to_whole_bytes(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, count), dtype=torch.uint8)
    data = pack_bytes(codes, bits)
    assert data.dtype == torch.uint8
    assert list(data.shape) == [2, 3, -(-count * bits // 8)]
    assert torch.equal(unpack_bytes(data, bits, count), codes)
    number = sum(int(byte) << (8 * i) for i, byte in enumerate(data[1, 2]))
    assert number == sum(int(code) << (bits * i) for i, code in enumerate(codes[1, 2]))


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (0, (0b111, 0, 0)),
        (9, (0b111 << 27, 0, 0)),
        (10, (0b11 << 30, 0b1, 0)),
        (11, (0, 0b111 << 1, 0)),
        (20, (0, 0b111 << 28, 0)),
        (21, (0, 0b1 << 31, 0b11)),
        (22, (0, 0, 0b111 << 2)),
        (31, (0, 0, 0b111 << 29)),
    ],
)
def test_where_3_bit_codes_lie(position: int, words: tuple[int, int, int]) -> None:
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[position] = 7
    assert unsigned(pack(codes, 3)) == list(words)


def test_fill_completes_the_last_word() -> None:
    assert unsigned(pack(torch.tensor([1, 2, 3]), 4, fill=7)) == [0x77777321]
    assert unsigned(pack(torch.tensor([1, 2, 3]), 4)) == [0x321]


def test_meta_gives_shapes() -> None:
    codes = torch.empty(5, 70, dtype=torch.uint8, device="meta")
    packed = pack(codes, 3)
    assert packed.is_meta
    assert list(packed.shape) == [5, 7]
    assert list(unpack(packed, 3, 70).shape) == [5, 70]


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ArgumentError, match=f"bits must be 2 to 8, got {bits}"):
        pack(torch.zeros(4, dtype=torch.uint8), bits)


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match=r"10 codes of 4 bits need 2 words \(int32\), got torch.int32 \[1\]"):
        unpack(torch.zeros(1, dtype=torch.int32), 4, 10)
    with pytest.raises(ArgumentError, match=r"need 1 words \(int32\), got torch.int64"):
        unpack(torch.zeros(1, dtype=torch.int64), 4, 8)
    with pytest.raises(ArgumentError, match=r"9 codes of 4 bits need 5 bytes \(uint8\), got torch.uint8 \[4\]"):
        unpack_bytes(torch.zeros(4, dtype=torch.uint8), 4, 9)
    with pytest.raises(ArgumentError, match=r"codes and words are integers, got torch\.float32"):
        pack(torch.zeros(4), 4)
