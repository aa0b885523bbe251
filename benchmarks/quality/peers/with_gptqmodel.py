"""GPTQModel's GPTQ and AWQ. Tried with 7.7.0."""

from __future__ import annotations

from gptqmodel import GPTQModel, QuantizeConfig
from job import read_job

job = read_job()
fields = {
    "bits": job.bits,
    "group_size": job.group_size,
    "sym": job.symmetric,
    "offload_to_disk": False,
    "device": "cpu",
}
if job.method == "awq":
    config = QuantizeConfig(**fields, method="awq", format="gemm")
else:  # "static" is GPTQModel's group-aware order (GAR), its default, which leaves groups as they are
    aware = job.order == "static"
    config = QuantizeConfig(**fields, desc_act=job.order == "group", act_group_aware=aware, format="gptq_v2")
model = GPTQModel.load(str(job.model), config)
model.quantize([{key: value[0].tolist() for key, value in example.items()} for example in job.examples()], batch_size=8)
model.save(str(job.out))
