"""The documentation site: every page is laid out, and a dead link stops the build."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.site import ROOT, lay_out, pages, with_index

CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository of three pages and a source file."""
    for name, text in {
        "README.md": "# Top\n[d](benchmarks/results/) [s](src/a.py) [w](https://x.y/z) `[c](benchmarks/results/)`\n",
        "benchmarks/results/0001-a.md": "# 0001 A title\n[up](../../README.md#top)\n",
        "benchmarks/results/0002-b.md": "# 0002 B\n",
        "src/a.py": "pass\n",
        "src/b.py": "pass\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_folders_become_lists_and_sources_come_along(small: Path) -> None:
    out = small / "build/pages"
    written = lay_out(small, out)
    assert {path.as_posix() for path in written} == {
        "README.md",
        *(f"benchmarks/results/{name}.md" for name in ("README", "0001-a", "0002-b")),
    }
    top = (out / "README.md").read_text()
    assert "[d](benchmarks/results/README.md) [s](src/a.py) [w](https://x.y/z) `[c](benchmarks/results/)`" in top
    listed = (out / "benchmarks/results/README.md").read_text()
    assert listed == "# Results\n\n* [0001 A title](0001-a.md)\n* [0002 B](0002-b.md)\n"
    assert (out / "src/a.py").read_text() == "pass\n" and not (out / "src/b.py").exists()


def test_what_was_laid_out_before_is_gone(small: Path) -> None:
    out = small / "build/pages"
    lay_out(small, out)
    (small / "benchmarks/results/0002-b.md").unlink()
    lay_out(small, out)
    assert not (out / "benchmarks/results/0002-b.md").exists()


def test_anchors_stay(small: Path) -> None:
    text = with_index("[a](benchmarks/results#x) [b](CHANGELOG.md#y)", Path("README.md"), small)
    assert text == "[a](benchmarks/results/README.md#x) [b](CHANGELOG.md#y)"


def test_every_page_for_users_is_in_the_contents(tmp_path: Path) -> None:
    """And the contents name no page that is not there."""
    written = {path.as_posix() for path in lay_out(ROOT, tmp_path / "pages")}
    named = set(re.findall(r": (\S+\.md)$", CONFIG, re.MULTILINE))
    assert named <= written
    assert {page.as_posix() for page in pages(ROOT) if page.parent == Path("docs")} <= named


def test_the_site_builds_and_a_dead_link_stops_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed; make docs installs it")
    config = CONFIG.replace("build/pages", "pages").replace("build/site", "site")
    (tmp_path / "mkdocs.yml").write_text(config, encoding="utf-8")
    lay_out(ROOT, tmp_path / "pages")
    build = [sys.executable, "-m", "mkdocs", "build"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Mixtures of experts" in (tmp_path / "site" / "docs" / "using.html").read_text(encoding="utf-8")
    page = tmp_path / "pages/SECURITY.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[gone](nowhere.md)\n", encoding="utf-8")
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0 and "nowhere.md" in done.stderr
