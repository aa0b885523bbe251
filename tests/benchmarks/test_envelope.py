"""The one form of result files: what is refused, what is never invented, and how far a file lies behind the tree."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.method import age, envelope, environment
from benchmarks.method.envelope import Envelope
from qkernels.errors import ArgumentError

WHERE = {"machine": "here", "date": "2026-11-24T18:01:37+00:00", "commit": "0123456789ab+changes", "torch": "2.13"}
SEALED = envelope.sealed("models", WHERE, [{"a": 1.5}, {"a": None}], {"size": "1b"}, command="python -m benchmarks")


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    envelope.write(SEALED, tmp_path / "new" / "run.json")
    assert envelope.read(tmp_path / "new" / "run.json", "models") == SEALED
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]
    assert (SEALED.commit, SEALED.dirty, SEALED.conditions) == (
        "0123456789ab", True, {"environment": {"torch": "2.13"}, "size": "1b"},
    )  # fmt: skip
    assert envelope.where_of(SEALED) == WHERE


def test_a_table_lies_beside_its_rows(tmp_path: Path) -> None:
    given = envelope.sealed(
        "models", {"machine": "m", "date": "2026-11-30T00:00:00+00:00", "commit": "0" * 12}, [{"a": 1}]
    )
    envelope.write_with_table(given, tmp_path / "r.json", "| a |\n")
    assert envelope.read(tmp_path / "r.json", "models") == given
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == "| a |\n"
    with pytest.raises(ArgumentError):
        envelope.write_with_table(replace(given, kind=""), tmp_path / "wrong.json", "| a |")
    assert not list(tmp_path.glob("wrong*"))


def test_outside_a_repository_the_commit_is_null_with_its_reason(tmp_path: Path) -> None:
    made = envelope.sealed("models", {**WHERE, "commit": "unknown"}, [])
    envelope.write(made, tmp_path / "run.json")
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["commit"] is stored["dirty"] is None
    assert stored["unknown"] == dict.fromkeys(("commit", "dirty"), "measured outside a repository")
    assert envelope.where_of(envelope.read(tmp_path / "run.json"))["commit"] == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has results of format 1, this version reads 2; measure again"),
        ({"extra": 1}, r"must have the fields .*unexpected: \['extra'\]"),
        ({"rows": None}, "rows must be a list of objects, got None"),
        ({"rows": [1]}, r"rows must be a list of objects, got \[1\]"),
        ({"commit": "0123456789ab+changes"}, "commit must be 7 to 40 hexadecimal digits, got '0123456789ab\\+changes'"),
        ({"dirty": "no"}, "dirty must be true or false, got 'no'"),
        ({"date": "2026-11-24"}, "date must be an ISO 8601 date with an offset, got '2026-11-24'"),
        ({"date": "yesterday"}, "date must be an ISO 8601 date"),
        ({"machine": " "}, "machine must be a name"),
        ({"machine": None}, "machine is null, and unknown must say why, got {}"),
        ({"machine": None, "unknown": {"machine": ""}}, "unknown must be field -> reason"),
        ({"unknown": {"machine": "lost"}}, "unknown must name fields that are null, got machine"),
        ({"unknown": {"rows": "lost"}}, "unknown must name fields that are null, got rows"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = json.loads(envelope.to_json(SEALED)) | changes
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(ArgumentError, match=f"bad.json.*{message}"):
        envelope.read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSONDecodeError"),
        ("[]", r"a JSON object with format, kind, commit, dirty, machine, date, command, .*, got \[\]"),
        ('{"models": []}', r"got \{'models': \[\]\}"),
        (None, "FileNotFoundError"),
    ],
)
def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "bad.json").write_text(text)
    with pytest.raises(
        ArgumentError, match=f"bad.json must be a result file that the benchmark suite wrote.*{message}"
    ):
        envelope.read(tmp_path / "bad.json")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    envelope.write(SEALED, tmp_path / "run.json")
    with pytest.raises(ArgumentError, match="must hold results of kind 'kernels', got 'models'"):
        envelope.read(tmp_path / "run.json", "kernels")


def test_nothing_is_written_that_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a result: date must be"):
        envelope.write(replace(SEALED, date="today"), tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (
            ["/usr/bin/python3", "-m", "benchmarks", "--out", "ROOT/out/a b.json"],
            "python -m benchmarks --out 'out/a b.json'",
        ),
        (["/venv/bin/python", "/venv/bin/qkernels", "bench", "--json"], "qkernels bench --json"),
        (["python3.12", "ROOT/examples/demo.py"], "python examples/demo.py"),
        (
            ["python", "-m", "a.b", "--tool", "hqq=/venvs/hqq/bin/python", "--out=/tmp/r"],
            "python -m a.b --tool hqq=python --out=r",
        ),
    ],
)
def test_the_command_is_told_without_folders(typed: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", [word.replace("ROOT", str(environment.ROOT)) for word in typed])
    assert envelope.this_command() == told


def git(root: Path, *words: str) -> str:
    named = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *named, *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commits_between_a_result_and_now_are_counted_by_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    git(tmp_path, "init", "-q")
    commits = []
    for name in ("README", "csrc/a", "qkernels/b", "csrc/c", "docs/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", name)
        commits.append(git(tmp_path, "rev-parse", "--short=12", "HEAD"))
    written = [replace(SEALED, commit=commit, dirty=False) for commit in (commits[0], commits[2], "0123456789ab")]
    lost = dict.fromkeys(("commit", "dirty", "machine"), "lost")
    written.append(replace(SEALED, commit=None, dirty=None, machine=None, unknown=lost))
    written[1] = replace(written[1], machine=environment.machine_name(torch.device("cpu")))
    paths = [tmp_path / f"{i}.json" for i in range(len(written))]
    for sealed, path in zip(written, paths, strict=True):
        envelope.write(sealed, path)
    (tmp_path / "plain.json").write_text('[{"kl": 0.1}]')
    lines, wrong = age.check([*paths, tmp_path / "plain.json"], tmp_path)
    assert [line[3:] for line in lines] == [
        [commits[0], "2", "1", "another", ""], [commits[2], "1", "0", "this", ""],
        ["0123456789ab", "?", "?", "another", ""], ["–", "?", "?", "–", "commit, dirty, machine"],
    ]  # fmt: skip
    assert len(wrong) == 1 and "plain.json must be a result file" in wrong[0]
    assert age.main([str(path) for path in paths]) == 0
    assert age.main([str(tmp_path / "plain.json")]) == 1
    assert "plain.json must be a result file" in capsys.readouterr().err


def test_every_result_of_this_tree_has_its_envelope() -> None:
    paths = sorted(environment.RESULTS.rglob("*.json"))
    assert len(paths) > 3
    assert all(isinstance(envelope.read(path), Envelope) for path in paths)
