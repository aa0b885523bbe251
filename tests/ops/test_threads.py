"""Whether a product opens a parallel region, seen by the threads that the pool has afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qkernels import extension

PROGRAM = """
import json, os
import torch
from qkernels import QuantLinear
from qkernels.quantizers import RTN

torch.set_num_threads(1)
cores = os.sched_getaffinity(0)
little, much = (QuantLinear.from_quant_tensor(RTN().quantize(torch.ones(N, 1024)), dtype=torch.float32) for N in (64, 8192))

def workers(layer, allowed, threads):
    os.sched_setaffinity(0, allowed)
    torch.set_num_threads(threads)
    layer(torch.ones(1, 1024))
    return len(os.listdir("/proc/self/task")) - before

before = len(os.listdir("/proc/self/task"))
one = {min(cores)}
print(json.dumps([workers(little, one, 3), workers(little, cores, 2), workers(much, one, 3)]))
"""


@pytest.mark.skipif(not extension.status().isas, reason=f"no compiled extension: {extension.status().error}")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, to have as many as threads")
def test_with_more_threads_than_cores_a_little_product_runs_on_the_calling_one() -> None:
    """With as many cores as threads it does not (the control), nor does a large product."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0, 1, 2]
