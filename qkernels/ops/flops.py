"""What torch's `FlopCounterMode` counts for the matrix products: 2 M N K each, as for a float layer.

torch.utils.flop_counter imports Triton, which takes longer than importing this package may, so formulas are handed over when
somebody else imports it, and only then.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_waiting: list[str] = []


def count_flops(op: str) -> None:
    """Have `torch.ops.qkernels.<op>`, a product of x `[M, K]` with a result `[M, N]`, counted."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], [op])
    else:
        _waiting.append(op)


def _flops_of_product(x_shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * out_shape[1]


def _register(counter: ModuleType, ops: Sequence[str]) -> None:
    for op in ops:
        counter.register_flop_formula(getattr(torch.ops.qkernels, op))(_flops_of_product)


class _Handover(MetaPathFinder, Loader):
    """Loads torch.utils.flop_counter as Python would have, then registers what waits; once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module, _waiting)


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Handover())
