"""GGUF's blocks: decoded bit for bit, taken apart without loss, and as `QuantTensor` where a scheme holds them;
and made of float weights."""

from .parts import Meaning, Parts
from .search import WRITABLE_TYPES, gguf_blocks
from .types import BLOCK_TYPES, BlockType, block_type, blocks_of, dequantize, parts_of
from .weights import EXACT_SCHEMES, weight_of

__all__ = [
    "BLOCK_TYPES",
    "EXACT_SCHEMES",
    "WRITABLE_TYPES",
    "BlockType",
    "Meaning",
    "Parts",
    "block_type",
    "blocks_of",
    "dequantize",
    "gguf_blocks",
    "parts_of",
    "weight_of",
]
