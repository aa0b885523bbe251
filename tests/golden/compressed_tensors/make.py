"""Small layers compressed by compressed-tensors itself, with the weight that it decompresses them to.

pip install compressed-tensors==0.20.0; python tests/golden/compressed_tensors/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

HERE = Path(__file__).parent
N, K, GROUP = 24, 96, 32


def layer(bits: int, symmetric: bool, strategy: str, seed: int, dtype: torch.dtype):
    """The tensors that one layer is stored as, the weight that comes back, and the arguments."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=GROUP if strategy == "group" else None
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    blocks = weight.reshape(N, -1, GROUP if strategy == "group" else K)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if strategy == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"], args


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    groups = {}
    cases = [(b, s, "group") for b in (2, 3, 4, 5, 6, 7, 8) for s in (True, False)]
    cases += [(4, True, "channel"), (3, False, "channel"), (8, True, "tensor"), (4, True, "tensor")]
    for i, (bits, symmetric, strategy) in enumerate(cases):
        name = f"layers.{i}.w{bits}_{strategy}{'' if symmetric else '_asym'}"
        dtype = torch.bfloat16 if i % 2 else torch.float16
        stored, back, args = layer(bits, symmetric, strategy, i, dtype)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in stored.items()}
        tensors[f"expected.{name}"] = back.contiguous()
        weights = json.loads(args.model_dump_json())
        groups[f"group_{i}"] = {"targets": [name], "weights": weights, "format": "pack-quantized"}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"],
        "quantization_status": QuantizationStatus.COMPRESSED.value, "version": compressed_tensors.__version__,
    }  # fmt: skip
    save_file(tensors, HERE / "layers.safetensors")
    (HERE / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
