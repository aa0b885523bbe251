"""The most memory that `quantize` has for itself, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# All imports, and a first matrix product, come before the first measurement. WORK is a statement that may use `source`, `out`,
# `ids` and what is imported; what it calls `found` is handed back.
CHILD = """
import json, sys, threading, torch, transformers
from qkernels import GPTQ, RTN, load, quantize
from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def watch():
    while not done.wait(0.001):
        peaks.append(status("RssAnon"))

source, out, windows, seq_len = sys.argv[1:]
ids = torch.randint(0, 256, (int(windows), int(seq_len)), generator=torch.Generator().manual_seed(0))
torch.linalg.cholesky(torch.eye(64) @ torch.eye(64))
found, done, base = None, threading.Event(), status("RssAnon")
peaks = [base]
watcher = threading.Thread(target=watch)
watcher.start()
WORK
done.set()
watcher.join()
print(json.dumps({"peak": max(peaks) - base, "process": status("VmHWM"), "samples": len(peaks), "found": found}))
"""


def measured(
    work: str, source: Path, out: Path, windows: int, seq_len: int, threads: str | None = None
) -> dict[str, int]:
    """`peak`: bytes beyond what the process had before `work`; `process`: the most that it had, all told; `found`: what `work`
    found."""
    # With a fixed threshold every tensor is a mapping of its own that goes back when it is freed: what is counted is what lives.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"} | ({"OMP_NUM_THREADS": threads} if threads else {})
    command = [sys.executable, "-c", CHILD.replace("WORK", work), str(source), str(out), str(windows), str(seq_len)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found["samples"] > 20
    return found
