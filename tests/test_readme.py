"""The README cannot rot: its support matrix comes from the catalogue, its example runs, its commands exist.

UPDATE_README=1 python -m pytest tests/test_readme.py      rewrites the matrix and the table of formats
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import qkernels
from qkernels import text
from qkernels.checkpoint.registry import WRITTEN
from qkernels.cli.main import parser
from qkernels.errors import ConversionError
from qkernels.formats import READ_ONLY, Format
from qkernels.kernels.catalogue import KERNELS, REFERENCES, KernelSpec
from qkernels.layouts import LAYOUTS
from qkernels.scheme import ACTIVATIONS
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
    "int8 activations of compressed-tensors": ("w4a8w_g128", "w8a8w_channel"),
    "the same with zero points, LLM.int8": ("w8a8z_channel", "w8a8o6_channel"),
    "the same with static scales": ("w8a8s_channel", "w4a8sz_g128"),
    "int8 activations, zeros, offsets": ("w4a8_g128_asym", "w8a8_channel_fzero", "w4a8_g64_offset"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ODD_N, ODD_K = 4097, 4099


def takes(kernel: KernelSpec, schemes: tuple[str, ...], dtype: torch.dtype) -> bool:
    """Of a full build, on a machine that has the device."""
    layout = LAYOUTS[kernel.layout]
    parsed = [qkernels.QuantScheme.parse(s) for s in schemes]
    return dtype in layout.dtypes and not any(layout.reasons(ODD_N, ODD_K, scheme) for scheme in parsed)


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


def test_support_matrix_is_that_of_the_catalogue() -> None:
    begin, end = "<!-- support-matrix:begin -->\n", "<!-- support-matrix:end -->"
    before, rest = (ROOT / "README.md").read_text(encoding="utf-8").split(begin)
    shown, after = rest.split(end)
    if os.environ.get("UPDATE_README"):
        (ROOT / "README.md").write_text(before + begin + support_matrix() + "\n" + end + after, encoding="utf-8")
        return
    assert shown.strip() == support_matrix(), "run UPDATE_README=1 python -m pytest tests/test_readme.py"


class Row(NamedTuple):
    """A row of the table of checkpoint formats: those of the registries that it stands for, what their files hold, and whether
    these are stacked experts."""

    names: tuple[str, ...]
    schemes: tuple[str, ...]
    experts: bool = False


def every(*bits: int, form: str = "w{}a16_g128") -> tuple[str, ...]:
    return tuple(form.format(width) for width in bits)


FLOATS = ("fp8_tensor", "fp8_channel", "fp8_block128", "mxfp4_g32", "nvfp4_g16")
FORMAT_ROWS = {
    "GPTQ v1, v2": Row(("gptq", "gptq_v2"), every(2, 3, 4, 8)),
    "GPTQModel's bit planes": Row(("planar gptq_p",), every(*range(2, 9))),
    "AWQ gemm": Row(("awq",), ("w4a16_g128_asym",)),
    "AWQ gemv, gemv_fast": Row(("awq gemv", "awq gemv_fast"), ("w4a16_g128_asym",)),
    "compressed-tensors pack-quantized (W4A16, W8A16)": Row(("compressed-tensors",), every(*range(2, 9))),
    "compressed-tensors W8A8, W4A8 (int8 a token)": Row(
        ("compressed-tensors", "compressed-tensors int-quantized"), ("w8a8w_channel", "w4a8w_g128")
    ),
    "compressed-tensors W8A8, zero points of x": Row(
        ("compressed-tensors", "compressed-tensors int-quantized"), ("w8a8z_channel", "w8a8z_channel_asym")
    ),
    "compressed-tensors W8A8, W4A8, static": Row(
        ("compressed-tensors", "compressed-tensors int-quantized"), ("w8a8s_channel", "w4a8sz_g128")
    ),
    "compressed-tensors FP8, MXFP4, NVFP4, mixtures": Row(
        (
            "compressed-tensors", "compressed-tensors float-quantized", "compressed-tensors fp4-pack-quantized",
            "compressed-tensors mixed-precision",
        ),
        FLOATS,
    ),
    "compressed-tensors MXFP8, naive-quantized": Row(("compressed-tensors float-quantized",), ("fp8_g32", "fp8_channel")),
    "FP8 in blocks (DeepSeek-V3 and V4, Qwen)": Row(("fp8", "fp8 of DeepSeek-V4"), ("fp8_block128",)),
    "FP4 experts of DeepSeek-V4": Row(("fp8 of DeepSeek-V4",), ("mxfp4_g32",), experts=True),
    "ModelOpt NVFP4, FP8, mixed": Row(("modelopt",), ("nvfp4m_g16", "fp8_tensor")),
    "MXFP4 experts of gpt-oss": Row(("mxfp4",), ("mxfp4_g32",), experts=True),
    "auto-round (GPTQ bodies; AWQ bodies with 4 bits)": Row(("auto-round",), every(*range(2, 9))),
    "bitsandbytes NF4, FP4": Row(("bitsandbytes 4-bit",), ("nf4_g64", "fp4_g64")),
    "bitsandbytes LLM.int8": Row(("bitsandbytes int8",), ("w8a8o6_channel",)),
    "HQQ, axis 1": Row(("hqq",), every(2, 3, 4, 5, 6, 8, form="w{}a16_g64_fzero")),
    "torchao int8, intx, int4 (safetensors)": Row(("torchao",), (*every(*range(2, 9)), "w4a16_g32_offset")),
    "torchao float8": Row(("torchao",), ("fp8_channel", "fp8_tensor")),
    "optimum-quanto int2, int4, int8": Row(("quanto",), ("w2a16_g32_offset", "w4a16_g128_offset", "w8a16_channel")),
    "optimum-quanto FP8": Row(("quanto",), ("fp8_channel",)),
    "native": Row(("native",), tuple(SCHEMES)),
    "packed (the bytes of a kernel's layout)": Row(
        tuple(layout.name for layout in LAYOUTS.values() if layout.backend != "torch"), tuple(SCHEMES)
    ),
}  # fmt: skip
PLACES = {"CPU": "cpu.", "CUDA": "cuda.", "Triton": "triton."}


def stores(fmt: Format, scheme: str, act_order: bool = False) -> bool:
    try:
        fmt.write(random_weight(scheme, 64, 256, act_order=act_order))
    except ConversionError:
        return False
    return True


def runs(row: Row, place: str) -> str:
    """Where kernels take bf16 activations: all of the schemes, none, or which."""
    kernels = [k for k in KERNELS if k.name.startswith(place) and (LAYOUTS[k.layout].grouped or not row.experts)]
    schemes = row.schemes
    taken = [s for s in schemes if any(takes(kernel, (s,), torch.bfloat16) for kernel in kernels)]
    if 3 < len(taken) < len(schemes):
        return f"{len(taken)} of {len(schemes)} schemes"
    return "✓" if len(taken) == len(schemes) else ", ".join(f"`{s}`" for s in taken) or "–"


def written_of(row: Row) -> str:
    """Whether the schemes of a row are written under one of its names."""
    writers = [WRITTEN[name] for name in row.names if name in WRITTEN]
    if any(name in LAYOUTS for name in row.names):
        return "✓" if len(writers) == len(row.names) else "–"
    taken = [s for s in row.schemes if any(stores_as_made(fmt, s) for fmt in writers)]
    return "✓" if len(taken) == len(row.schemes) else ", ".join(f"`{s}`" for s in taken) or "–"


def stores_as_made(fmt: Format, scheme: str) -> bool:
    """Whether it stores a weight that `RTN` makes: of MXFP4 and NVFP4 random scales are not those that files have. Static
    activations none makes."""
    if ACTIVATIONS[qkernels.QuantScheme.parse(scheme).act].static:
        return stores(fmt, scheme)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    try:
        fmt.write(qkernels.RTN().with_scheme(scheme).quantize(weight))
    except ConversionError:
        return False
    return True


def table_of_formats() -> str:
    rows = []
    for title, row in FORMAT_ROWS.items():
        formats = [WRITTEN.get(name) or READ_ONLY[name] for name in row.names]
        parsed = [qkernels.QuantScheme.parse(s) for s in row.schemes]
        indexed = any("g_idx" in name for fmt in formats for name in fmt.suffixes) and parsed[0].codebook is None
        ordered = indexed or (
            parsed[0].codebook is None
            and any(stores(fmt, s, True) for fmt in formats for s in ("w4a16_g32", "w4a8_g32"))
        )
        widths = sorted({scheme.bits for scheme in parsed})
        run = widths == list(range(widths[0], widths[-1] + 1)) and len(widths) > 2
        bits = f"{widths[0]} – {widths[-1]}" if run else ", ".join(map(str, widths))
        rows.append([
            title, "✓", written_of(row), "✓" if ordered else "–", bits,
            *(runs(row, place) for place in PLACES.values()),
        ])  # fmt: skip
    note = (
        "Where a kernel takes it, a file runs packed (here: bf16 activations, and those that it asks for; experts: grouped "
        "products). "
        "Where none does, `load` names every kernel and its reason, or runs int8 activations in 16 bits and says so."
    )
    return text.table(["checkpoint format", "read", "written", "act-order", "bits", *PLACES], rows) + "\n\n" + note


def test_the_table_of_formats_is_that_of_the_registries() -> None:
    """Which are written, and where what they hold runs, is asked of the writers and of the layouts."""
    assert {name for row in FORMAT_ROWS.values() for name in row.names} == {*WRITTEN, *READ_ONLY}
    begin, end = "<!-- formats:begin -->\n", "<!-- formats:end -->"
    now = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = now.split(begin)
    shown, after = rest.split(end)
    if os.environ.get("UPDATE_README"):
        (ROOT / "README.md").write_text(before + begin + table_of_formats() + "\n" + end + after, encoding="utf-8")
        return
    assert shown.strip() == table_of_formats(), "run UPDATE_README=1 python -m pytest tests/test_readme.py"
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
