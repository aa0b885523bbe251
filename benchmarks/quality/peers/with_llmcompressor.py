"""llm-compressor's GPTQ and AWQ. Tried with 0.14.0.1, of mixtures too: routers stay as they are."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from job import LEFT_OUT, read_job
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoTokenizer

job = read_job()
model = job.float_model()
tokenizer = AutoTokenizer.from_pretrained(job.model)
torch.Tensor.pin_memory = lambda self, *_: self  # its AWQ pins memory even where there is no accelerator to pin it for
order = {"none": None, "static": "weight"}[job.order] if job.method == "gptq" else None
weights = QuantizationArgs(
    num_bits=job.bits, symmetric=job.symmetric, strategy="group", group_size=job.group_size, actorder=order
)
ignore = [*LEFT_OUT, "re:.*mlp.gate$"]
groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
if job.method == "gptq":
    recipe = [GPTQModifier(config_groups=groups, ignore=ignore, actorder=order)]  # else it orders by itself
else:
    from llmcompressor.modifiers.transform.awq import AWQModifier

    recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)]
data = Dataset.from_list([{k: v[0].tolist() for k, v in example.items()} for example in job.examples()])
oneshot(
    model=model, dataset=data, recipe=recipe, max_seq_length=job.windows.shape[1],
    num_calibration_samples=len(data), processor=tokenizer,
)  # fmt: skip
model.save_pretrained(job.out, save_compressed=True)
tokenizer.save_pretrained(job.out)
