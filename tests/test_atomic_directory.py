"""`atomic_directory`: complete or absent, whatever interrupts it."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qkernels.errors import CheckpointError
from qkernels.storage import MANIFEST, ShardWriter, atomic_directory, read_from, read_json, write_json


def leftovers(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if p.name.startswith("."))


def fill(directory: Path, text: str = "new") -> None:
    write_json(directory / "config.json", {"text": text})


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as temporary:
        fill(temporary)
        assert not target.exists()
        assert temporary.parent == target.parent
    assert read_json(target / "config.json") == {"text": "new"}
    assert leftovers(target.parent) == []
    assert target.stat().st_mode & 0o777 == tmp_path.joinpath("deep").stat().st_mode & 0o777  # not the 0700 of mkdtemp


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "x")])
def test_nothing_is_left_of_a_body_that_fails(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with atomic_directory(tmp_path / "out") as temporary:
            fill(temporary)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def enter(target: Path, overwrite: bool = False) -> None:
    with atomic_directory(target, overwrite) as temporary:
        fill(temporary)


def test_what_is_there_is_kept_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    enter(target)  # empty: taken
    with pytest.raises(
        CheckpointError, match="exists and is not empty; choose another target, remove it, or pass overwrite"
    ):
        enter(target)
    with atomic_directory(target, overwrite=True) as temporary:
        fill(temporary, "newer")
        (temporary / "deep").mkdir()
        (temporary / "deep" / "other").write_text("x")
    assert read_json(target / "config.json") == {"text": "newer"}
    enter(target, overwrite=True)
    assert read_json(target / "config.json") == {"text": "new"}
    assert sorted(p.name for p in target.iterdir()) == [MANIFEST, "config.json"]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["thesis.tex", "config.json", "deep/notes.txt", "link", ".git/config"])
def test_only_what_was_written_here_is_overwritten(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    enter(out)
    strange = out / name
    strange.parent.mkdir(exist_ok=True)
    if name == "link":
        strange.symlink_to(tmp_path)
    else:
        strange.write_text("somebody's own")
    with pytest.raises(
        CheckpointError, match=rf"out has {name}, which qkernels did not write or somebody changed since"
    ):
        enter(out, overwrite=True)
    assert name == "link" or strange.read_text() == "somebody's own"


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    """A float checkpoint, too, has a config.json and a model.safetensors."""
    out = tmp_path / "out"
    out.mkdir()
    fill(out)
    with pytest.raises(CheckpointError, match=r"has no \.qkernels-files\.json, so qkernels did not write it"):
        enter(out, overwrite=True)
    (out / MANIFEST).write_text('{"files": 3}')
    with pytest.raises(CheckpointError, match=r"has config\.json, which qkernels did not write"):
        enter(out, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not a directory"):
        enter(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("where", ["out", "out/inside", "link", "links/config.json"])
def test_a_source_survives(where: str, tmp_path: Path) -> None:
    """It may be the target, lie in it, be called otherwise, or have files that do."""
    out = tmp_path / "out"
    with atomic_directory(out) as temporary:
        fill(temporary)
        (temporary / "inside").mkdir()
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "config.json").symlink_to(out / "config.json")
    source = tmp_path / where
    sources = read_from(source if source.is_dir() else source.parent)
    for target in (out, tmp_path / "link"):
        for overwrite in (False, True):
            with (
                pytest.raises(CheckpointError, match=r"out holds .*out.*, which is read to write it, and is kept"),
                atomic_directory(target, overwrite, sources),
            ):
                pytest.fail("the body began")
    assert read_json(out / "config.json") == {"text": "new"}
    inside = tmp_path / "links" / "made"  # a target in a source destroys nothing
    with atomic_directory(inside, sources=read_from(tmp_path / "links")) as temporary:
        fill(temporary)
    assert (tmp_path / "links" / "config.json").is_symlink()


def test_a_target_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    def race() -> None:
        with atomic_directory(tmp_path / "out") as temporary:
            fill(temporary)
            (tmp_path / "out").mkdir()
            fill(tmp_path / "out", "theirs")

    with pytest.raises(CheckpointError, match="exists and is not empty"):
        race()
    assert read_json(tmp_path / "out" / "config.json") == {"text": "theirs"}
    assert leftovers(tmp_path) == []


def test_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    """The lock is per open file, so two writers of one process see each other as two processes do."""

    def second(first: Path) -> None:
        with atomic_directory(tmp_path / "out"):
            assert first.exists()
            raise ZeroDivisionError

    with atomic_directory(tmp_path / "out") as first:
        fill(first, "first")
        with atomic_directory(tmp_path / "other"):
            pass
        with pytest.raises(ZeroDivisionError):
            second(first)
    assert read_json(tmp_path / "out" / "config.json") == {"text": "first"}


def test_leftovers_of_the_dead_go_and_nothing_else(tmp_path: Path) -> None:
    dead = tmp_path / ".out.qkernels-0123abcd.tmp"
    alike = [tmp_path / ".out2.qkernels-0123abcd.tmp", tmp_path / ".out.cache", tmp_path / "out.qkernels-0123abcd.tmp"]
    for path in [dead, *alike]:
        path.mkdir()
        fill(path)
    enter(tmp_path / "out")
    assert not dead.exists()
    assert all(path.exists() for path in alike)


def test_a_name_with_wildcards_is_a_name(tmp_path: Path) -> None:
    other = tmp_path / ".outX.qkernels-0123abcd.tmp"
    other.mkdir()
    enter(tmp_path / "out[X]")
    enter(tmp_path / "out*")
    assert other.exists()


def test_what_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """As after a kill between the two renames of an overwrite."""
    aside = tmp_path / ".out.qkernels-0123abcd.old"
    aside.mkdir()
    fill(aside, "old")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        enter(tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == {"text": "old"}
    assert leftovers(tmp_path) == []


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from qkernels.storage import atomic_directory, read_json, write_json

FILES, TRIALS = 8, 20
root, mode = Path(sys.argv[1]), sys.argv[2]
target, old = root / "out", {"text": "old"}
random.seed(0)

def fill(directory):
    for i in range(FILES):
        (directory / f"{i}.bin").write_bytes(bytes(20_000))
        time.sleep(0.001)
    write_json(directory / "config.json", {"text": "new"})

def write():
    if mode == "direct":  # what must be found out
        target.mkdir()
        return fill(target)
    with atomic_directory(target, mode == "overwrite") as temporary:
        fill(temporary)

def reset():
    for path in root.iterdir():
        shutil.rmtree(path)
    if mode == "overwrite":
        with atomic_directory(target) as temporary:
            write_json(temporary / "config.json", old)

def state():
    if not target.exists():
        return "absent"
    sizes = {p.name: p.stat().st_size for p in target.glob("*.bin")}
    if not sizes and mode == "overwrite":
        return "old" if read_json(target / "config.json") == old else "broken"
    whole = sizes == {f"{i}.bin": 20_000 for i in range(FILES)} and (target / "config.json").exists()
    return "complete" if whole else "broken"

reset()
began = time.perf_counter()
write()
duration = time.perf_counter() - began
for trial in range(TRIALS):
    reset()
    child = os.fork()
    if child == 0:
        write()
        os._exit(0)
    if trial < TRIALS - 1:  # the last one may finish
        time.sleep(trial and random.uniform(0, 1.3 * duration))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found, hidden = state(), [p.suffix for p in root.iterdir() if p.name.startswith(".")]
    if mode == "overwrite" or found == "absent":
        write()
    print(found, len(hidden), ".old" in hidden, state(), *(p.name for p in root.iterdir()))
"""


