"""Layers quantized by HQQ, axis 1: 8, 6, 5, 4, 3 and 2 bits; and one of axis 0, which is to be refused.

pip install hqq==0.2.8.post1; python tests/golden/make_hqq.py
"""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from store import store

N, K, GROUP = 20, 128, 64


def layer(bits: int, axis: int, seed: int) -> HQQLinear:
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")


def main() -> None:
    for name, cases in {"hqq": [(bits, 1) for bits in (8, 6, 5, 4, 3, 2)], "hqq-axis0": [(4, 0)]}.items():
        tensors: dict[str, torch.Tensor] = {}
        weights = {}
        for i, (bits, axis) in enumerate(cases):
            module = f"layers.{i}.w{bits}"
            quantized = layer(bits, axis, i)
            tensors |= {f"{module}.{key}": torch.as_tensor(value) for key, value in quantized.state_dict().items()}
            weights[module] = quantized.dequantize()
        store(name, tensors, weights, {"quant_method": "hqq"}, ("hqq",))


if __name__ == "__main__":
    main()
