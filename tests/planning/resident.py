"""How much memory a checkpoint takes once it is loaded, and once it has read a prompt.

`python -m tests.planning.resident TOKENS DIR …` prints both in bytes, as JSON, a line each: in a process of its own, whose memory
is nobody else's. The first line also has whatever is imported on the way.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn

from qkernels import load
from qkernels.memory import give_back


def resident() -> int:
    """Bytes of anonymous memory (files that are mapped are the system's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@torch.inference_mode()
def measure(directory: str, tokens: int) -> dict[str, int]:
    """Bytes more than before: with the model loaded, and with the cache of so many tokens beside it."""
    gc.collect()
    give_back()
    before = resident()
    model = load(directory)
    give_back()
    loaded = resident()
    output = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)
    cache = output.get("cache", output.get("past_key_values"))
    assert cache is not None
    del output
    give_back()
    return {"loaded": loaded - before, "read": resident() - before}


def held(model: nn.Module) -> int:
    """Bytes of a model's tensors, tied ones once, without what says how a layer is packed."""
    buffers = [t for name, t in model.named_buffers() if not name.endswith("_extra_state")]
    found: dict[int, torch.Tensor] = {id(t): t for t in (*model.parameters(), *buffers)}
    return sum(t.nbytes for t in found.values())


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(measure(name, int(sys.argv[1]))))
