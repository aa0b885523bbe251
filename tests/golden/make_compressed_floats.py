"""Small layers of floating-point weights compressed by compressed-tensors itself, with the weights that it decompresses them to.

pip install compressed-tensors==0.20.0; python tests/golden/make_compressed_floats.py
"""

from __future__ import annotations

import json

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from store import store

N, K = 40, 96
KINDS = {
    "tensor": ("float-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "channel": ("float-quantized", {"num_bits": 8, "strategy": "channel"}),
    "naive": ("naive-quantized", {"num_bits": 8, "strategy": "channel"}),
    "block": ("float-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [16, 16]}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
}


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    groups = {}
    for seed, (name, (body, fields)) in enumerate(KINDS.items()):
        extra = {}
        if body.startswith("mx"):
            extra = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
        elif body.startswith("nv"):
            extra = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        args = QuantizationArgs(type="float", symmetric=True, **fields, **extra)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        rows = 37 if name == "block" else N
        weight = torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        state = {"weight": weight}
        outer = None
        if body.startswith("nv"):
            outer = generate_gparam(weight.amin(), weight.amax())
            state["weight_global_scale"] = outer
        low, high = bounds(weight, args)
        scale, _ = calculate_qparams(low, high, args, global_scale=outer)
        state["weight_scale"] = scale if body.startswith(("mx", "nv")) else scale.to(torch.bfloat16)
        compressor = BaseCompressor.get_value_from_registry(body)
        stored = compressor.compress(dict(state), scheme)
        weights[name] = compressor.decompress(dict(stored), scheme)["weight"]
        tensors |= {f"{name}.{key}": value for key, value in stored.items()}
        groups[f"group_{seed}"] = {"targets": [name], "weights": json.loads(args.model_dump_json()), "format": body}
        print(name, {k: (v.dtype, tuple(v.shape)) for k, v in stored.items()}, weights[name].dtype)
    config = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ["lm_head"],
        "quantization_status": "compressed", "version": compressed_tensors.__version__,
    }  # fmt: skip
    store("compressed_floats", tensors, weights, config, ("compressed-tensors",))


def bounds(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest weight under each scale."""
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "block":
        side = args.block_structure[0]
        blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % side, 0, -weight.shape[0] % side))
        blocks = blocks.unflatten(0, (-1, side)).unflatten(-1, (-1, side))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
    return groups.amin(-1), groups.amax(-1)


if __name__ == "__main__":
    main()
