"""What the ops borrow from torch that torch does not promise."""

from __future__ import annotations

import torch

from tests.ops.helpers import arguments, integers, layer_in
from tests.strategies import random_weight


def test_autograd_can_be_left_aside() -> None:
    """`ops.call` enters `torch._C._AutoDispatchBelowAutograd`, which saves 4 us a call. torch 2.13 has it; one without it fails
    here, by name, and needs another way past autograd (or none: the result is the same)."""
    assert hasattr(torch._C, "_AutoDispatchBelowAutograd"), f"torch {torch.__version__} has no such guard"
    weight, x = random_weight("w4a16_g32", 40, 96, exact=True), integers(3, 96)
    direct = torch.ops.qkernels.gemm_reference(*arguments(weight, x, layout="reference"))
    layer = layer_in("reference", weight, dtype=torch.float32)
    assert torch.equal(layer(x), direct)
    assert layer(x.requires_grad_()).requires_grad  # a gradient that is wanted is recorded
