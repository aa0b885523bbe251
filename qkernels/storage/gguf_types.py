"""What a GGUF file can hold: types of tensors by id, with the size of their blocks, and types of metadata values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True)
class GgmlType:
    """A type of tensor. How its blocks are decoded is in `formats/gguf`.

    Args:
        id: in a file.
        name: as llama.cpp spells it.
        elements: weights in a block; blocks run along a row (the fastest dimension, in_features).
        nbytes: bytes of a block.
        dtype: where a block is one number of torch's.
        swaps: (offset, width) of the fields of several bytes that change places in a big-endian file; None where the tools
            that make such files do not write this type.
    """

    id: int
    name: str
    elements: int
    nbytes: int
    dtype: torch.dtype | None = None
    swaps: tuple[tuple[int, int], ...] | None = None


def _plain(id: int, name: str, dtype: torch.dtype) -> GgmlType:
    swaps = ((0, dtype.itemsize),) if dtype.itemsize > 1 else ()
    return GgmlType(id, name, 1, dtype.itemsize, dtype, swaps)


_TYPES: Final = (
    _plain(0, "F32", torch.float32),
    _plain(1, "F16", torch.float16),
    GgmlType(2, "Q4_0", 32, 18, swaps=((0, 2),)),
    GgmlType(3, "Q4_1", 32, 20),
    GgmlType(6, "Q5_0", 32, 22),
    GgmlType(7, "Q5_1", 32, 24),
    GgmlType(8, "Q8_0", 32, 34, swaps=((0, 2),)),
    GgmlType(9, "Q8_1", 32, 36),
    GgmlType(10, "Q2_K", 256, 84),
    GgmlType(11, "Q3_K", 256, 110),
    GgmlType(12, "Q4_K", 256, 144, swaps=((0, 2), (2, 2))),
    GgmlType(13, "Q5_K", 256, 176),
    GgmlType(14, "Q6_K", 256, 210, swaps=((208, 2),)),
    GgmlType(15, "Q8_K", 256, 292),
    GgmlType(16, "IQ2_XXS", 256, 66),
    GgmlType(17, "IQ2_XS", 256, 74),
    GgmlType(18, "IQ3_XXS", 256, 98),
    GgmlType(19, "IQ1_S", 256, 50),
    GgmlType(20, "IQ4_NL", 32, 18),
    GgmlType(21, "IQ3_S", 256, 110),
    GgmlType(22, "IQ2_S", 256, 82),
    GgmlType(23, "IQ4_XS", 256, 136),
    _plain(24, "I8", torch.int8),
    _plain(25, "I16", torch.int16),
    _plain(26, "I32", torch.int32),
    _plain(27, "I64", torch.int64),
    _plain(28, "F64", torch.float64),
    GgmlType(29, "IQ1_M", 256, 56),
    _plain(30, "BF16", torch.bfloat16),
    GgmlType(34, "TQ1_0", 256, 54),
    GgmlType(35, "TQ2_0", 256, 66),
    GgmlType(39, "MXFP4", 32, 17, swaps=()),
    GgmlType(40, "NVFP4", 64, 36, swaps=()),
    GgmlType(41, "Q1_0", 128, 18),
    GgmlType(42, "Q2_0", 64, 18),
)
GGML_TYPES: Final = {ggml.name: ggml for ggml in _TYPES}
BY_ID: Final = {ggml.id: ggml for ggml in _TYPES}
OF_DTYPE: Final = {ggml.dtype: ggml for ggml in _TYPES if ggml.dtype is not None}
# Ids that files of 2023 and 2024 may still have, and what became of them.
REMOVED: Final = {
    4: "Q4_2, which llama.cpp removed in 2023",
    5: "Q4_3, which llama.cpp removed in 2023",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

# Types of metadata values: id -> struct's letter. Strings and arrays have no fixed size.
STRING: Final = 8
ARRAY: Final = 9
SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
KIND_NAMES: Final = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 9: "array", 10: "u64",
    11: "i64", 12: "f64",
}  # fmt: skip
KINDS: Final = {name: number for number, name in KIND_NAMES.items()}

# general.file_type: what the mix of a file is called.
FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
