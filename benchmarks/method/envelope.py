"""The one form of every result file: rows, and of which commit they are, where, when and by which command they were measured.

    {"format": 2, "kind": "models", "commit": "1120667f35cf", "dirty": false, "machine": "amd-epyc-…-2-cores",
     "date": "2026-11-24T18:01:37+00:00", "command": "python -m benchmarks.models.sweep --size 1b", "unknown": {},
     "conditions": {"environment": {…}, …}, "rows": [{…}, …]}

A field that nobody knows is null, and `unknown` says why: {"machine": "was not recorded"}. What else the rows depend on stands
in `conditions`. `python -m benchmarks.method.age` says how far such a file lies behind the tree.
"""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qkernels.errors import ArgumentError

from . import environment

FORMAT = 2
HEAD = ("commit", "dirty", "machine", "date", "command")  # what may be null, with its reason
CHANGED = "+changes"  # `environment.commit` of a tree that differs from its commit


@dataclass(frozen=True)
class Envelope:
    """One result file.

    Args:
        kind: what its rows are: "kernels", "models", "llama.cpp", "quality", "quality-dequantized", "quality-peers",
            "gguf-search", "gguf-mixes", "gguf-quantizing", "gguf-whole", "experts".
        commit: of the source tree, 7 to 40 hexadecimal digits.
        dirty: whether files other than results differed from that commit.
        machine: `environment.machine_name`.
        date: ISO 8601, with an offset.
        command: what was typed.
        rows: what was measured, JSON objects.
        conditions: what else the rows depend on.
        unknown: field -> why it is None; of `HEAD` alone.
    """

    kind: str
    commit: str | None
    dirty: bool | None
    machine: str | None
    date: str | None
    command: str | None
    rows: list[dict[str, Any]]
    conditions: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def tree(self) -> str:
        """The commit as `environment.commit` tells it: "+changes" behind it, or "unknown"."""
        return "unknown" if self.commit is None else f"{self.commit}{CHANGED if self.dirty else ''}"


