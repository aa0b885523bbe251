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
from qkernels.checkpoint.registry import WRITTEN
from qkernels.cli.main import parser
from qkernels.errors import ConversionError
from qkernels.formats import READ_ONLY, Format
from qkernels.kernels.catalogue import KERNELS, REFERENCES, KernelSpec, Problem
from qkernels.layouts import LAYOUTS
from qkernels.ops import backends
from tests.refusals import SCHEMES
from tests.strategies import random_weight

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
    "NF4, FP4, MXFP4, NVFP4, IQ4_NL": ("nf4_g64", "fp4_g64", "mxfp4_g32", "nvfp4_g16", "iq4nl_g32"),
    "FP8 weights, also in blocks": ("fp8_channel", "fp8_block128", "e5m2_g64"),
    "Q2_K … Q6_K, IQ4_XS": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
    "int8 activations": ("w4a8_g128", "w8a8_channel"),
    "int8 activations, IQ4_NL, MXFP4, Q4_K": ("iq4nl_g32_a8", "mxfp4_g32_a8", "q4_k_a8", "q6_k_a8"),
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


# The rows of the table of checkpoint formats, and the formats of the registries that each stands for.
FORMAT_ROWS = {
    "GPTQ v1, v2": ["gptq", "gptq_v2"],
    "AWQ gemm": ["awq"],
    "compressed-tensors pack-, float-, mxfp4-pack-, nvfp4-pack-quantized and mixtures (FP8, MXFP4, NVFP4; 16-bit activations)": [
        "compressed-tensors"
    ],
    "compressed-tensors int-quantized (W8A8: 16-bit activations, int8 ones where asked)": [
        "compressed-tensors int-quantized"
    ],
    "compressed-tensors of other tools: MXFP8, naive-quantized, and the above (16-bit activations)": [
        "compressed-tensors float-quantized",
        "compressed-tensors fp4-pack-quantized",
        "compressed-tensors mixed-precision",
    ],
    "FP8 in blocks, as DeepSeek-V3 and Qwen have it": ["fp8"],
    "ModelOpt NVFP4, FP8, mixed": ["modelopt"],
    "AWQ gemv, gemv_fast": ["awq gemv", "awq gemv_fast"],
    "auto-round (GPTQ bodies; AWQ bodies with 4 bits)": ["auto-round"],
    "bitsandbytes NF4, FP4, int8": ["bitsandbytes 4-bit", "bitsandbytes int8"],
    "HQQ, axis 1": ["hqq"],
    "torchao int8, intx and int4 weight-only (safetensors)": ["torchao"],
    "MXFP4 of gpt-oss": ["mxfp4"],
    "native": ["native"],
    "packed (the bytes of a kernel's layout)": [
        layout.name for layout in LAYOUTS.values() if layout.backend != "torch"
    ],
}


def stores(fmt: Format, scheme: str, act_order: bool = False) -> bool:
    try:
        fmt.write(random_weight(scheme, 64, 256, act_order=act_order))
    except ConversionError:
        return False
    return True


def widths(fmt: Format) -> str:
    bits = [str(bits) for bits in range(2, 9) if stores(fmt, f"w{bits}a16_g32")]
    return f"{bits[0]} – {bits[-1]}" if len(bits) == 7 else ", ".join(bits)


def test_the_table_of_formats_is_that_of_the_registries() -> None:
    """Which are written, and with which widths and act-order, is asked of the writers; a reader has a tensor for act-order."""
    table = re.search(r"\| checkpoint format .*?\n\|[-|]+\|\n(.*?)\n\n", README, re.DOTALL)
    assert table is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    assert [row[0] for row in rows] == list(FORMAT_ROWS)
    assert {name for names in FORMAT_ROWS.values() for name in names} == {*WRITTEN, *READ_ONLY}
    for title, read, written, act_order, bits in rows:
        for fmt in (WRITTEN.get(name) or READ_ONLY[name] for name in FORMAT_ROWS[title]):
            assert (read, written) == ("✓", "✓" if fmt.name in WRITTEN else "–"), title
            orders = any(stores(fmt, scheme, True) for scheme in ("w4a16_g32", "w4a8_g32"))
            ordered = orders if written == "✓" else any("g_idx" in name for name in fmt.suffixes)
            assert act_order == ("✓" if ordered else "–"), title
            if written == "✓" and not title.startswith("packed"):
                assert bits.removesuffix(", every scheme") == widths(fmt), title
    assert all(stores(WRITTEN["native"], scheme) for scheme in SCHEMES)


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


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
