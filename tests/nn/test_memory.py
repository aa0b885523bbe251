"""What is resident after a model was made small is what the report says, with several threads: each has a heap of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qkernels.memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
MIB = 2**20

# Layers of 2 MB in 16 bits: their floats, and what packing makes of them meanwhile, are below the 32 MB of malloc's heaps.
CHILD = """
import ctypes, gc, json, resource, sys, torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from qkernels import RTN, load, quantize, replace_linear
from qkernels.nn import model_bytes

torch.set_num_threads(2)

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def measured(make):
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    model, says = make()
    return {"says": says, "resident": resident() - before}

def stack(layers):
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(layers)))

def replaced(layers=24):
    model = stack(layers)
    return model, replace_linear(model, "w8a16_channel", progress=False).bytes_after

def in_memory(layers=16):
    model = stack(layers)
    quantize(model, RTN(8, "channel"), progress=False)
    return model, model_bytes(model)

def loaded():
    model = load(sys.argv[1])
    return model, model_bytes(model)

config = LlamaConfig(
    vocab_size=256, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)
LlamaForCausalLM(config).bfloat16().save_pretrained(sys.argv[1])
load(sys.argv[1])(torch.zeros(1, 4, dtype=torch.int64))
replaced(2), in_memory(2)
gc.collect()
print(json.dumps({f.__name__: measured(f) for f in (replaced, in_memory, loaded)}))
"""


def run(directory: Path, *before: str) -> dict[str, dict[str, int]]:
    code = "\n".join([*before, CHILD])
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_resident_memory_is_what_the_report_says(tmp_path: Path) -> None:
    for journey, found in run(tmp_path / "m").items():
        assert found["says"] > 15 * MIB, journey
        assert found["resident"] < 1.15 * found["says"] + 8 * MIB, (journey, found)


@pytest.mark.large
def test_without_giving_back_it_is_not(tmp_path: Path) -> None:
    """The measuring sees the fault."""
    keep = "import qkernels.memory; qkernels.memory._malloc_trim = lambda: None"
    assert any(found["resident"] > 1.5 * found["says"] + 8 * MIB for found in run(tmp_path / "m", keep).values())


def test_a_c_library_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qkernels.memory, "_malloc_trim", lambda: None)
    qkernels.memory.give_back()


def test_memory_is_given_back_when_much_has_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(qkernels.memory, "give_back", lambda: given.append(1))
    with qkernels.memory.GivingBack() as memory:
        for _ in range(4):
            memory.freed(qkernels.memory.GIVE_BACK_EVERY // 2)
        assert len(given) == 2
    assert len(given) == 3