def sealed(
    kind: str, where: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Envelope:  # fmt: skip
    """Rows in their envelope.

    Args:
        kind, rows, conditions: as of `Envelope`.
        where: `environment.describe`, or at least its machine, date and commit; the rest becomes `conditions["environment"]`.
        command: None: that of this process.
    """
    commit, changed, _ = where["commit"].partition(CHANGED)
    rest = {name: value for name, value in where.items() if name not in ("machine", "date", "commit")}
    conditions = {**({"environment": rest} if rest else {}), **(conditions or {})}
    unknown = {}
    if commit == "unknown":
        unknown = dict.fromkeys(("commit", "dirty"), "measured outside a repository")
    return Envelope(
        kind, None if unknown else commit, None if unknown else bool(changed), where["machine"], where["date"],
        command or this_command(), [dict(row) for row in rows], conditions, unknown,
    )  # fmt: skip


def where_of(envelope: Envelope) -> dict[str, Any]:
    """What `sealed` was given as `where`."""
    head = {"machine": envelope.machine, "date": envelope.date, "commit": envelope.tree}
    return {**envelope.conditions.get("environment", {}), **head}


def this_command() -> str:
    """The command line of this process, as `told` tells it; a script with a name of its own stands without Python before it."""
    python, *words = sys.orig_argv
    named = bool(words) and not words[0].startswith("-") and not words[0].endswith(".py")
    return told(words if named else [python, *words])


def told(command: Sequence[str]) -> str:
    """A command line without the folders of this machine: paths in this tree are relative to it, of others the name is left."""
    words = [re.sub("(^|=)/[^=]*/", r"\1", word.replace(f"{environment.ROOT}/", "")) for word in command]
    return shlex.join("python" if re.fullmatch(r"python[\d.]*", word) else word for word in words)


def to_json(envelope: Envelope) -> str:
    """The text of the file.

    Raises:
        ArgumentError: a field is not what `Envelope` says.
    """
    values = asdict(envelope)
    order = ("kind", *HEAD, "unknown", "conditions", "rows")
    complete = {"format": FORMAT, **{name: values[name] for name in order}}
    _check(complete, "a result")
    return json.dumps(complete, indent=1, ensure_ascii=False) + "\n"


def write(envelope: Envelope, path: Path) -> None:
    """Whole or not at all: a stop in the middle leaves the file that was there.

    Raises:
        ArgumentError: as `to_json`; nothing is written then.
    """
    text = to_json(envelope)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_with_table(envelope: Envelope, path: Path, text: str) -> None:
    """The rows, and beside them as .md how they read.

    Raises:
        ArgumentError: as `to_json`; nothing is written then.
    """
    write(envelope, path)
    path.with_suffix(".md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def rows_so_far(path: Path, kind: str, commit: str) -> list[dict[str, Any]]:
    """The rows that earlier runs of the same commit left there: a result that is made in parts goes on with them.

    Raises:
        ArgumentError: as `read`.
    """
    if not path.exists():
        return []
    found = read(path, kind)
    return [dict(row) for row in found.rows] if found.tree == commit else []


def read(path: str | Path, kind: str | None = None) -> Envelope:
    """What `write` wrote.

    Raises:
        ArgumentError: not such a file, of another format, or of another kind than the one asked for.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArgumentError(
            f"{path} must be a result file that the benchmark suite wrote, got {type(error).__name__}: {error}"
        ) from None
    _check(values, str(path))
    if kind is not None and values["kind"] != kind:
        raise ArgumentError(f"{path} must hold results of kind {kind!r}, got {values['kind']!r}")
    return Envelope(**{name: value for name, value in values.items() if name != "format"})


def _check(values: Any, what: str) -> None:
    if not isinstance(values, dict) or "format" not in values:
        raise ArgumentError(
            f"{what} must be a result file that the benchmark suite wrote: a JSON object with format, kind, {', '.join(HEAD)}, "
            f"unknown, conditions and rows, got {_described(values)}; measure again"
        )
    if values["format"] != FORMAT:
        raise ArgumentError(
            f"{what} has results of format {values['format']!r}, this version reads {FORMAT}; measure again"
        )
    names = {"format", "kind", *HEAD, "unknown", "conditions", "rows"}
    if values.keys() != names:
        raise ArgumentError(
            f"{what} must have the fields {', '.join(sorted(names))}; missing: {sorted(names - values.keys())}, "
            f"unexpected: {sorted(values.keys() - names)}"
        )
    expected = {
        "kind": (_is_text, "a word"),
        "commit": (_is_commit, "7 to 40 hexadecimal digits"),
        "dirty": (lambda v: isinstance(v, bool), "true or false"),
        "machine": (_is_text, "a name"),
        "date": (_is_date, "an ISO 8601 date with an offset"),
        "command": (_is_text, "a command"),
        "unknown": (_is_reasons, "field -> reason"),
        "conditions": (lambda v: isinstance(v, dict), "an object"),
        "rows": (lambda v: isinstance(v, list) and all(isinstance(row, dict) for row in v), "a list of objects"),
    }
    unknown = values["unknown"]
    for name, (right, form) in expected.items():
        value = values[name]
        if name in HEAD and value is None:
            if not isinstance(unknown, dict) or name not in unknown:
                raise ArgumentError(f"{what}: {name} is null, and unknown must say why, got {unknown!r}")
        elif not right(value):
            raise ArgumentError(f"{what}: {name} must be {form}, got {_described(value)}")
    if known := [name for name in unknown if name not in HEAD or values[name] is not None]:
        raise ArgumentError(f"{what}: unknown must name fields that are null, got {', '.join(known)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_commit(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{7,40}", value) is not None


def _is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _is_reasons(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(reason) for reason in value.values())


def _described(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:60]}…"