def kills(root: Path, mode: str) -> list[list[str]]:
    """For each kill: what it left, how many hidden directories, whether the old one is among them; then what the next
    run made of it, and what else is there."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(root), mode], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_a_kill_at_any_time_leaves_the_target_absent_or_complete(tmp_path: Path) -> None:
    trials = kills(tmp_path, "create")
    assert {found for found, *_ in trials} == {"absent", "complete"}
    assert any(int(hidden) for _, hidden, *_ in trials)  # some kills did leave something, …
    assert all(trial[3:] == ["complete", "out"] for trial in trials)  # … which the next run removed


def test_a_kill_while_overwriting_loses_nothing(tmp_path: Path) -> None:
    trials = kills(tmp_path, "overwrite")
    assert {"old", "complete"} <= {found for found, *_ in trials} <= {"old", "complete", "absent"}
    assert all(aside == "True" for found, _, aside, *_ in trials if found == "absent")  # the old one lies beside it
    assert any(int(hidden) for _, hidden, *_ in trials)
    assert all(trial[3:] == ["complete", "out"] for trial in trials)


def test_a_writer_that_is_not_atomic_is_found_out(tmp_path: Path) -> None:
    assert "broken" in {found for found, *_ in kills(tmp_path, "direct")}


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 200 kB. The kernel answers as for a full disk, with EFBIG in place of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_much(target: Path) -> None:
    with atomic_directory(target) as temporary:
        writer = ShardWriter(temporary)
        for i in range(10):
            writer.add(f"t{i}", torch.zeros(10_000))
        writer.close()


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no space left to write .*\(File too large, \d+ MiB are free\); free some"
    ):
        write_much(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["shutil.copyfileobj", "json.dumps", "os.fsync", "pathlib.Path.rename"])
def test_a_disk_that_fills_up_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(CheckpointError, match=r"no space left to write .*No space left on device"):
        write_much(tmp_path / "out")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write .*out: "):
        enter(tmp_path / "file" / "out")
