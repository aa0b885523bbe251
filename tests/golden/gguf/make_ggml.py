"""What llama.cpp itself makes of blocks, of the golden files and of texts, through the library inside xllamacpp: hashes of the
weights that ggml decodes (of every type that it decodes), log-probabilities after 12 tokens, and ids.

pip install xllamacpp==2026.10.11549 safetensors torch; PYTHONPATH=. python tests/golden/gguf/make_ggml.py
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xllamacpp

from qkernels.formats.gguf import BLOCK_TYPES
from qkernels.storage.gguf import GgufSource
from qkernels.storage.gguf_header import MetaValue
from qkernels.storage.gguf_writer import Planned, gguf_writer
from tests.gguf_blocks import bits_of, of_type, split_as
from tests.gguf_golden import MODELS

FILES = Path(__file__).parent
TEXTS = [
    "Hello, world! The year is 2026.", "  two  spaces\n\nand\tmore   ", "naïve café — 日本語 😀", "don't I'll we've 123456 3.14",
    " leading", "a<s>b </s> c", "", "HTTPServer's ÉCOLE 12345 x_1 -- \r\n\t  moon\n  moon",
]  # fmt: skip
PRES = ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx", "smollm", "starcoder", "deepseek-r1-qwen", "deepseek-llm",
    "deepseek-coder", "deepseek-v3",
]  # fmt: skip


class Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("elements", ctypes.c_int64), ("interleave", ctypes.c_int64), ("nbytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
    ]  # fmt: skip


class Parameters(ctypes.Structure):
    """llama_model_params, which is smaller."""

    _fields_ = [("data", ctypes.c_char * 512)]


def library() -> Any:
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations is not None
    found = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    found.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    found.llama_model_default_params.restype = Parameters
    found.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    found.llama_model_load_from_file.restype = ctypes.c_void_p
    found.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    found.llama_model_get_vocab.restype = ctypes.c_void_p
    found.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    found.llama_backend_init()
    return found


def decoded(lib: Any) -> dict[str, Any]:
    to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    types = {}
    for name, block in BLOCK_TYPES.items():
        traits = lib.ggml_get_type_traits(block.ggml.id).contents
        types[name] = {"elements": traits.elements, "nbytes": traits.nbytes}
        if traits.to_float:
            blocks = of_type(name).contiguous()
            weights = torch.empty(len(blocks) * traits.elements)
            to_float(traits.to_float)(blocks.data_ptr(), weights.data_ptr(), weights.numel())
            types[name]["sha256"] = hashlib.sha256(bits_of(weights).numpy().tobytes()).hexdigest()
    return types


def tokenized(lib: Any, path: Path) -> list[list[int]]:
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    vocabulary, ids = lib.llama_model_get_vocab(model), []
    for text in TEXTS:
        room, data = (ctypes.c_int32 * 1000)(), text.encode()
        ids.append(list(room[: lib.llama_tokenize(vocabulary, data, len(data), room, 1000, True, True)]))
    return ids


def with_metadata(metadata: dict[str, MetaValue], source: GgufSource, path: Path) -> Path:
    plan = [Planned(name, entry.type.name, entry.shape) for name, entry in source.entries.items()]
    with gguf_writer(path, metadata, plan, overwrite=True) as writer:
        for name in source.entries:
            writer.add(name, source.read(name))
    return path


def logprobs(path: Path) -> list[float]:
    """Of every token after 12; computed in float32, with activations in 8 bits where a weight is quantized."""
    given = xllamacpp.CommonParams()
    given.model.path = str(path)
    given.n_ctx, given.n_parallel, given.warmup = 64, 1, False
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked = {
        "prompt": [i * 7 % 64 for i in range(12)],
        "max_tokens": 1,
        "logprobs": 300,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    answer = xllamacpp.Server(given).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = {top["id"]: top["logprob"] for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return [round(found[i], 5) for i in range(len(found))]


def main() -> None:
    lib = library()
    paths = [FILES / f"{name}.gguf" for name in MODELS]
    with tempfile.TemporaryDirectory() as directory:
        llama = GgufSource.open(FILES / "llama.gguf")
        by_pre = {
            pre: tokenized(lib, with_metadata(split_as(pre, llama), llama, Path(directory) / "m.gguf")) for pre in PRES
        }
    found = {
        "made_by": f"xllamacpp {version('xllamacpp')}",
        "types": decoded(lib),
        "texts": TEXTS,
        "ids": {path.stem: tokenized(lib, path) for path in paths},
        "ids_by_pre": by_pre,
        "logprobs": {path.stem: logprobs(path) for path in paths},
    }
    (FILES / "ggml.json").write_text(
        json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
