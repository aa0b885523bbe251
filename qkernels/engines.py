"""Which inference engine serves which checkpoint, as far as its format decides; the state of 2026."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .scheme import QuantScheme

# Modules that serving engines merge into one matrix, which needs one scheme.
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# What transformers itself needs for a format, by the beginning of its name; with `integrations.transformers.enable()` nothing.
NEEDS = {
    "awq": "needs gptqmodel and accelerate",
    "compressed-tensors": "needs compressed-tensors",
    "bitsandbytes": "needs bitsandbytes",
    "hqq": "needs hqq",
    "auto-round": "needs auto-round",
    "torchao": "needs torchao",
    "quanto": "needs optimum-quanto, whose QuantizedModelForCausalLM loads it",
    "fp8": "dequantizes it where a GPU has no FP8",
    "mxfp4": "dequantizes it where its kernels do not run",
}
# Formats that vLLM itself does not read.
NOT_IN_VLLM = {
    "quanto": "vLLM does not read quanto's files; convert it with `qkernels pack … --format compressed-tensors`",
    "gptq_p": "vLLM does not read bit planes; convert it with `qkernels pack … --format gptq_v2`",
}
PLUGIN = "vLLM with qkernels"  # beside it in one environment: docs/serving.md
VLLM_GROUPS = (16, 32, 64, 128, "channel")


@dataclass(frozen=True)
class Engine:
    """Whether an inference engine can serve the checkpoint, and what it needs or why it cannot."""

    name: str
    serves: bool
    notes: tuple[str, ...]


def engines_for(
    format_name: str | None, schemes: Mapping[str, QuantScheme], ordered: Sequence[str], floats: Collection[str]
) -> tuple[Engine, ...]:
    """Who can serve a checkpoint.

    Args:
        format_name: None where nothing is quantized: then the answer is empty.
        schemes: of its quantized modules.
        ordered: those of them whose columns are in act-order.
        floats: modules that are not quantized.
    """
    if format_name is None:
        return ()
    own = Engine("qkernels", True, ())
    plugin = _plugin(schemes, ordered)
    if format_name == "native":
        why = ("its format is our own; convert it with `qkernels pack … --format gptq`",)
        return own, Engine("transformers", False, why), Engine("vLLM", False, why), plugin
    if format_name == "gguf":
        return (
            own,
            Engine("llama.cpp", True, ()),
            Engine("transformers", True, ("needs gguf, and dequantizes it",)),
            Engine("vLLM", True, ("needs vllm-gguf-plugin, which does not read every type",)),
        )
    needs = next(
        (text for start, text in NEEDS.items() if format_name.startswith(start)), "needs optimum and gptqmodel"
    )
    limits = [NOT_IN_VLLM[format_name]] if format_name in NOT_IN_VLLM else []
    if ordered:
        limits.append(f"act-order was removed in 2026 (RFC 48148): {len(ordered)} modules, first {ordered[0]}")
    narrow = sorted({scheme.bits for scheme in schemes.values()} & {2, 3})
    if narrow:
        limits.append(f"no {' or '.join(map(str, narrow))}-bit kernels but Humming's")
    groups = sorted({str(s.group_size) for s in schemes.values() if not _grouped_for_vllm(s)})
    if groups:
        limits.append(f"group sizes are {', '.join(map(str, VLLM_GROUPS))}, got {', '.join(groups)}")
    differing = list(unequal_merges(schemes, floats))
    if differing:
        limits.append(f"merged modules need one scheme: {len(differing)} differ, first {differing[0]}")
    return own, Engine("transformers", True, (needs,)), Engine("vLLM", not limits, tuple(limits)), plugin


def _grouped_for_vllm(scheme: QuantScheme) -> bool:
    """FP8 and W8A8 take one scale for the whole of a weight, too."""
    whole = scheme.codebook == "e4m3" or (scheme.bits == 8 and scheme.act is not None)
    return scheme.group_size in VLLM_GROUPS or (whole and scheme.group_size == "tensor")


def _plugin(schemes: Mapping[str, QuantScheme], ordered: Sequence[str]) -> Engine:
    if any(".experts." in module for module in schemes):
        return Engine(PLUGIN, False, ("no quantized experts yet",))
    return Engine(PLUGIN, True, ("on one rank where act-order columns would be cut",) if ordered else ())


def unequal_merges(schemes: Mapping[str, QuantScheme], floats: Collection[str]) -> dict[str, str]:
    """Parent -> its modules that engines merge although their schemes differ."""
    unequal = {}
    for parent in dict.fromkeys(module.rpartition(".")[0] for module in schemes):
        for names in MERGED:
            paths = [f"{parent}.{name}" for name in names]
            found = {path: str(schemes.get(path, "float")) for path in paths if path in schemes or path in floats}
            if len(set(found.values())) > 1:
                unequal[parent] = ", ".join(f"{path.rpartition('.')[2]} {scheme}" for path, scheme in found.items())
    return unequal
