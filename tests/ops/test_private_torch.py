"""What the ops borrow from torch that torch does not promise."""

from __future__ import annotations

import torch

from qkernels import ops
from tests.ops.helpers import arguments, integers
from tests.strategies import random_weight


def test_autograd_can_be_left_aside() -> None:
    """`ops.call` enters `torch._C._AutoDispatchBelowAutograd`, which saves 4 us a call. torch 2.13 has it; one without it fails
    here, by name, and needs another way past autograd (or none: the result is the same)."""
    assert hasattr(torch._C, "_AutoDispatchBelowAutograd"), f"torch {torch.__version__} has no such guard"
    args = arguments(random_weight("w4a16_g32", 40, 96, exact=True), integers(3, 96), layout="reference")
    direct = torch.ops.qkernels.gemm_reference(*args)
    assert torch.equal(ops.call("gemm_reference", *args), direct)
    x = integers(3, 96).requires_grad_()
    assert ops.call("gemm_reference", x, *args[1:]).requires_grad  # a gradient that is wanted is recorded
