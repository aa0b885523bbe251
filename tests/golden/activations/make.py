"""Activations in int8 as their origins make them, and the logits of tiny models that run on them: compressed-tensors (a scale a
token, or one for all tokens, with and without zero points) and LLM.int8 of bitsandbytes.

pip install compressed-tensors==0.20.0 bitsandbytes==0.50.0 transformers==5.24.0; python tests/golden/activations/make.py
"""

from __future__ import annotations

import importlib.metadata
import json

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from safetensors.torch import save_file
from tiny import MODELS, tiny, watched
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
WEIGHTS = {"strategy": "channel", "num_bits": 8, "type": "int"}
KINDS = {
    "w8a8": ("int-quantized", WEIGHTS | {"symmetric": True}, TOKEN | {"symmetric": True}),
    "w8a8_zero": ("int-quantized", WEIGHTS | {"symmetric": False}, TOKEN | {"symmetric": False}),
    "w8a8_static": ("int-quantized", WEIGHTS | {"symmetric": True}, TENSOR | {"symmetric": True}),
    "w4a8_static_zero": (
        "pack-quantized",
        {"strategy": "group", "group_size": 32, "num_bits": 4, "type": "int", "symmetric": True},
        TENSOR | {"symmetric": False},
    ),
    "w4a8": (
        "pack-quantized",
        {"strategy": "group", "group_size": 32, "num_bits": 4, "type": "int", "symmetric": True},
        TOKEN | {"symmetric": True},
    ),
}


def store(name: str, given: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> None:
    tools = ("compressed-tensors", "bitsandbytes", "transformers", "torch")
    versions = ", ".join(f"{tool} {importlib.metadata.version(tool)}" for tool in tools)
    tensors = given | {f"expected.{key}": tensor for key, tensor in made.items()}
    held = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    save_file(held, MODELS / f"{name}.safetensors", {"made_by": versions})


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Noise of all sizes, ties, one sign alone, zeros, the smallest numbers, outliers."""
    g = torch.Generator().manual_seed(5)
    noise = torch.randn(6, 96, generator=g) * torch.tensor([1, 0.01, 5, 1, 1, 1])[:, None]
    noise[3] = noise[3].abs()
    noise[4] = -noise[4].abs()
    noise[5, ::7] *= 9
    noise[2, 24:] /= 5
    ties = (torch.arange(96.0) % 12) - 5.5
    ties[0] = -127.5
    edge = torch.zeros(2, 96)
    edge[1, 1::2] = torch.finfo(dtype).tiny * torch.arange(48) / 8
    near = torch.full((1, 96), 1.0)
    near[0, :4] = torch.tensor([5.99, 5.998, 5.9985, -6.0])
    return torch.cat([noise, ties[None], edge, near, undecided()]).to(dtype)


def undecided() -> torch.Tensor:
    """Rows of fp16 numbers whose code depends on how 127 / max is computed: 127 times the reciprocal, or one quotient."""
    every = torch.arange(1, 6 * 256).float() / 256  # below 6, exact in bf16 up to 8 bits
    every = every[every == every.bfloat16().float()]
    found = []
    for most in every.flip(0):
        x = every[every < most]
        one, other = x * (most.reciprocal() * 127), x * (torch.full_like(most, 127) / most)
        apart = x[one.round() != other.round()]
        if len(apart):
            row = torch.zeros(96)
            row[29], row[30 : 30 + len(apart[:4])] = most, apart[:4]  # columns that no other row marks
            found.append(row)
    return torch.stack(found[:4])


def of_rows() -> None:
    tensors, made = {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name, x = str(dtype).removeprefix("torch."), rows(dtype)
        tensors[f"{name}.x"] = x
        for symmetric in (True, False):
            args = QuantizationArgs(**TOKEN, symmetric=symmetric)
            # [1, M, K]: of two dimensions it would make one scale
            scale, zero = compute_dynamic_scales_and_zp(x[None], args, nn.Module())
            codes, scale, zero = quantize(x[None], scale, zero, args, dtype=torch.int8)[0], scale[0], zero[0]
            kind = f"{name}.{'wide' if symmetric else 'zero'}"
            made |= {f"{kind}.codes": codes, f"{kind}.scale": scale, f"{kind}.zero": zero.to(torch.int8)}
        made |= of_rows_static(name, x)
        codes, most, columns = int8_vectorwise_quant(x.half(), threshold=6.0)
        made |= {f"{name}.outliers.codes": codes, f"{name}.outliers.most": most, f"{name}.outliers.columns": columns}
    store("rows", tensors, made)


def of_rows_static(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {}
    for symmetric in (True, False):
        args = QuantizationArgs(**TENSOR, symmetric=symmetric)
        scale, zero = calculate_qparams(x.new_full((1,), -1.75), x.new_full((1,), 2.5), args)
        codes = quantize(x, scale, zero, args, dtype=torch.int8)
        kind = f"{name}.static{'' if symmetric else '_zero'}"
        made |= {f"{kind}.codes": codes, f"{kind}.scale": scale, f"{kind}.zero": zero.to(torch.int8)}
    return made


def compressed(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    body, weights, inputs = KINDS[name]
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=QuantizationArgs(**inputs)
    )
    model, tensors = tiny(), {}
    if not scheme.input_activations.dynamic:
        tensors |= of_inputs(model, ids, scheme.input_activations)
    for full, tensor in model.state_dict().items():
        module = full.removesuffix(".weight")
        if not full.endswith("_proj.weight"):
            tensors[full] = tensor
            continue
        groups = tensor.unflatten(-1, (-1, weights.get("group_size") or tensor.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        state = {"weight": tensor, "weight_scale": scale}
        if not weights["symmetric"]:
            state["weight_zero_point"] = zero
        stored = BaseCompressor.get_value_from_registry(body).compress(state, scheme)
        tensors |= {f"{module}.{key}": value for key, value in stored.items()}
    out = MODELS / name
    model.config.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["architectures"], config["dtype"] = ["LlamaForCausalLM"], "float32"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": body, "quantization_status": "compressed", "version": "0.20.0",
        "ignore": ["lm_head"], "config_groups": {"group_0": json.loads(scheme.model_dump_json()) | {"format": body}},
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return watched(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), ids)


def of_inputs(model: nn.Module, ids: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """What a min-max observer makes of the inputs of each layer, a bit narrower, so that some are cut."""
    tensors = {}
    for full, x in watched(model, ids).items():
        module, _, what = full.rpartition(".")
        if what == "x":
            scale, zero = calculate_qparams(0.9 * x.min().reshape(1), 0.9 * x.max().reshape(1), args)
            tensors[f"{module}.input_scale"] = scale
            if not args.symmetric:
                tensors[f"{module}.input_zero_point"] = zero.to(torch.int8)
    return tensors


def outliers(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    plain, out = MODELS / "plain", MODELS / "llm_int8"
    tiny().save_pretrained(plain)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(out)
    for path in plain.iterdir():
        path.unlink()
    plain.rmdir()
    (out / "generation_config.json").unlink()
    return watched(model, ids)


@torch.no_grad()
def main() -> None:
    of_rows()
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    of_models = {name: compressed(name, ids) for name in KINDS} | {"llm_int8": outliers(ids)}
    found = {f"{name}.{key}": tensor for name, tensors in of_models.items() for key, tensor in tensors.items()}
    store("logits", {"ids": ids}, found)


if __name__ == "__main__":
    main()
