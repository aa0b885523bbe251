"""`atomic_directory`, `atomic_files`: what appears complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..errors import CheckpointError
from .files import DISK_FULL, read_json, write_error, write_json

log = logging.getLogger(__name__)

# In every directory made here: the files in it and their sizes, so that a later run knows what it may replace.
MANIFEST: Final = ".qkernels-files.json"


@contextmanager
def atomic_directory(
    target: str | os.PathLike[str], overwrite: bool = False, sources: Collection[Path] = ()
) -> Iterator[Path]:
    """Fill a directory all or nothing: yields a temporary directory beside `target`, which takes its place on success.

    A kill at any time leaves `target` absent (or as it was) or complete, and at most a hidden
    `.<name>.qkernels-<random>.tmp` beside it, which the next run for the same target removes. A live writer holds a
    lock on its temporary directory, so that nobody takes it for a leftover. With `overwrite` the old directory is moved
    aside, replaced, then deleted; after a kill between the two renames the next run moves it back.

    Args:
        overwrite: replace a directory that this function made and nobody changed since: every file in it must be on its list
            (`MANIFEST`), with the size that it had.
        sources: what the body reads (`read_from`), which `target` must not hold.

    Raises:
        CheckpointError: `target` exists and is not an empty directory (with `overwrite`: holds what was not written here); or
            it holds one of `sources`; or the disk is full or read-only. Nothing is left behind then. Other errors of the
            body pass through, with the same tidying.
    """
    path = Path(target).expanduser().resolve()
    temporary: Path | None = None
    lock = -1
    try:
        with _as_checkpoint_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            _check_target(path, overwrite, sources)
            temporary, lock = _locked_directory(path)
        with _as_checkpoint_error(path, DISK_FULL):
            yield temporary
        with _as_checkpoint_error(path):
            write_json(temporary / MANIFEST, {"files": _sizes(temporary)})
            _sync_tree(temporary)
            _check_target(path, overwrite, sources)
            _move_into_place(temporary, path)
            temporary = None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


@contextmanager
def atomic_files(
    directory: Path, names: Sequence[str], magic: bytes, overwrite: bool = False, sources: Collection[Path] = ()
) -> Iterator[Path]:
    """Files that appear in `directory` complete or not at all: yields a temporary directory in it to write them in; each takes
    its place on success, the first of them last, so that who finds that one finds them all. What kills leave goes as in
    `atomic_directory`.

    Args:
        names: of the files that the body writes.
        magic: how such files begin. With `overwrite`, a file that begins so is replaced.
        sources: what the body reads, which none of the files may be.

    Raises:
        CheckpointError: one of the files exists; or is one of `sources`, or no such file; or the disk is full or read-only.
    """
    first = directory / names[0]
    temporary: Path | None = None
    lock = -1
    try:
        with _as_checkpoint_error(first):
            directory.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(first)
            _check_files(directory, names, magic, overwrite, sources)
            temporary, lock = _locked_directory(first)
        with _as_checkpoint_error(first, DISK_FULL):
            yield temporary
        with _as_checkpoint_error(first):
            _sync_tree(temporary)
            _check_files(directory, names, magic, overwrite, sources)
            for name in reversed(names):
                (temporary / name).replace(directory / name)
            _sync(directory)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _check_files(
    directory: Path, names: Sequence[str], magic: bytes, overwrite: bool, sources: Collection[Path]
) -> None:
    for path in (directory / name for name in names):
        if not path.exists():
            continue
        if path.resolve() in sources:
            raise CheckpointError(f"{path} is read to write it, and is kept; choose another target")
        if not overwrite:
            raise CheckpointError(
                f"{path} exists; choose another target, remove it, or pass overwrite=True (--overwrite)"
            )
        with path.open("rb") as file:  # a directory cannot be opened, and says so
            begins = file.read(len(magic))
        if begins != magic:
            raise CheckpointError(
                f"{path} does not begin with {magic!r}, so it is not overwritten; choose another target"
            )


@contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """For a while, nobody else holds this directory; False where somebody does, in this process or another."""
    lock = _try_lock(directory)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def _as_checkpoint_error(path: Path, errnos: Collection[int] | None = None) -> Iterator[None]:
    """Turn an OSError (of these numbers) into the one clear error about writing `path`."""
    try:
        yield
    except OSError as error:
        if errnos is not None and error.errno not in errnos:
            raise
        raise write_error(error, path) from error


def read_from(*paths: str | os.PathLike[str] | None) -> list[Path]:
    """Where files and directories, and the files in those, really lie: what `sources` is made of."""
    given = [Path(path).expanduser() for path in paths if path is not None]
    inside = [file for path in given if path.is_dir() for file in path.iterdir() if file.is_file()]
    return [path.resolve() for path in (*given, *inside)]


def _check_target(path: Path, overwrite: bool, sources: Collection[Path]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} exists and is not a directory; choose another target")
    if not any(path.iterdir()):
        return
    if held := [source for source in sources if source.is_relative_to(path)]:
        raise CheckpointError(f"{path} holds {held[0]}, which is read to write it, and is kept; choose another target")
    if not overwrite:
        raise CheckpointError(
            f"{path} exists and is not empty; choose another target, remove it, or pass overwrite=True (--overwrite)"
        )
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} has no {MANIFEST}, so qkernels did not write it (or an early version did), and it is not overwritten; "
            "choose another target, or remove it"
        )
    listed = read_json(path / MANIFEST).get("files")
    own = listed if isinstance(listed, dict) else {}
    if strange := sorted(name for name, size in _sizes(path).items() if own.get(name) != size):
        what = f"{strange[0]}{f' and {len(strange) - 1} other files' * (len(strange) > 1)}"
        raise CheckpointError(
            f"{path} has {what}, which qkernels did not write or somebody changed since, and is not overwritten; move what "
            "is to be kept, or choose another target"
        )


def _sizes(directory: Path) -> dict[str, int]:
    """The files in a directory and below it, links among them, by their path in it."""
    found = {
        str(p.relative_to(directory)): p.lstat().st_size for p in directory.rglob("*") if p.is_file() or p.is_symlink()
    }
    return {name: size for name, size in sorted(found.items()) if name != MANIFEST}


def _locked_directory(path: Path) -> tuple[Path, int]:
    """A new temporary directory for `path` and a descriptor that holds a lock on it for as long as it is open."""
    for _ in range(100):
        temporary = path.parent / f".{path.name}.qkernels-{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        lock = _try_lock(temporary)
        # Another run may have taken the directory for a leftover between the two lines above.
        if lock is not None and temporary.exists():
            return temporary, lock
        if lock is not None:
            os.close(lock)
    raise CheckpointError(f"cannot keep a temporary directory beside {path}: another process removes it each time")


def _try_lock(directory: Path) -> int | None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: then leftovers are never removed either, see _remove_leftovers
        return descriptor
    return descriptor


def _remove_leftovers(path: Path) -> None:
    """Tidy what killed runs for this target left: unfinished directories go, a directory moved aside comes back."""
    for kind in ("old", "tmp"):
        for leftover in path.parent.glob(f".{_escaped(path.name)}.qkernels-????????.{kind}"):
            try:
                descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # its writer finished meanwhile
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if kind == "old" and not path.exists():
                    log.warning("%s: restoring the directory that an interrupted run had moved aside", path)
                    leftover.rename(path)
                else:
                    log.warning("%s: removing what an interrupted run left in %s", path, leftover.name)
                    shutil.rmtree(leftover, ignore_errors=True)
            except OSError as error:  # its writer lives, or the file system has no locks and cannot tell
                log.info("%s: leaving %s alone (%s)", path, leftover.name, error)
            finally:
                os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _move_into_place(temporary: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        temporary.rename(path)  # also onto an empty directory
        _sync(path.parent)
        return
    aside = temporary.with_suffix(".old")
    lock = _try_lock(path)
    try:
        path.rename(aside)
        try:
            temporary.rename(path)
        except OSError:
            aside.rename(path)
            raise
        _sync(path.parent)
        doomed = aside.rename(temporary)  # an .old is always complete; one that is half deleted must not come back
        shutil.rmtree(doomed, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _unsupported_is_fine():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _unsupported_is_fine() -> Iterator[None]:
    """Some network file systems cannot fsync a directory and say EINVAL; every other failure is one."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
