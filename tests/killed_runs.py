"""Run as a program by `test_resume`: `quantize`, killed at several points, then resumed; prints JSON.

Every run is a fork of this process, which imports once and computes with one thread.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import qkernels.calibrate
import qkernels.layerwise.work
from qkernels import AWQ, GPTQ, RTN
from qkernels.checkpoint import CheckpointWriter
from qkernels.storage import ShardWriter, atomic
from tests.test_calibrate import loud_model, run

METHODS = {"gptq": GPTQ(4, 16, act_order="group"), "awq": AWQ(4, 16, grid=2), "rtn": RTN(4, 16)}
FINISHED = "before the work directory goes"
# what is called when the kill comes, and which call of it; "after" means when it returns
POINTS: dict[str, tuple[Any, str, int, str]] = {
    "in the first layer": (qkernels.calibrate, "quantize_layer", 1, "before"),
    "in the third layer": (qkernels.calibrate, "quantize_layer", 3, "before"),
    "while a unit is written": (ShardWriter, "add", 40, "after"),
    "before a unit is renamed": (atomic, "_move_into_place", 2, "before"),
    "after a unit is renamed": (atomic, "_move_into_place", 2, "after"),
    "while units are joined": (CheckpointWriter, "add_quantized", 40, "before"),
    "before the result is renamed": (qkernels.calibrate, "copy_side_files", 1, "after"),
    "before old activations go": (qkernels.layerwise.work.shutil, "rmtree", 2, "before"),
    FINISHED: (qkernels.layerwise.work.shutil, "rmtree", 4, "before"),
}
FOR_RTN = {
    "while a unit is written",
    "before a unit is renamed",
    "after a unit is renamed",
    "before the result is renamed",
}


def kill_at(owner: Any, name: str, call: int, when: str) -> None:
    """This process dies at a call of a function."""
    original = getattr(owner, name)
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def forked(source: Path, out: Path, method: str, point: str | None, resume: bool) -> str:
    """Quantize in a fork; how it ended: "done", "killed", or the message of the error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if point is not None:
                kill_at(*POINTS[point])
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
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith("qkernels_report")}


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
            work = root / f".{out.name}.qkernels-work"
            units = len(list(work.glob("unit-?????")))
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
