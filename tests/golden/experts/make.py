"""Experts of a mixture compressed by compressed-tensors itself, one by one and stacked, with the weights that it decompresses.

pip install compressed-tensors==0.20.0; PYTHONPATH=tests/golden python tests/golden/experts/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from make_compressed_floats import bounds
from safetensors.torch import save_file

EXPERTS, HIDDEN = 3, 32
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
FLOAT = {"type": "float", "symmetric": True}
# kind: (format, arguments, whether stacked, width of an expert)
KINDS = {
    "int4": ("pack-quantized", INT4 | {"symmetric": True}, False, 32),
    "int4_stacked": ("pack-quantized", INT4 | {"symmetric": True}, True, 32),
    "int4_asym_stacked": ("pack-quantized", INT4 | {"symmetric": False}, True, 32),
    "fp8_stacked": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "channel"}, True, 32),
    # gate's rows are no whole number of blocks
    "fp8_block": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "block", "block_structure": [16, 16]}, False, 24),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT | {"num_bits": 4, "strategy": "group", "group_size": 32}, False, 32),
    "nvfp4": ("nvfp4-pack-quantized", FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}, False, 32),
}  # fmt: skip


def compressed(body: str, args: QuantizationArgs, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a weight `[..., N, K]`, and what comes back."""
    state = {"weight": weight}
    outer = None
    if body.startswith("nv"):
        outer = generate_gparam(weight.amin(), weight.amax())
        state["weight_global_scale"] = outer
    low, high = bounds(weight, args)
    scale, zero = calculate_qparams(low, high, args, global_scale=outer)
    state["weight_scale"] = scale if body.startswith(("mx", "nv")) else scale.to(torch.bfloat16)
    if args.type == "int":
        state["weight_zero_point"] = zero
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(body)
    stored = compressor.compress(dict(state), scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


def main() -> None:
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    groups = {}
    for seed, (kind, (body, fields, stacked, width)) in enumerate(KINDS.items()):
        extra = {}
        if body.startswith("mx"):
            extra = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
        elif body.startswith("nv"):
            extra = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        args = QuantizationArgs(**fields, **extra)
        generator = torch.Generator().manual_seed(seed)
        for projection, shape in (("gate_up_proj", (2 * width, HIDDEN)), ("down_proj", (HIDDEN, width))):
            weight = torch.randn(EXPERTS, *shape, generator=generator).to(torch.bfloat16)
            weight *= torch.arange(1, EXPERTS + 1)[:, None, None]  # so that no expert is taken for another
            if stacked:
                stored, weights[f"{kind}.{projection}"] = compressed(body, args, weight)
                for key, value in stored.items():  # as the parameters of such a file are called
                    leaf = f"{projection}{key.removeprefix('weight')}"
                    tensors[f"{kind}.experts.{leaf}"] = value
                continue
            back = []
            for expert in range(EXPERTS):
                leaves = {"down_proj": weight[expert]}
                if projection == "gate_up_proj":
                    leaves = dict(zip(("gate_proj", "up_proj"), weight[expert].chunk(2)))
                for leaf, one in leaves.items():
                    stored, restored = compressed(body, args, one.contiguous())
                    back.append(restored)
                    tensors |= {f"{kind}.experts.{expert}.{leaf}.{key}": value for key, value in stored.items()}
            weights[f"{kind}.{projection}"] = torch.cat(back).view(EXPERTS, *shape)
        groups[kind] = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json()), "format": body}
    versions = f"compressed-tensors {compressed_tensors.__version__}, torch {torch.__version__}"
    header = {"made_by": versions, "version": compressed_tensors.__version__, "config_groups": json.dumps(groups)}
    held = tensors | {f"expected.{name}": weight for name, weight in weights.items()}
    path = Path(__file__).parent / "experts.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in held.items()}, path, header)


if __name__ == "__main__":
    main()
