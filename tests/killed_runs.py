"""Run as a program by `test_resume`: `quantize`, killed at several points, then resumed; prints JSON.

Every run is a fork of this process, which imports once and computes with one thread. Where a run dies is said in what can be
seen of it from outside (the file system through Python's audit events, how many layers are finished) and in methods of public
classes, so that no test depends on which module calls what.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qkernels import AWQ, GPTQ, RTN
from qkernels.checkpoint import CheckpointWriter
from qkernels.quantizers import Options
from qkernels.storage import ShardWriter
from tests.tiny_models import loud_model, run

METHODS = {"gptq": GPTQ(4, 16, act_order="group"), "awq": AWQ(4, 16, grid=2), "rtn": RTN(4, 16)}
FINISHED = "before the work directory goes"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.qkernels-work")


def finished_layers(out: Path) -> int:
    return len(list(work_of(out).glob("unit-?????")))


Kill = Callable[[Options, Path], None]  # arms this process, for a run with a method into a directory


def when_layers_are_finished(layers: int) -> Kill:
    """At the first matrix that is quantized after so many decoder layers."""

    def arm(method: Options, out: Path) -> None:
        original = type(method).for_inputs

        def for_inputs(*args: Any, **kwargs: Any) -> Any:
            if finished_layers(out) == layers:
                die()
            return original(*args, **kwargs)

        type(method).for_inputs = for_inputs

    return arm


def at_call(owner: type, name: str, call: int) -> Kill:
    """Before the method of a class is called for the `call`-th time."""

    def arm(method: Options, out: Path) -> None:
        original, left = getattr(owner, name), [call]

        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                die()
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    return arm


def at_event(event: str, concerns: Callable[[Path, Path], bool], time: int = 1, after: bool = False) -> Kill:
    """Before what an audit event announces, its `time`-th time, or after it: before the event that comes next.

    Args:
        concerns: of the path that is the event's last one (what a file is renamed to, which tree is removed), and the target.
    """

    def arm(method: Options, out: Path) -> None:
        left = [time]

        def hook(name: str, args: tuple[Any, ...]) -> None:
            if name == "os.kill":  # announces itself
                return
            if left[0] == 0:  # what comes after
                die()
            if name == event and concerns(Path(args[1] if name == "os.rename" else args[0]), out):
                left[0] -= 1
                if left[0] == 0 and not after:
                    die()

        sys.addaudithook(hook)

    return arm


def is_unit(path: Path, out: Path) -> bool:
    return path.parent == work_of(out) and path.name.startswith("unit-")


POINTS: dict[str, Kill] = {
    "in the first layer": when_layers_are_finished(0),
    "in the third layer": when_layers_are_finished(2),
    "while a unit is written": at_call(ShardWriter, "add", 41),
    "before a unit is renamed": at_event("os.rename", is_unit, 2),
    "after a unit is renamed": at_event("os.rename", is_unit, 2, after=True),
    "while units are joined": at_call(CheckpointWriter, "add_quantized", 40),
    "before the result is renamed": at_event("os.rename", lambda path, out: path == out),
    "before old activations go": at_event("shutil.rmtree", lambda path, out: is_unit(path.parent, out), 2),
    FINISHED: at_event("shutil.rmtree", lambda path, out: path == work_of(out)),
}
FOR_RTN = {
    "while a unit is written",
    "before a unit is renamed",
    "after a unit is renamed",
    "before the result is renamed",
}


def forked(source: Path, out: Path, method: str, point: str | None, resume: bool) -> str:
    """Quantize in a fork; how it ended: "done", "killed", or the message of the error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if point is not None:
                POINTS[point](METHODS[method], out)
            run(source, METHODS[method], save_to=out, resume=resume)
            message = "done"
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writing, message.encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else said


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of the files that must not depend on how often a run was interrupted (reports hold times)."""
    seen = directory.glob("[!.]*")
    return {path.name: path.read_bytes() for path in seen if not path.name.startswith("qkernels_report")}


def main(root: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    source = root / "source"
    loud_model(num_hidden_layers=4).save_pretrained(source)
    results = []
    for method in METHODS:
        expected = root / f"{method}-whole"
        assert forked(source, expected, method, None, False) == "done"
        for index, point in enumerate(POINTS):
            if method == "rtn" and point not in FOR_RTN:
                continue
            out = root / f"{method}-{index}"
            killed = forked(source, out, method, point, False)
            units = finished_layers(out)
            plainly = forked(source, out, method, None, False) if units else None
            resumed = forked(source, out, method, None, True)
            results.append(
                {
                    "method": method,
                    "point": point,
                    "killed": killed,
                    "units": units,
                    "without resume": plainly,
                    "resumed": resumed,
                    "equal": contents(out) == contents(expected),
                    "left": sorted(path.name for path in root.glob(f".{out.name}.*")),
                }
            )
            shutil.rmtree(out)
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
