"""What llama.cpp says of the GGUF files that this package writes of `tests/gguf_written.py`, in every mix: the largest relative
error of its logits, how many blocks its own quantizer makes otherwise of the same weights, and hashes of both files' tensors.

The first argument is as in make_mixes.py.

pip install xllamacpp==2026.10.11549 torch transformers==5.24.0; PYTHONPATH=. python tests/golden/gguf/make_written.py LIBRARY
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qkernels import load
from qkernels.checkpoint import to_gguf
from qkernels.models.gguf_mixes import MIXES
from qkernels.storage.gguf import GgufSource
from tests.gguf_written import FIELDS, IDS, importance_of_model, model_directory, tensors_digest
from tests.golden.gguf.make_mixes import Importance, Quantizer
from tests.llama_cpp import llama_cpp_logits

FILES = Path(__file__).parent


def differing(ours: Path, theirs: Path) -> tuple[int, int]:
    """Blocks of quantized types that differ, and how many there are; types and names must be alike."""
    a, b = GgufSource.open(ours), GgufSource.open(theirs)
    assert {n: e.type.name for n, e in a.entries.items()} == {n: e.type.name for n, e in b.entries.items()}
    count = total = 0
    for name, entry in a.entries.items():
        unlike = (a.blocks(name) != b.blocks(name)).view(-1, entry.type.nbytes).any(-1)
        if entry.type.dtype is None:
            count, total = count + int(unlike.sum()), total + len(unlike)
        else:
            assert not bool(unlike.any()), name
    return count, total


def logits_error(path: Path) -> float:
    """|a - b| / |a| of the token where it is largest."""
    with torch.no_grad():
        ours = load(path, dtype="float32")(IDS[None]).logits[0]
    theirs = llama_cpp_logits(path, IDS, FIELDS["vocab_size"])
    return float(((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).max())


def main() -> None:
    quantize = Quantizer(sys.argv[1])
    measured = importance_of_model()
    means = {name: entry.importance(256, 256).contiguous() for name, entry in measured.entries.items()}
    rows = [Importance(name.encode(), mean.data_ptr(), 256) for name, mean in means.items()]
    matrix = (Importance * (len(rows) + 1))(*rows, Importance(None, None, 0))
    found: dict[str, Any] = {"xllamacpp": version("xllamacpp"), "mixes": {}}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        source = model_directory(directory / "tiny")
        to_gguf(source, directory / "whole.gguf", "F16")
        for mix in MIXES:
            row = found["mixes"][mix] = {}
            for way, importance in (("plain", None), ("importance", measured)):
                ours, theirs = directory / f"{mix}-{way}.gguf", directory / "theirs.gguf"
                to_gguf(source, ours, mix, importance=importance)
                options = {} if importance is None else {"imatrix": ctypes.addressof(matrix)}
                quantize(directory / "whole.gguf", theirs, mix, **options)
                count, total = differing(ours, theirs)
                row[way] = {
                    "ours": tensors_digest(ours), "theirs": tensors_digest(theirs), "blocks": total, "differ": count,
                    "logits_error": float(f"{logits_error(ours):.2g}"),
                }  # fmt: skip
                print(mix, way, row[way])
    (FILES / "written.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
