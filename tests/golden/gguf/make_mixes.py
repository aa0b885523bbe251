"""The type that llama.cpp's own quantizer (`llama_model_quantize`, which is llama-quantize) chooses for each tensor of
`tests/gguf_mix_shapes.py`, in every mix, plain, with an importance matrix, pure, and with an override.

The library in xllamacpp lacks that one function; the first argument is a library that has it, made from the same sources. Files
are headers and holes: it is asked for a dry run.

pip install xllamacpp==2026.10.11549 torch; PYTHONPATH=. python tests/golden/gguf/make_mixes.py LIBRARY
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qkernels.models.gguf_mixes import FILE_TYPE_OF, MIXES
from qkernels.storage.gguf_header import MetaValue
from qkernels.storage.gguf_types import GGML_TYPES
from qkernels.storage.gguf_writer import GgufWriter, Planned
from tests.gguf_mix_shapes import MIX_MODELS, Model, in_short

FILES = Path(__file__).parent
OVERRIDE = ("ffn_up|attn_k", "Q5_1")
LINE = re.compile(r"\] (\S+) +- \[.*?type = +(\w+), size = .*?(?:\((\w+)\))?\n")


class Options(ctypes.Structure):
    """llama_model_quantize_params."""

    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("output_type", ctypes.c_int), ("embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "only_copy", "pure", "keep_split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "metadata", "types", "prune")), ("buffer", ctypes.c_size_t),
    ]  # fmt: skip


class Importance(ctypes.Structure):
    """llama_model_imatrix_data."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Override(ctypes.Structure):
    """llama_model_tensor_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]


class Quantizer:
    """`llama_model_quantize`, and what it logs."""

    def __init__(self, path: str) -> None:
        import xllamacpp

        base = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
        self._base = ctypes.CDLL(str(base), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(path)
        self._library.llama_model_quantize_default_params.restype = Options
        self.log: list[str] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._logger = kind(lambda level, text, data: self.log.append(text.decode(errors="replace")))
        self._base.llama_log_set(self._logger, None)
        self._base.llama_backend_init()

    def __call__(self, source: Path, target: Path, mix: str, **options: Any) -> str:
        """Quantize a file; what was logged."""
        self.log.clear()
        given = self._library.llama_model_quantize_default_params()
        given.ftype, given.nthread = FILE_TYPE_OF[mix], 1
        for name, value in options.items():
            setattr(given, name, value)
        status = self._library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(given))
        text = "".join(self.log)
        assert status == 0, text[-2000:]
        return text


def write(model: Model, directory: Path) -> Path:
    """A file of F32 that says what the rules ask, with holes for weights."""
    facts, path = model.facts, directory / "m.gguf"
    hidden = model.tensors["token_embd.weight"][-1]
    numbers = {
        "context_length": 64, "embedding_length": hidden, "block_count": facts.layers, "feed_forward_length": 256,
        "attention.head_count": facts.heads, "attention.head_count_kv": facts.kv_heads, "vocab_size": 32,
    }  # fmt: skip
    if facts.experts:
        numbers |= {"expert_count": facts.experts, "expert_used_count": 2}
    keys = {"general.architecture": MetaValue("string", facts.architecture)}
    keys |= {f"{facts.architecture}.{name}": MetaValue("u32", value) for name, value in numbers.items()}
    keys[f"{facts.architecture}.attention.layer_norm_rms_epsilon"] = MetaValue("f32", 1e-5)
    plan = [Planned(name, "F32", shape) for name, shape in model.tensors.items()]
    GgufWriter(directory, [path.name], keys, [plan]).abandon()
    return path


def chosen(log: str) -> dict[str, str]:
    """The type of each tensor, from a log; as `GGML_TYPES` spells it."""
    spelled = {name.lower(): name for name in GGML_TYPES}
    return {name: spelled[(after or before).lower()] for name, before, after in LINE.findall(log)}


def main() -> None:
    quantize = Quantizer(sys.argv[1])
    one = (ctypes.c_float * 1)(1.0)
    matrix = (Importance * 2)(Importance(b"none", ctypes.addressof(one), 1), Importance(None, None, 0))
    override = (Override * 2)(Override(OVERRIDE[0].encode(), GGML_TYPES[OVERRIDE[1]].id), Override(None, 0))
    ways: dict[str, dict[str, Any]] = {
        "plain": {}, "importance": {"imatrix": ctypes.addressof(matrix)}, "pure": {"pure": True},
        "override": {"types": ctypes.addressof(override)},
    }  # fmt: skip
    golden: dict[str, Any] = {"xllamacpp": version("xllamacpp"), "override": "=".join(OVERRIDE), "types": {}}
    for title, model in MIX_MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            source = write(model, Path(directory))
            golden["types"][title] = {
                way: {
                    mix: in_short(chosen(quantize(source, Path(directory) / "out", mix, dry_run=True, **options)))
                    for mix in MIXES
                    if way != "override"
                    or GGML_TYPES[MIXES[mix].type].dtype is None  # else ours holds and theirs does not
                }
                for way, options in ways.items()
            }
    (FILES / "mixes.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
