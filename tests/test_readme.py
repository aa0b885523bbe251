"""The README cannot rot: its support matrix comes from the catalogue, its example runs, its commands exist.

UPDATE_README=1 python -m pytest tests/test_readme.py      rewrites the matrix
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels
from qkernels import extension, text
from qkernels.cli.main import parser
from qkernels.kernels.catalogue import KERNELS, REFERENCES, KernelSpec, Problem
from qkernels.ops import backends

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What users ask about, each as the schemes that stand for it, over an odd N and K.
FEATURES = {
    "2-, 3-, 4-bit symmetric": ("w2a16_g128", "w3a16_g128", "w4a16_g128"),
    "5- to 8-bit symmetric": ("w5a16_g128", "w6a16_g128", "w8a16_g128"),
    "integer zero points": ("w4a16_g128_asym", "w8a16_g128_asym"),
    "float zero points, offsets": ("w4a16_g64_fzero", "w4a16_g64_offset"),
    "groups of 16, 32, 64, 128, 256": tuple(f"w4a16_g{g}" for g in (16, 32, 64, 128, 256)),
    "per channel, per tensor": ("w8a16_channel", "w8a16_tensor"),
    "NF4 codebook": ("nf4_g64",),
    "int8 activations": ("w4a8_g128", "w8a8_channel"),
    "int8 activations, zeros, offsets": ("w4a8_g128_asym", "w8a8_channel_fzero", "w4a8_g64_offset"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ODD_N, ODD_K = 4097, 4099


def takes(kernel: KernelSpec, schemes: tuple[str, ...], dtype: torch.dtype) -> bool:
    arch = "sm80" if kernel.name.startswith(("cuda.", "triton.")) else "cpu"
    problems = [Problem(ODD_N, ODD_K, qkernels.QuantScheme.parse(s), dtype, arch) for s in schemes]
    return not any(kernel.reasons(problem) for problem in problems)


def support_matrix() -> str:
    kernels = [*KERNELS, *REFERENCES]
    rows = []
    for feature, schemes in FEATURES.items():
        cells = []
        for kernel in kernels:
            dtypes = [name for name, dtype in DTYPES.items() if takes(kernel, schemes, dtype)]
            cells.append("✓" if len(dtypes) == len(DTYPES) else ", ".join(dtypes) or "–")
        rows.append([feature, *cells])
    note = f"✓ means bf16, fp16 and fp32 activations. Every kernel takes act-order and any N and K (here {ODD_N} × {ODD_K})."
    return text.table(["", *(f"`{kernel.name}`" for kernel in kernels)], rows) + "\n\n" + note


@pytest.mark.skipif(not extension.status().loaded, reason="the matrix is that of a full build")
def test_support_matrix_is_that_of_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is an install away, and the matrix that of a full build.
    monkeypatch.setattr(backends, "missing_triton", lambda: None)
    begin, end = "<!-- support-matrix:begin -->\n", "<!-- support-matrix:end -->"
    before, rest = README.split(begin)
    shown, after = rest.split(end)
    if os.environ.get("UPDATE_README"):
        (ROOT / "README.md").write_text(before + begin + support_matrix() + "\n" + end + after, encoding="utf-8")
        return
    assert shown.strip() == support_matrix(), "run UPDATE_README=1 python -m pytest tests/test_readme.py"


def test_the_first_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"```python\n(from qkernels import replace_linear.*?)```", README, re.DOTALL)
    assert example is not None
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    names: dict[str, object] = {"model": model, "x": torch.randn(3, 256)}
    exec(example[1], names)
    assert names["y"].shape == (3, 64)  # type: ignore[attr-defined]
    assert "replaced 2 linear layers (w4a16_g128)" in capsys.readouterr().out


def _commands() -> list[str]:
    blocks = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("qkernels ")]
    assert len(commands) >= 6, "the README has lost its commands"
    return commands


@pytest.mark.parametrize("command", _commands())
def test_commands_parse(command: str) -> None:
    parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists(), path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
