"""What gguf-py makes of blocks: hashes of the weights that it computes from blocks that anybody can make again.

pip install gguf==0.19.0; python tests/golden/gguf/make_blocks.py
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits, dequantize

FILE = Path(__file__).parent / "blocks.json"
BLOCKS = 512
NAN = np.uint32(0x7FC00000)


def blocks_of(name: str, nbytes: int) -> np.ndarray:
    """uint8 `[768, nbytes]`: 512 blocks of random bytes, and one of each byte alone: zeros, subnormal numbers, infinities and
    NaN among the scales of both."""
    random = np.frombuffer(hashlib.shake_256(name.encode()).digest(BLOCKS * nbytes), dtype=np.uint8).reshape(
        BLOCKS, nbytes
    )
    return np.concatenate([random, np.repeat(np.arange(256, dtype=np.uint8)[:, None], nbytes, axis=1)])


def bits_of(values: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers; every NaN alike."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).copy()
    bits[np.isnan(values)] = NAN
    return bits


def main() -> None:
    types = {}
    for kind in [GGMLQuantizationType.F16, *_type_traits]:
        elements, nbytes = GGML_QUANT_SIZES[kind]
        with np.errstate(all="ignore"):
            bits = bits_of(dequantize(blocks_of(kind.name, nbytes), kind)).reshape(-1, elements)
        first = np.flatnonzero(np.isfinite(bits.view(np.float32)).all(axis=1))[0]
        types[kind.name] = {
            "id": int(kind), "elements": elements, "nbytes": nbytes, "sha256": hashlib.sha256(bits.tobytes()).hexdigest(),
            "block": int(first), "begins": [f"{x:08x}" for x in bits[first, :8]],
        }  # fmt: skip
    sizes = {kind.name: [int(kind), *GGML_QUANT_SIZES[kind]] for kind in GGMLQuantizationType if kind.name != "Q8_1"}
    found = {"made_by": f"gguf {version('gguf')}", "sizes": sizes, "types": types}
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(f"{FILE.name}: {len(types)} types")


if __name__ == "__main__":
    main()
