"""The documentation leads somewhere: links, anchors, pages that code names; and what has to be said in one place is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "tests/**/*.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!https?:)([^)\s]+)\)")
SOURCES = [
    path
    for folder in ("qkernels", "csrc", "tests", "benchmarks", "tools", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and ".venv" not in path.parts
]


def prose(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What may stand behind # in a link to the page."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    wrong = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead(page, prose(ROOT / page)) == []


def test_a_dead_link_is_noticed() -> None:
    text = "[a](nowhere.md) [b](docs/using.md#nowhere) [c](docs/using.md#compiling-and-exporting) [d](https://x.y/z)"
    assert dead(Path("README.md"), text) == ["nowhere.md", "docs/using.md#nowhere"]


def test_every_page_of_docs_is_reached_from_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(page))]
        waiting += [target for target in targets if target.suffix == ".md"]
        if any(target == ROOT / "docs" / "decisions" for target in targets):
            waiting += (ROOT / "docs" / "decisions").glob("*.md")
    assert sorted((ROOT / "docs").rglob("*.md")) == sorted(p for p in reached if (ROOT / "docs") in p.parents)


def test_pages_that_code_names_exist() -> None:
    """(But "ggml's docs/…" is ggml's.)"""
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in SOURCES
        for name in re.findall(r"(?<!'s )\bdocs/[\w\-/]+\.md", path.read_text(encoding="utf-8", errors="replace"))
        if path != Path(__file__)
    }
    assert len(named) > 5
    assert sorted((path, name) for path, name in named if not (ROOT / name).exists()) == []


def test_what_no_gpu_has_run_is_said_in_one_place() -> None:
    """At the head of the kernel log, for whoever reads, and by `doctor`: a measurement then changes these two."""
    said = re.compile(r"never (?:been )?run on (?:a gpu|one)|has run on a gpu yet|has not run on a gpu", re.IGNORECASE)
    pages = [*PAGES, *(path.relative_to(ROOT) for path in SOURCES if path != Path(__file__))]
    where = {str(page) for page in pages if said.search((ROOT / page).read_text(encoding="utf-8", errors="replace"))}
    assert where == {"docs/kernel-log.md", "qkernels/cli/diagnosis.py"}


def test_nothing_is_tracked_that_a_tool_left() -> None:
    """Logs of other tools, and caches; from a source archive there is nothing to ask."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    left = [
        name for name in done.stdout.splitlines() if re.search(r"(^|/)logs/|\.log$|__pycache__|\.so$|\.egg-info/", name)
    ]
    assert left == []
