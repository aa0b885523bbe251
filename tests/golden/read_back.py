"""Our writers read by the loaders of the formats' origins: first `write` with qkernels, then each tool in its own environment.

python -m tests.golden.read_back write DIR
python tests/golden/read_back.py gptqmodel DIR       (GPTQModel's plain torch kernels: GPTQ v1, v2, AWQ)
python tests/golden/read_back.py autoawq DIR         (its packing_utils)
python tests/golden/read_back.py compressed-tensors DIR  (transformers with compressed-tensors, decompressed)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ORDERED = [(bits, zeros, order) for bits in (2, 3, 4, 8) for zeros in ("sym", "asym") for order in ("none", "group")]
CASES = {
    "gptq": ORDERED,
    "gptq_v2": ORDERED,
    "awq": [(4, "asym", "none"), (4, "sym", "none")],
    "compressed-tensors": [(bits, zeros, "none") for bits in (2, 3, 4, 8) for zeros in ("sym", "asym")],
}
TOLD_APART = "--"


def write(folder: Path) -> None:
    """A tiny Llama in every format and scheme, beside the weights that it means."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from qkernels import GPTQ, load, quantize
    from qkernels.nn import QuantLinear
    from tests.checkpoints import small_llama

    small_llama(intermediate_size=128, num_key_value_heads=4).to(torch.float16).save_pretrained(folder / "plain")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))  # GPTQModel wants one
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder / "plain")
    windows = torch.arange(512).view(16, 32) * 7 % 64
    for name, cases in CASES.items():
        for bits, zeros, order in cases:
            target = folder / TOLD_APART.join((name, f"{bits}bit", zeros, order))
            method = GPTQ(bits=bits, group_size=32, symmetric=zeros == "sym", act_order=order)
            quantize(
                folder / "plain", method, calibration=windows, save_to=target, format=name, seq_len=32, progress=False
            )
            layers = {n: m for n, m in load(target).named_modules() if isinstance(m, QuantLinear)}
            meant = {n: layer.quant_tensor().dequantize(torch.float16) for n, layer in layers.items()}
            save_file(meant, target.with_suffix(".meant"))


def checkpoints(folder: Path, *formats: str) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    for stored in sorted(folder.glob("*.meant")):
        if stored.name.split(TOLD_APART)[0] in formats:
            yield stored.with_suffix(""), load_file(stored)


def report(target: Path, meant: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> bool:
    wrong = [name for name, weight in meant.items() if not torch.equal(read(name).to(weight.dtype), weight)]
    print(f"{target.name}: {len(meant) - len(wrong)} of {len(meant)} weights equal", *wrong[:1])
    return not wrong


def gptqmodel(folder: Path) -> Iterator[bool]:
    from gptqmodel import BACKEND, GPTQModel

    for target, meant in checkpoints(folder, "gptq", "gptq_v2", "awq"):
        if target.name.startswith(f"gptq{TOLD_APART}") and "asym" in target.name:
            # It refuses asymmetric v1 files by the name of their writer: the bytes are tried under its own name.
            for path in (target / "config.json", target / "quantize_config.json"):
                path.write_text(re.sub(r'"qkernels:[^"]*"', '"gptqmodel:7.7.0"', path.read_text()))
        backend = BACKEND.AWQ_TORCH if target.name.startswith("awq") else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(str(target), device="cpu", backend=backend, dtype=torch.float16).model

        def read(name: str, model: torch.nn.Module = model) -> torch.Tensor:
            kernel = model.get_submodule(name)
            if hasattr(kernel, "dequantize_weight"):
                return kernel.dequantize_weight().T
            return kernel(torch.eye(kernel.in_features, dtype=torch.float16)).T

        yield report(target, meant, read)


def autoawq(folder: Path) -> Iterator[bool]:
    from awq.utils.packing_utils import dequantize_gemm

    for target, meant in checkpoints(folder, "awq"):
        t = load_file(target / "model.safetensors")
        yield report(
            target,
            meant,
            lambda n, t=t: dequantize_gemm(t[f"{n}.qweight"], t[f"{n}.qzeros"], t[f"{n}.scales"], 4, 32).T,
        )


def compressed_tensors(folder: Path) -> Iterator[bool]:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    for target, meant in checkpoints(folder, "compressed-tensors"):
        config = CompressedTensorsConfig(run_compressed=False)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float16, quantization_config=config)
        yield report(target, meant, lambda name, model=model: model.get_submodule(name).weight)


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        write(folder)
        return 0
    reader = {"gptqmodel": gptqmodel, "autoawq": autoawq, "compressed-tensors": compressed_tensors}[what]
    results = list(reader(folder))
    print(f"{what}: {sum(results)} of {len(results)} checkpoints read back to the same weights")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
