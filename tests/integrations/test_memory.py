"""Quantizing while loading needs about the memory of the result: measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20
LAYERS, HIDDEN, INTERMEDIATE = 8, 768, 2048

LOAD = """
import json, sys, threading, time, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # all imports before the first measurement
from qkernels import QuantLinear
from qkernels.integrations.transformers import QKernelsConfig

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.001):
        peaks.append(anonymous())

config = {"quantization_config": QKernelsConfig("w4a16_g128")} if sys.argv[2] == "quantized" else {}
done, base = threading.Event(), anonymous()
peaks = [base]
watcher = threading.Thread(target=watch)
watcher.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32 if not config else torch.bfloat16, **config)
done.set()
watcher.join()
tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
print(json.dumps({"peak": max(peaks) - base, "held": sum(tensors.values()), "samples": len(peaks)}))
"""


def measured(directory: Path, how: str) -> dict[str, int]:
    # With a fixed threshold every tensor is a mapping of its own that goes back when it is freed: what is counted is what lives.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(directory), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found["samples"] > 20
    return found


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_peak_is_near_the_quantized_size(tmp_path: Path) -> None:
    """At most the result, the largest matrix in fp32 four times (the weight, and what rounding makes) and 16 MiB for Python."""
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=256, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
            num_attention_heads=8, num_key_value_heads=8,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(tmp_path)
    weights = sum(p.nbytes for p in model.parameters())
    del model
    largest = HIDDEN * INTERMEDIATE * 4
    allowance = 4 * largest + 16 * MIB
    found = measured(tmp_path, "quantized")
    assert found["held"] < 0.3 * weights
    assert found["peak"] < found["held"] + allowance, found
    assert found["held"] + allowance < weights, "the bound must tell the quantized size from the float size"
    control = measured(tmp_path, "in fp32")  # a load that keeps the floats is seen
    assert control["peak"] > control["held"] * 0.9 > found["held"] + allowance, control
