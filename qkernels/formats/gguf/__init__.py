"""GGUF's blocks: decoded bit for bit, taken apart without loss, and as `QuantTensor` where a scheme holds them;
and made of float weights."""

from .block_grid import BlockGrid
from .importance import ImportanceFile, InputSquares, read_importance, write_importance
from .lossless import exact_blocks
from .parts import Meaning, Parts
from .quantizing import SearchName, gguf_blocks
from .search import WRITABLE_TYPES
from .types import BLOCK_TYPES, BlockType, block_type, blocks_of, dequantize, parts_of
from .weights import EXACT_SCHEMES, weight_of

__all__ = [
    "BLOCK_TYPES",
    "BlockGrid",
    "EXACT_SCHEMES",
    "WRITABLE_TYPES",
    "BlockType",
    "ImportanceFile",
    "InputSquares",
    "Meaning",
    "Parts",
    "SearchName",
    "block_type",
    "blocks_of",
    "dequantize",
    "exact_blocks",
    "gguf_blocks",
    "parts_of",
    "read_importance",
    "weight_of",
    "write_importance",
]
