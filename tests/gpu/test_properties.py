"""What tests/gpu is made of, without a GPU: other bits are noticed, and int8 activations are among the schemes."""

from __future__ import annotations

import torch

from . import properties


def test_other_bits_are_noticed() -> None:
    x = torch.ones(4)
    assert properties.differing(lambda x: x * 2, x, 5) == 0
    calls = iter(range(100))
    assert properties.differing(lambda x: x + (next(calls) == 3), x, 5) == 1


def test_int8_activations_are_checked_with_their_own_bound() -> None:
    """On the CPU, whose kernels take them too: rounding x to int8 is no error of the kernel, and is far past 16-bit bounds."""
    made = {one.name: one for one in properties.products(64, 128, torch.device("cpu"))}
    bits = {name.split()[-1]: one.activation_bits for name, one in made.items()}
    assert bits["w8a8_channel"] == bits["w4a8_g128"] == 8
    assert bits["w4a16_g128"] is None
    none = properties.products(64, 128, torch.device("cpu"), kernels="cuda")
    assert none == []
