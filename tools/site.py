"""Lays out the pages of the documentation site, which `make docs` builds with mkdocs (mkdocs.yml).

    python -m tools.site build/pages

The pages are the repository's own, in its own folders, so that a link works on a code host and here alike. Two things a code host
does and a site does not: a link to a folder leads to its README, or to a list of the pages in it; and files that are no pages (a
source, a table of results) are copied as far as a page leads to them.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "benchmarks/results/**/*.md", "tests/*/README.md", "examples/*/README.md")
LINK = re.compile(r"(?P<before>\]\()(?P<path>(?!https?:|#|mailto:)[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """Every page of the site, relative to the root."""
    return sorted({path.relative_to(root) for pattern in PATTERNS for path in root.glob(pattern)})


def with_index(text: str, page: Path, root: Path) -> str:
    """The page's text, with links to folders led to the folder's page."""

    def led(link: re.Match[str]) -> str:
        path = link["path"].rstrip("/")
        if (root / page.parent / path).is_dir():
            path += "/README.md"
        return f"{link['before']}{path}{link['anchor'] or ''}"

    parts = CODE.split(text)  # code stands at odd places
    return "".join(part if at % 2 else LINK.sub(led, part) for at, part in enumerate(parts))


def targets(text: str, page: Path, root: Path) -> Iterator[Path]:
    """What a page links to, relative to the root: files and folders of the repository."""
    for part in CODE.split(text)[::2]:
        for link in LINK.finditer(part):
            found = (root / page.parent / link["path"]).resolve()
            if found.exists() and found.is_relative_to(root):
                yield found.relative_to(root)


def listing(folder: Path, found: Sequence[Path], root: Path) -> str:
    """A page that lists the pages below a folder, by their titles."""
    lines = [f"# {folder.name.replace('-', ' ').capitalize()}", ""]
    for page in found:
        title = (root / page).read_text(encoding="utf-8").lstrip("# ").partition("\n")[0]
        lines.append(f"* [{title}]({page.relative_to(folder).as_posix()})")
    return "\n".join([*lines, ""])


def lay_out(root: Path, out: Path) -> list[Path]:
    """Writes the pages and what they lead to below `out`, which is emptied first; returns them, relative to `out`."""
    shutil.rmtree(out, ignore_errors=True)
    known, written = pages(root), []
    for page in known:
        text = (root / page).read_text(encoding="utf-8")
        for target in targets(text, page, root):
            readme = target / "README.md"
            if (root / target).is_dir() and readme not in known and readme not in written:
                below = [other for other in known if target in other.parents]
                written.append(_write(out, readme, listing(target, below, root)))
            elif (root / target).is_file() and target not in known:
                (out / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / target, out / target)
        written.append(_write(out, page, with_index(text, page, root)))
    return written


def _write(out: Path, page: Path, text: str) -> Path:
    (out / page).parent.mkdir(parents=True, exist_ok=True)
    (out / page).write_text(text, encoding="utf-8")
    return page


if __name__ == "__main__":
    print(f"{len(lay_out(ROOT, Path(sys.argv[1]).resolve()))} pages")
