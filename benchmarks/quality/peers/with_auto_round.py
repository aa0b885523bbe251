"""auto-round, with its default settings (200 steps). Tried with 0.16.1."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from job import read_job
from transformers import AutoModelForCausalLM, AutoTokenizer

job = read_job()
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(job.model)
data = [row[None] for row in job.windows]
rounding = AutoRound(
    model, tokenizer, bits=job.bits, group_size=job.group_size, sym=job.symmetric, dataset=data, nsamples=len(data),
    seqlen=job.windows.shape[1], device_map="cpu", enable_torch_compile=False, amp=False,
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:  # it makes a folder of its own choice in there
    rounding.quantize_and_save(folder, format="auto_round")
    shutil.copytree(next(path.parent for path in Path(folder).rglob("config.json")), job.out)
