"""Huge pages for packed weights, which a decode step reads once from end to end.

A Llama layer's weight is thousands of 4 KB pages but a dozen of 2 MB. Where Linux gives them only to those who ask
(`/sys/kernel/mm/transparent_hugepage/enabled` says madvise, as most distributions have it), torch's allocator does not: its
memory is neither aligned nor advised. Measured: docs/cpu-decode.md.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # of x86-64, and of arm64 with 4 KB pages


def begins_huge_page(t: Tensor) -> bool:
    """Whether a CPU tensor starts where a huge page can. Those of `on_huge_pages` do; torch's own, behind a header of
    malloc's, do only where THP_MEM_ALLOC_ENABLE=1 has torch align and ask by itself."""
    return t.data_ptr() % HUGE_PAGE == 0


def on_huge_pages(t: Tensor) -> Tensor:
    """A copy of `t` in private memory of its own that asks for huge pages; `t` itself where that gains nothing.

    Copied: contiguous CPU tensors of at least one huge page that do not yet begin on the boundary of one. A tail shorter than
    a huge page stays on small ones, so nothing is resident beyond the tensor's bytes. The kernel may refuse: that changes the
    speed, never the result. Shared memory is left alone, for others see it.
    """
    if t.device.type != "cpu" or t.nbytes < HUGE_PAGE or not t.is_contiguous() or t.is_shared() or begins_huge_page(t):
        return t
    placed = empty_on_huge_pages(t.shape, t.dtype)
    return placed.copy_(t) if begins_huge_page(placed) else t


def empty_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor, as `on_huge_pages` has it; torch's own where that gains nothing."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    except OSError:  # a kernel without huge pages, or no room
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)  # keeps `memory` alive
