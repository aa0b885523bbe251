"""Runs stages one after the other, each in a process group of its own, under its own limit and one deadline for all.

What a stage writes goes to a file of `--out` as it comes, so that a stop at any moment loses nothing; a file takes 16 MB and
says where it was cut. A stage that hangs, dies or finds a wrong number is written down, and the next one runs: a process that
has met an error of CUDA takes its context with it. Between them the card is asked whether it still answers.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .stages import PATHS, Stage

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_BYTES, MOST_FILES = 16 << 20, 8
LOG = "log.jsonl"
PROBE_SECONDS = 10.0
LEAST_SECONDS = 2.0  # below this a stage is not worth its start


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: "passed", "failed", "out of time", "left out" (a program is missing), "skipped" (its paths
    failed, the deadline has come, or the card is gone). `found`: the exit status or the reason."""

    stage: str
    verdict: str
    found: str
    seconds: float


class Sink:
    """The files of one folder, each cut at `MOST_BYTES`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        room = MOST_BYTES - size - 64  # for the word at the end
        if room <= 0 or not data:
            return
        with path.open("ab") as file:
            file.write(data[:room])
            if len(data) > room:
                file.write(b"\n... cut: the file is full\n")


def run_stage(command: Sequence[str], limit: float, sink: Sink, file: str, environment: Mapping[str, str]) -> Outcome:
    """One process group, killed as a whole at its limit and at its end."""
    start = time.monotonic()
    sink.write(file, f"# {' '.join(command)}\n".encode())
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **environment}, cwd=ROOT,
        )  # fmt: skip
    except OSError as error:
        return Outcome("", "failed", f"it does not start: {error}", 0.0)
    assert process.stdout is not None
    late = False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = limit - (time.monotonic() - start)
            if left <= 0:
                late = True
                break
            if selector.select(min(left, 0.2)):
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                sink.write(file, data)
            elif process.poll() is not None:  # ended, and a child of it keeps the pipe open
                break
    if not late:
        try:
            process.wait(timeout=max(0.0, limit - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            late = True
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left of its group
    process.wait()
    os.set_blocking(process.stdout.fileno(), False)
    sink.write(file, process.stdout.read() or b"")
    process.stdout.close()
    seconds = time.monotonic() - start
    sink.write(file, b"\n")
    if late:
        return Outcome("", "out of time", f"killed after {limit:.0f} s", seconds)
    code = process.returncode
    return Outcome("", "passed" if code == 0 else "failed", f"exit status {code}", seconds)


@dataclass
class Runner:
    """
    Args:
        out: the folder of all files.
        words: what `{drive}`, `{python}`, `{old}` stand for.
        deadline: seconds for all stages; None: no deadline.
        probe: a command that succeeds as long as the card answers.
    """

    out: Path
    words: Mapping[str, str]
    deadline: float | None
    probe: tuple[str, ...]

    def run(self, stages: Sequence[Stage]) -> list[Outcome]:
        files = {LOG, *(stage.file for stage in stages)}
        assert len(files) <= MOST_FILES, f"{len(files)} files, at most {MOST_FILES}: {sorted(files)}"
        sink, begin = Sink(self.out), time.monotonic()
        good, lost, outcomes = set(PATHS), False, []
        for stage in stages:
            left = None if self.deadline is None else self.deadline - (time.monotonic() - begin)
            why = self._why_not(stage, good, left, lost)
            if why is None:
                limit = stage.limit if left is None else min(stage.limit, left)
                print(f"{stage.name} ...", file=sys.stderr, flush=True)
                sink.write(
                    LOG, json.dumps({"begins": stage.name, "at": round(time.monotonic() - begin, 2)}).encode() + b"\n"
                )
                done = run_stage(self._command(stage, good), limit, sink, stage.file, dict(stage.environment))
                outcome = Outcome(stage.name, done.verdict, done.found, round(done.seconds, 2))
            else:
                outcome = Outcome(stage.name, *why, 0.0)
            outcomes.append(outcome)
            sink.write(LOG, json.dumps(asdict(outcome)).encode() + b"\n")
            print(
                f"{stage.name}: {outcome.verdict} ({outcome.found}, {outcome.seconds:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
            if why is None and outcome.verdict != "passed":
                if stage.judges is not None:
                    good.discard(stage.judges)
                lost = not self._answers(sink)
        return outcomes

    def _why_not(self, stage: Stage, good: set[str], left: float | None, lost: bool) -> tuple[str, str] | None:
        if lost:
            return "skipped", "the card does not answer any more"
        program = self._command(stage, good)[0] if stage.needs is None else stage.needs
        if shutil.which(program) is None:
            return "left out", f"{program} is not there"
        is_check = stage.name.startswith("check ")
        if stage.paths and not set(stage.paths) & good and not is_check:
            return "skipped", f"the checks of {', '.join(stage.paths)} failed"
        if left is not None and left < min(LEAST_SECONDS, stage.limit):
            return "skipped", "the deadline has come"
        return None

    def _command(self, stage: Stage, good: set[str]) -> tuple[str, ...]:
        words = {**self.words, "out": str(self.out), "paths": ",".join(p for p in stage.paths if p in good)}
        command = []
        for part in stage.command:
            for name, value in words.items():
                part = part.replace("{" + name + "}", value)
            command.append(part)
        return tuple(command)

    def _answers(self, sink: Sink) -> bool:
        """Twice, a second apart: a card that has just lost a context may be busy."""
        for attempt in range(2):
            if attempt:
                time.sleep(1)
            if run_stage(self.probe, PROBE_SECONDS, sink, LOG, {}).verdict == "passed":
                return True
        return False


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line a stage that did not pass, and the counts."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
    lines = [f"{o.verdict}: {o.stage} ({o.found})" for o in outcomes if o.verdict != "passed"]
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))])
