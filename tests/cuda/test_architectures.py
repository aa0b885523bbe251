"""Which card runs what of a build: no card is called available that has no code, and `doctor` names what each has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from qkernels import QuantScheme, extension
from qkernels.cli import diagnosis
from qkernels.kernels.catalogue import Problem, list_kernels

ROOT = Path(__file__).parent.parent.parent


def default_build() -> tuple[str, ...]:
    found = re.search(r'^CUDA_ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert found is not None
    return tuple(found[1].split(";"))


@pytest.mark.parametrize(
    ("arch", "code"),
    [
        ("sm80", "code for 8.0"),
        ("sm86", "code for 8.0"),
        ("sm87", "code for 8.0"),
        ("sm89", "code for 8.0"),
        ("sm90", "code for 9.0a"),
        ("sm100", "PTX for 8.0, compiled by the driver at the first call"),
        ("sm103", "PTX for 8.0, compiled by the driver at the first call"),
        ("sm120", "code for 12.0"),
        ("sm121", "code for 12.0"),
    ],
)
def test_the_default_build_has_something_for_every_card(arch: str, code: str) -> None:
    assert extension.code_for(arch, default_build()) == code


def test_what_a_build_lacks_is_seen() -> None:
    """As builds were before: the PTX of 12.0 cannot be compiled for 10.0, and code for 9.0a runs on 9.0 alone."""
    assert extension.code_for("sm100", ("8.0", "8.6", "8.9", "9.0a", "12.0+PTX")) is None
    assert extension.code_for("sm130", ("12.0+PTX",)) == "PTX for 12.0, compiled by the driver at the first call"
    assert extension.code_for("sm90", ("9.0a+PTX",)) == "code for 9.0a"
    assert extension.code_for("sm100", ("9.0a+PTX",)) is None
    assert extension.code_for("sm80", ("8.6",)) is None
    assert extension.code_for("sm90", ("Hopper",)) == "code for Hopper"


def test_a_card_without_code_is_a_reason_and_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    built = dataclasses.replace(extension.status(), loaded=True, error=None, cuda=True, architectures=("8.0", "9.0a"))
    monkeypatch.setattr(extension, "status", lambda: built)
    problem = Problem(4096, 4096, QuantScheme.parse("w4a16_g128"), torch.bfloat16, "sm100")
    reasons = dict(list_kernels(problem).rows)["cuda.mma_tile"]
    assert any("no code for sm100" in reason and "10.0, or 8.0+PTX" in reason for reason in reasons), reasons
    for arch in ("sm80", "sm86", "sm90"):
        here = dataclasses.replace(problem, arch=arch)
        assert not any("no code" in reason for reason in dict(list_kernels(here).rows)["cuda.mma_tile"])
    assert diagnosis.code_of("sm100") == "no code in the extension, which has 8.0, 9.0a"
    assert diagnosis.code_of("sm90") == "code for 9.0a"


def test_doctor_says_how_a_gpu_gets_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that was made without nvcc, on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "RTX 4090")
    monkeypatch.setattr(diagnosis, "arch_of", lambda device: "sm89")
    for cuda, advice in ((False, "requirements-cuda.txt"), (True, "")):
        status = dataclasses.replace(
            extension.status(), loaded=True, error=None, cuda=cuda, architectures=("8.0",) if cuda else ()
        )
        with monkeypatch.context() as one:
            one.setattr(extension, "status", lambda status=status: status)
            check = diagnosis._gpu()
        assert "RTX 4090 (sm89" in check.found
        assert advice in check.advice and bool(check.advice) == bool(advice)
