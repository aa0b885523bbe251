"""The tests' units (`emulator.SOURCES`) as nvcc compiles them (`tools/nvcc.py`)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tools.nvcc import NVCC, compile_source

from .emulator import BUGS, HERE, SOURCES

# Bugs that another test finds in the same line by other means, each a build of its own.
in_full = pytest.mark.skipif(not os.environ.get("QKERNELS_TEST_FULL"), reason="make test-full")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def device_sources(unit: str) -> tuple[Path, ...]:
    """The files of a unit that nvcc compiles."""
    return (
        (HERE / "sample" / "sample.cu",) if unit == "sample" else tuple(s for s in SOURCES[unit] if s.suffix == ".cu")
    )


def ptx_with(unit: str, kernel: str, arch: str, bug: str | None = None) -> str:
    """The PTX text that holds this entry."""
    assert bug is None or bug in BUGS[unit], f"unit {unit} has no bug {bug}"
    for source in device_sources(unit):
        text = compile_source(source, arch, "ptx", bug)[0].read_text()
        if re.search(rf"\.entry\s+{re.escape(kernel)}\b", text):
            return text
    raise AssertionError(f"no file of {unit} has an entry {kernel}")
