"""`tools.versions`: what it makes of pytest's and pip's output, and whether its page says what it tries."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tools import versions

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("....\n4 passed, 2 deselected in 1.20s", (4, 0, 0, "")),
        ("FAILED tests/a.py::test_b[x] - ValueError: in 3.1s\n1 failed, 2 passed in 3.00s", (2, 1, 0, "tests/a.py::test_b[x]")),
        ("ERROR tests/a.py - ImportError\n1 error in 0.50s (0:00:01)", (0, 1, 0, "tests/a.py")),
        ("2 skipped, 1 warning in 0.50s", (0, 0, 2, "")),
        ("Traceback (most recent call last):", (0, 0, 0, "")),
    ],
)  # fmt: skip
def test_counts(output: str, wanted: tuple[int, int, int, str]) -> None:
    assert versions.counts(output) == wanted


def test_builds_for_cuda_are_told() -> None:
    def report(*needs: str) -> str:
        return json.dumps({"install": [{"metadata": {"requires_dist": ["filelock", *needs]}}]})

    assert versions.cuda_packages(report()) == []
    needs = ('nvidia-cudnn-cu13==9; platform_system == "Linux"', "cuda-bindings<14,>=13", "triton==3.9")
    assert versions.cuda_packages(report(*needs)) == ["nvidia-cudnn-cu13==9", "cuda-bindings<14,>=13"]


def test_a_version_that_is_not_imported_is_no_result(tmp_path: Path) -> None:
    """A directory without the package: this environment's would be tested instead, in silence."""
    (tmp_path / "peft-0.0.1").mkdir()
    found = versions.try_package("peft", "0.0.1", tmp_path)
    assert found.passed == 0 and found.first.startswith("not imported: got ") and "0.0.1" not in found.first


def test_what_was_not_run_is_said() -> None:
    one = versions.Found("peft", versions.PACKAGES["peft"].versions[0], "x", 3, 1, 0, "a.py::test_b", 2.0, "abc")
    page = versions.page([one])
    assert "| 3 passed, 1 failed, first a.py::test_b | abc " in page
    assert page.count("| not run ") == sum(len(tried.versions) for tried in versions.PACKAGES.values()) - 1


def test_places_in_the_repository_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main([str(ROOT / "build" / "versions")])
    assert "lies in the repository" in capsys.readouterr().err


def test_the_page_has_every_version_and_both_ends() -> None:
    page, declared = versions.PAGE.read_text(), (ROOT / "pyproject.toml").read_text()
    for name, tried in versions.PACKAGES.items():
        for version in tried.versions:
            assert re.search(rf"^\| {name} +\| {re.escape(version)} +\|", page, re.MULTILINE), (name, version)
        (least,) = set(re.findall(rf'"{name}>=([\d.]+)', declared))
        assert versions.PACKAGES[name].versions[0].startswith(least)
        for path in tried.tests:
            file, _, name = path.partition("::")
            assert (ROOT / file).exists(), path
            assert not name or f"def {name}(" in (ROOT / file).read_text(), path


def test_what_is_not_in_the_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing named is everything; a version of nobody's would else run nothing and say that all is well."""
    assert len(versions.chosen([])) == sum(len(tried.versions) for tried in versions.PACKAGES.values())
    for wrong in ("peft==0.0.1", "torc"):
        with pytest.raises(SystemExit):
            versions.main([str(tmp_path), "--only", wrong])
        assert f"got {wrong!r}" in capsys.readouterr().err


def test_the_page_that_is_written_is_no_change_of_the_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "versions.md"
    page.parent.mkdir()
    page.write_text("a")
    (tmp_path / "code.py").write_text("a")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "a")):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "PAGE", page)
    page.write_text("b")
    clean = versions.commit()
    (tmp_path / "code.py").write_text("b")
    assert re.fullmatch(r"[0-9a-f]{12}", clean) and versions.commit() == f"{clean}+changes"
