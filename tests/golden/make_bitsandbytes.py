"""Layers quantized by bitsandbytes on the CPU: NF4 and FP4, with and without double quantization, and int8.

pip install bitsandbytes==0.50.2; python tests/golden/make_bitsandbytes.py
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from store import store

N, K = 24, 128
TOOLS = ("bitsandbytes",)


def weight(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def four_bit(kind: str, nested: bool, dtype: torch.dtype, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    layer = bnb.nn.Linear4bit(K, N, bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(
        weight(seed, dtype), requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    layer.to("cpu")
    return dict(layer.state_dict()), dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    weights = {}
    cases = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]
    for i, (kind, nested) in enumerate(cases):
        name = f"layers.{i}.{kind}{'_nested' if nested else ''}"
        state, weights[name] = four_bit(kind, nested, torch.bfloat16 if i % 2 else torch.float16, i)
        tensors |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    store("bitsandbytes-4bit", tensors, weights, {"quant_method": "bitsandbytes", "load_in_4bit": True}, TOOLS)

    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    codes, largest, _ = bnb.functional.int8_vectorwise_quant(weight(9, torch.float16))
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=largest)
    state = {f"layers.0.int8.{key}": tensor for key, tensor in layer.state_dict().items()}
    back = {"layers.0.int8": int8_vectorwise_dequant(codes, largest)}
    store("bitsandbytes-int8", state, back, {"quant_method": "bitsandbytes", "load_in_8bit": True}, TOOLS)


if __name__ == "__main__":
    main()
