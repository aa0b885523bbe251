"""Ours, started as the other tools are, so that seconds mean the same."""

from __future__ import annotations

from typing import Any

from job import Job, read_job

from qkernels import quantize
from qkernels.quantizers import AWQ, GPTQ, HQQ, RTN, Options


def method_of(job: Job) -> Options:
    if job.method == "hqq":
        return HQQ(job.bits, job.group_size)
    options: dict[str, Any] = {"bits": job.bits, "group_size": job.group_size, "symmetric": job.symmetric}
    if job.method in ("rtn", "awq"):
        return RTN(**options) if job.method == "rtn" else AWQ(**options)
    options |= {"scales": "awq"} if job.method.startswith("awq") else {}
    options |= {"aim": "model"} if job.method.endswith("+model") else {}
    return GPTQ(**options, act_order=job.order)  # type: ignore[arg-type]


if __name__ == "__main__":
    job = read_job()
    method = method_of(job)
    windows = None if method.needs == "weight" else job.windows
    quantize(job.model, method, windows, job.out, exclude=job.left_out(), seq_len=job.windows.shape[1], progress=False)
