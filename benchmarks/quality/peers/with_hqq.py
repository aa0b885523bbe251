"""HQQ, which needs no calibration. Tried with 0.2.8.post1."""

from __future__ import annotations

import json
import shutil

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from job import LEFT_OUT, read_job
from safetensors.torch import save_file

job = read_job()
model = job.float_model()
config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)
tensors = {}
for name, module in list(model.named_modules()):
    if isinstance(module, torch.nn.Linear) and name not in LEFT_OUT:
        layer = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
        state = layer.state_dict()
        tensors |= {f"{name}.{key}": torch.as_tensor(value).contiguous().clone() for key, value in state.items()}
quantized = {name.rpartition(".")[0] for name in tensors}
for name, tensor in model.state_dict().items():
    if name.rpartition(".")[0] not in quantized and name != "lm_head.weight":  # which is tied here
        tensors[name] = tensor.contiguous()
job.out.mkdir(parents=True)
save_file(tensors, job.out / "model.safetensors")
own = {"quant_method": "hqq", "quant_config": {"weight_quant_params": config["weight_quant_params"]}}
described = json.loads((job.model / "config.json").read_text()) | {"quantization_config": own}
(job.out / "config.json").write_text(json.dumps(described))
for path in job.model.glob("tokenizer*"):
    shutil.copy(path, job.out)
