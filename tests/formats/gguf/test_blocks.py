"""Every block type against gguf-py's weights, bit for bit, and taken apart and put together again."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qkernels.errors import ArgumentError, TensorError
from qkernels.formats.gguf import BLOCK_TYPES, EXACT_SCHEMES, block_type, blocks_of, dequantize, parts_of, weight_of
from qkernels.formats.gguf.parts import E2M1_TABLE, IQ4_TABLE
from qkernels.storage.gguf_types import GGML_TYPES
from tests.gguf_blocks import bits_of, of_type

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "gguf" / "blocks.json").read_text())
GGML = json.loads((Path(__file__).parents[2] / "golden" / "gguf" / "ggml.json").read_text(encoding="utf-8"))
# gguf-py 0.19.0 decodes none of these; ggml itself, the last two. All are held to the formulas of the format, below.
NOT_IN_GGUF_PY = {"Q8_1", "Q8_K", "Q1_0", "Q2_0"}
SPLITTING = [name for name, block in BLOCK_TYPES.items() if block.split is not None]


def finite_blocks(name: str, count: int = 6, seed: int = 0) -> Tensor:
    """Random blocks whose weights are numbers."""
    generator = torch.Generator().manual_seed(seed)
    size = GGML_TYPES[name].nbytes
    blocks = torch.randint(0, 256, (20 * count, size), generator=generator, dtype=torch.uint8)
    return blocks[torch.isfinite(dequantize(blocks, name)).all(1)][:count]


@pytest.mark.parametrize("name", sorted(GOLDEN["types"]))
def test_weights_are_those_of_gguf_py(name: str) -> None:
    golden, blocks = GOLDEN["types"][name], of_type(name)
    if name in BLOCK_TYPES:
        values = dequantize(blocks, name)
    else:
        dtype = GGML_TYPES[name].dtype
        assert dtype is not None
        values = blocks.view(dtype).float()
    bits = bits_of(values)
    assert [f"{x & 0xFFFFFFFF:08x}" for x in bits[golden["block"], :8].tolist()] == golden["begins"]
    assert hashlib.sha256(bits.numpy().tobytes()).hexdigest() == golden["sha256"]


@pytest.mark.parametrize("name", sorted(GGML["types"]))
def test_weights_are_those_of_ggml(name: str) -> None:
    golden = GGML["types"][name]
    assert (golden["elements"], golden["nbytes"]) == (GGML_TYPES[name].elements, GGML_TYPES[name].nbytes)
    if name in ("Q8_1", "Q8_K"):
        assert "sha256" not in golden  # types of activations: ggml has no way back
    else:
        assert (
            hashlib.sha256(bits_of(dequantize(of_type(name), name)).numpy().tobytes()).hexdigest() == golden["sha256"]
        )


def test_every_type_is_in_the_golden_file_or_said_not_to_be() -> None:
    assert {*GOLDEN["types"], *NOT_IN_GGUF_PY} == {*BLOCK_TYPES, "F16", "BF16"}
    assert GGML["types"].keys() == BLOCK_TYPES.keys()
    plain = {name for name, ggml in GGML_TYPES.items() if ggml.dtype is not None}
    assert {*BLOCK_TYPES, *plain} == {*GGML_TYPES}
    sizes = {name: [ggml.id, ggml.elements, ggml.nbytes] for name, ggml in GGML_TYPES.items()}
    assert sizes.pop("Q8_1") == [9, 32, 36]  # gguf-py says 40, which is llama.cpp's of 2023
    assert sizes.pop("Q2_0") == [42, 64, 18]  # newer than gguf-py 0.19.0
    assert sizes == GOLDEN["sizes"]


# --- by the formulas of the format, element by element -----------------------------------------------------------------


def half(block: list[int], at: int) -> float:
    value: float = struct.unpack("<e", bytes(block[at : at + 2]))[0]
    return value


def element(name: str, b: list[int], e: int) -> float:
    """Weight e of a block, from the description of the type."""
    if name == "Q1_0":
        return half(b, 0) if b[2 + e // 8] >> (e % 8) & 1 else -half(b, 0)
    if name == "Q2_0":
        return half(b, 0) * ((b[2 + e // 4] >> 2 * (e % 4) & 3) - 1)
    if name == "Q8_1":
        return half(b, 0) * struct.unpack("b", bytes(b[4 + e : 5 + e]))[0]
    if name == "Q8_K":
        return struct.unpack("<f", bytes(b[:4]))[0] * struct.unpack("b", bytes(b[4 + e : 5 + e]))[0]
    if name == "MXFP4":
        code = b[1 + e % 16] >> 4 * (e // 16) & 15
        return E2M1_TABLE[code] * 2.0 ** (b[0] - 128)
    if name == "Q4_K":
        scales, j = b[4:16], e // 32
        if j < 4:
            scale, minimum = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
            minimum = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4
        code = b[16 + 32 * (e // 64) + e % 32] >> 4 * (e % 64 // 32) & 15
        return half(b, 0) * scale * code - half(b, 2) * minimum
    assert name == "IQ4_XS"
    i = e // 32
    scale = (b[4 + i // 2] >> 4 * (i % 2) & 15) | ((b[2] | b[3] << 8) >> 2 * i & 3) << 4
    code = b[8 + 16 * i + e % 16] >> 4 * (e % 32 // 16) & 15
    return half(b, 0) * (scale - 32) * IQ4_TABLE[code]


@pytest.mark.parametrize("name", [*sorted(NOT_IN_GGUF_PY), "MXFP4", "Q4_K", "IQ4_XS"])
def test_weights_are_those_of_the_description(name: str) -> None:
    for block, weights in zip(blocks := finite_blocks(name), dequantize(blocks, name), strict=True):
        expected = [element(name, block.tolist(), e) for e in range(len(weights))]
        assert all(
            math.isclose(w, x, rel_tol=3e-7, abs_tol=1e-9) for w, x in zip(weights.tolist(), expected, strict=True)
        )
    assert len(blocks) == 6


# --- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLITTING)
def test_parts_join_to_the_same_bytes(name: str) -> None:
    block = block_type(name)
    assert block.split is not None and block.join is not None and block.meaning is not None
    blocks = of_type(name)
    parts = block.split(blocks)
    assert torch.equal(block.join(parts), blocks)
    assert parts.codes.dtype == torch.uint8 and list(parts.codes.shape) == [len(blocks), block.ggml.elements]
    assert int(parts.codes.max()) == 2**block.meaning.bits - 1
    groups = [len(blocks), block.ggml.elements // block.meaning.group]
    assert all(list(p.shape) == groups for p in (parts.scales, parts.minima) if p is not None)
    assert all(
        p.dtype == torch.float16 and list(p.shape) == [len(blocks), 1] for p in (parts.d, parts.dmin) if p is not None
    )


@pytest.mark.parametrize("name", SPLITTING)
def test_parts_of_rows(name: str) -> None:
    block = block_type(name)
    assert block.meaning is not None
    rows = torch.stack([b.view(3, -1) for b in (of_type(name)[:6], of_type(name)[6:12])])  # [2, 3, two blocks]
    parts = parts_of(rows, name)
    K = 2 * block.ggml.elements
    assert list(parts.codes.shape) == [2, 3, K]
    assert all(list(p.shape) == [2, 3, K // block.meaning.group] for p in (parts.scales, parts.minima) if p is not None)
    assert all(list(p.shape) == [2, 3, 2] for p in (parts.d, parts.dmin) if p is not None)
    assert torch.equal(blocks_of(parts, name), rows)


def test_types_that_do_not_split_are_refused() -> None:
    for refused in (
        lambda: parts_of(of_type("IQ2_S"), "IQ2_S"),
        lambda: blocks_of(parts_of(of_type("Q4_K"), "Q4_K"), "TQ1_0"),
    ):
        with pytest.raises(ArgumentError, match=r"GGUF block types that split are Q4_0, .*, got (IQ2_S|TQ1_0)"):
            refused()
    with pytest.raises(
        ArgumentError, match=r"blocks of Q4_K must be uint8 \[..., a multiple of 144\], got uint8 \[768, 18\]"
    ):
        parts_of(of_type("Q4_0"), "Q4_K")


def test_which_types_split() -> None:
    """Those that kernels are to run packed: all but the ones with grids, TQ1_0 and the types of activations."""
    assert set(BLOCK_TYPES) - set(SPLITTING) == {
        "Q8_1", "Q8_K", "TQ1_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    }  # fmt: skip


# --- rows, slices, schemes ---------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(BLOCK_TYPES)), st.integers(0, 3), st.integers(0, 3))
def test_rows_of_blocks_keep_their_shape(name: str, rows: int, blocks: int) -> None:
    ggml = GGML_TYPES[name]
    found = dequantize(torch.zeros(2, rows, blocks * ggml.nbytes, dtype=torch.uint8), name, torch.bfloat16)
    assert found.shape == (2, rows, blocks * ggml.elements) and found.dtype == torch.bfloat16


def test_a_tensor_larger_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = finite_blocks("Q6_K", 12).view(4, -1)
    whole = dequantize(blocks, "Q6_K")
    monkeypatch.setattr("qkernels.formats.gguf.types._SLICE", 1280)  # five blocks
    assert torch.equal(dequantize(blocks, "Q6_K"), whole)
    assert torch.equal(dequantize(blocks.t().contiguous().t(), "Q6_K"), whole)


@pytest.mark.parametrize(
    ("blocks", "name", "message"),
    [
        (torch.zeros(2, 18), "Q4_0", r"blocks of Q4_0 must be uint8 \[..., a multiple of 18\], got float32 \[2, 18\]"),
        (torch.zeros(2, 17, dtype=torch.uint8), "Q4_0", r"a multiple of 18\], got uint8 \[2, 17\]"),
        (torch.zeros((), dtype=torch.uint8), "Q4_0", r"got uint8 \[\]"),
        (torch.zeros(2, 18, dtype=torch.uint8), "Q4_2", "GGUF block types are Q4_0, .*, got 'Q4_2'"),
    ],
)
def test_other_blocks_are_refused(blocks: Tensor, name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        dequantize(blocks, name)


@pytest.mark.parametrize("name", sorted(EXACT_SCHEMES))
def test_schemes_hold_blocks_without_loss(name: str) -> None:
    blocks = finite_blocks(name, 12).view(4, -1)
    weight = weight_of(blocks, name)
    found, expected = weight.dequantize(), dequantize(blocks, name)
    if name in ("MXFP4", "NVFP4"):  # one of 16 codes is -0 here, and 0 there
        found, expected = found + 0.0, expected + 0.0
    assert torch.equal(bits_of(found), bits_of(expected))
    assert weight.scheme == EXACT_SCHEMES[name]
    if weight.scheme.factors is None:
        assert weight.scales.dtype == (torch.float8_e8m0fnu if name == "MXFP4" else torch.float16)
    more = {"Q2_0": 2 / 8 * 12, "TQ2_0": 2 / 8 * 12, "NVFP4": 4 * 4}.get(name, 0)  # zero points; a float32 a row
    assert weight.nbytes == blocks.numel() + more


def test_which_types_schemes_hold() -> None:
    """All that split, but for the one bit of Q1_0."""
    assert {*EXACT_SCHEMES} == {*SPLITTING} - {"Q1_0"}


def test_codes_of_nvfp4_scales_that_mean_nothing_else() -> None:
    """ggml takes 0x7F for 0 and does not look at bit 7; its 0xFF is 480, which no e4m3 is."""
    blocks = finite_blocks("NVFP4", 1)
    blocks[0, :4] = torch.tensor([0x7F, 0x7E, 0x80, 0xB8], dtype=torch.uint8)
    assert torch.equal(weight_of(blocks, "NVFP4").dequantize(), dequantize(blocks, "NVFP4"))
    blocks[0, 0] = 0xFF
    with pytest.raises(TensorError, match="small must be finite"):
        weight_of(blocks, "NVFP4")


def test_scales_that_are_no_numbers_are_refused() -> None:
    blocks: Any = finite_blocks("Q8_0", 1)
    blocks[0, :2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # infinity
    with pytest.raises(TensorError, match="scales must be finite"):
        weight_of(blocks, "Q8_0")
