"""The tree that is cloned: what git tracks stays small."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_BYTES = 40 << 20


def tracked_bytes(root: Path) -> dict[str, int]:
    """Bytes of every tracked file, as it lies in the working tree."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    paths = [root / name for name in done.stdout.split("\0") if name]
    return {str(path.relative_to(root)): path.lstat().st_size for path in paths if path.is_symlink() or path.exists()}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository (a source archive)")
def test_tracked_files_stay_below_40_mib() -> None:
    sizes = tracked_bytes(ROOT)
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    assert len(sizes) > 100
    assert sum(sizes.values()) < MOST_BYTES, [(name, sizes[name]) for name in largest]


def test_untracked_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    (tmp_path / "b").write_text("not tracked")
    for command in (["init", "-q"], ["add", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert tracked_bytes(tmp_path) == {"a": 3}
