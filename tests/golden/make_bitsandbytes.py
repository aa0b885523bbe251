"""Layers quantized by bitsandbytes on the CPU: NF4 and FP4, with and without double quantization, and int8; and weights on and
beside the edges between the codes of NF4 and FP4.

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


def edges(kind: str) -> torch.Tensor:
    """fp32 `[4, 64]`: of each pair of neighbours in the table the middle, and the floats before and after it; times 1, 1/2, 2
    and 1/8, so that no product is rounded. The last entry of a block is its largest."""
    table = bnb.functional.get_4bit_type(kind, "cpu").unique()
    middles = (table[1:] + table[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, far)) for far in (-torch.inf, torch.inf)]
    values = torch.cat([middles, *beside])
    block = torch.cat([values, torch.zeros(63 - len(values)), torch.ones(1)])
    return block * torch.tensor([1, 0.5, 2, 0.125])[:, None]


def four_bit(kind: str, nested: bool, values: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = values.shape
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=values.dtype
    )
    layer.weight = bnb.nn.Params4bit(
        values.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    layer.to("cpu")
    return dict(layer.state_dict()), dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    weights, originals = {}, {}
    cases = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]
    for i, (kind, nested) in enumerate(cases):
        originals[f"layers.{i}.{kind}{'_nested' if nested else ''}"] = weight(
            i, torch.bfloat16 if i % 2 else torch.float16
        )
    originals |= {f"layers.{4 + i}.{kind}_edges": edges(kind) for i, kind in enumerate(("nf4", "fp4"))}
    for name, values in originals.items():
        kind = name.rpartition(".")[2]
        state, weights[name] = four_bit(kind[:3], kind.endswith("nested"), values)
        tensors |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    store("bitsandbytes-4bit", tensors, weights, config, TOOLS, originals=originals)

    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    codes, largest, _ = bnb.functional.int8_vectorwise_quant(weight(9, torch.float16))
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=largest)
    state = {f"layers.0.int8.{key}": tensor for key, tensor in layer.state_dict().items()}
    back = {"layers.0.int8": int8_vectorwise_dequant(codes, largest)}
    store("bitsandbytes-int8", state, back, {"quant_method": "bitsandbytes", "load_in_8bit": True}, TOOLS)


if __name__ == "__main__":
    main()
