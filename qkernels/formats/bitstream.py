"""Stream(b): codes of b bits in a little-endian bit stream, the packing that most checkpoint formats share.

Element i of the last dimension has bits b*i … b*i + b - 1, counted from bit 0 of the first byte. In int32 words, which are
the same bytes on a little-endian machine, a code straddles two words where b does not divide 32:

    b = 3    word 0   codes 0-9 at bit 3j, low 2 bits of code 10 at bit 30
             word 1   high bit of code 10 at bit 0, codes 11-20, low bit of code 21 at bit 31
             word 2   high 2 bits of code 21, codes 22-31

Work is done on blocks of 8 / gcd(b, 8) codes, the least that fill whole bytes (b / gcd(b, 8) of them), so that 2-, 4- and
8-bit codes never meet the straddling case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ArgumentError


def word_count(count: int, bits: int) -> int:
    """int32 words that `count` codes take: ceil(count * bits / 32)."""
    return -(-count * bits // 32)


def byte_count(count: int, bits: int) -> int:
    """Bytes that `count` codes take: ceil(count * bits / 8)."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int, fill: int = 0) -> Tensor:
    """Pack the last dimension into int32 words, bit patterns of uint32.

    Args:
        codes: integers 0 … 2^bits - 1 of any integer dtype, `[..., n]`.
        bits: 2 to 8.
        fill: the code that fills the rest of the last word (its topmost, partial field is cut).

    Returns:
        int32 `[..., ceil(n * bits / 32)]`.

    Raises:
        ArgumentError: bits out of range, or a floating dtype.
    """
    _check(codes, bits)
    filled = pad(codes, (0, -codes.shape[-1] % 32), value=fill)  # 32 codes fill whole words, and whole blocks
    words = torch.zeros(*codes.shape[:-1], word_count(filled.shape[-1], bits), dtype=torch.int32, device=codes.device)
    _write(words.view(torch.uint8), filled, bits)
    return words[..., : word_count(codes.shape[-1], bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 codes `[..., count]`.

    Raises:
        ArgumentError: bits out of range, a dtype other than int32, or too few words for `count` codes.
    """
    _check(words, bits)
    needed = word_count(count, bits)
    if words.dtype != torch.int32 or words.shape[-1] < needed:
        raise ArgumentError(
            f"{count} codes of {bits} bits need {needed} words (int32), got {words.dtype} {list(words.shape)}"
        )
    # A copy even where the words are contiguous: with 0 or 1 of them the strides may be such that no view accepts them.
    fresh = words[..., :needed].clone(memory_format=torch.contiguous_format)
    return _read(fresh.view(torch.uint8), bits, count)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """The same stream cut to whole bytes: uint8 `[..., ceil(n * bits / 8)]`."""
    _check(codes, bits)
    filled = pad(codes, (0, -codes.shape[-1] % 8))
    data = torch.zeros(*codes.shape[:-1], byte_count(filled.shape[-1], bits), dtype=torch.uint8, device=codes.device)
    _write(data, filled, bits)
    return data[..., : byte_count(codes.shape[-1], bits)].contiguous()


def unpack_bytes(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bytes`.

    Raises:
        ArgumentError: bits out of range, a dtype other than uint8, or too few bytes for `count` codes.
    """
    _check(data, bits)
    needed = byte_count(count, bits)
    if data.dtype != torch.uint8 or data.shape[-1] < needed:
        raise ArgumentError(
            f"{count} codes of {bits} bits need {needed} bytes (uint8), got {data.dtype} {list(data.shape)}"
        )
    return _read(data[..., :needed], bits, count)


def _write(data: Tensor, codes: Tensor, bits: int) -> None:
    """Whole blocks of codes into bytes that are zero."""
    block, size = _block(bits)
    blocks = codes.shape[-1] // block
    rows, target = codes.to(torch.uint8).unflatten(-1, (blocks, block)), data.unflatten(-1, (blocks, size))
    for j in range(block):
        byte, shift = divmod(bits * j, 8)
        target[..., byte] |= rows[..., j] << shift  # what leaves the byte is dropped …
        if shift + bits > 8:
            target[..., byte + 1] |= rows[..., j] >> (8 - shift)  # … and belongs into the next


def _read(data: Tensor, bits: int, count: int) -> Tensor:
    block, size = _block(bits)
    blocks = -(-count // block)
    rows = pad(data, (0, max(0, blocks * size - data.shape[-1])))[..., : blocks * size].unflatten(-1, (blocks, size))
    codes = torch.empty(*rows.shape[:-1], block, dtype=torch.uint8, device=data.device)
    mask = 2**bits - 1
    for j in range(block):
        byte, shift = divmod(bits * j, 8)
        code = rows[..., byte] >> shift
        if shift + bits > 8:
            code = code | rows[..., byte + 1] << (8 - shift)
        codes[..., j] = code & mask
    return codes.flatten(-2)[..., :count].contiguous()


def _block(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and how many bytes those are."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _check(tensor: Tensor, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ArgumentError(f"bits must be 2 to 8, got {bits}")
    if tensor.is_floating_point():
        raise ArgumentError(f"codes and words are integers, got {tensor.dtype}")
