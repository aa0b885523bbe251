"""kt-kernel's experts on the CPU (ktransformers): its RAWINT4 block, which reads 4-bit codes in groups of 32 as
compressed-tensors packs them, with scales in bfloat16; each scale of a larger group stands several times.

    pip install --no-deps kt-kernel==0.7.2; pip install gguf

It pins torch 2.9.1 and takes pointers alone, so that it runs beside another torch. Its threads are its own and wait by spinning,
so that wall time is the only clock: that of its queue without end, from when it is made, and workers for 50 ms after each call,
each bound to a core. With as many workers as cores the queue's thread takes its half of a core from a worker that the others
wait for. It is therefore to have a core of its own, and the whole a process of its own (`method.apart`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qkernels.tensor import QuantTensor

GROUP: Final = 32  # the only one of its AVX-512 kernel: of 128, as compressed-tensors has them, it makes NaN

WORKER: Final = "numa_"  # its workers' names begin so; the queue's thread has none


def available() -> str | None:
    """Why it cannot be asked here; None where it can."""
    return None if find_spec("kt_kernel") is not None else "kt-kernel is not installed"


def _threads() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}


def _set_aside(new: set[int], workers: int) -> None:
    """The queue's thread to the cores that no worker is bound to (worker i is, to core i), where there are any."""
    spare = os.sched_getaffinity(0) - set(range(workers))
    for thread in new:
        if spare and not Path(f"/proc/self/task/{thread}/comm").read_text().startswith(WORKER):
            os.sched_setaffinity(thread, spare)


class Block:
    """gate, up and down of all experts.

    Args:
        weights: (gate and up `[2 I, H]`, down `[H, I]`) of each expert, symmetric codes of 4 bits.
        k: experts of a token.
        threads, tokens: at most.
    """

    def __init__(self, weights: Sequence[tuple[QuantTensor, QuantTensor]], k: int, threads: int, tokens: int) -> None:
        kt: Any = import_module("kt_kernel").kt_kernel_ext
        down = weights[0][1]
        E, hidden, width, self.k = len(weights), down.N, down.K, k
        pool = kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        before = _threads()
        self.cpu = kt.CPUInfer(pool)
        _set_aside(_threads() - before, threads)
        repeated = down.K // down.scales.shape[1] // GROUP
        made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # experts may be the same object

        def held(weight: QuantTensor, part: int) -> tuple[Tensor, Tensor]:
            if (id(weight), part) not in made:
                rows = slice(None) if part < 0 else slice(part * width, (part + 1) * width)
                codes, scales = (
                    weight.codes[rows],
                    weight.scales[rows].bfloat16().repeat_interleave(repeated, 1).contiguous(),
                )
                made[id(weight), part] = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous(), scales
            return made[id(weight), part]

        parts = {
            "gate": [held(gate_up, 0) for gate_up, _ in weights],
            "up": [held(gate_up, 1) for gate_up, _ in weights],
            "down": [held(down, -1) for _, down in weights],
        }
        on_gpu = torch.zeros(E, dtype=torch.bool)
        config: Any = kt.moe.MOEConfig(E, k, hidden, width, on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self.cpu.backend_, tokens
        for name, pairs in parts.items():
            setattr(config, f"{name}_projs", [[codes.data_ptr() for codes, _ in pairs]])
            setattr(config, f"{name}_scales", [[scales.data_ptr() for _, scales in pairs]])
        config.quant_config.bits, config.quant_config.zero_point = 4, False
        config.quant_config.group_size = GROUP
        self.moe = kt.moe.AMXInt4_KGroup_MOE(config)
        order = torch.arange(E)
        self.cpu.submit(self.moe.load_weights_task(order.data_ptr()))
        self.cpu.sync()
        self.held = parts, on_gpu, order, config

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y, count = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        x, ids, routing = x.contiguous(), ids.contiguous(), weights.float().contiguous()
        pointers = (tensor.data_ptr() for tensor in (ids, routing, x, y))
        self.cpu.submit(self.moe.forward_task(count.data_ptr(), self.k, *pointers, False))
        self.cpu.sync()
        return y
