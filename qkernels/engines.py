"""Which inference engine serves which checkpoint, as far as its format decides: data, of one version of each engine.

`inspect`, `plan` and docs/serving.md read this table. What an engine did was seen by running it, or read in its source or its
documentation; each entry says which, of what version and when.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from .checkpoint.packed import PACKED
from .scheme import QuantScheme
from .text import table

# Modules that serving engines merge into one matrix, which needs one scheme.
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PLUGIN: Final = "vLLM with qkernels"  # beside it in one environment: docs/serving.md
OURS: Final = ("native", *PACKED)


@dataclass(frozen=True)
class KnownEngine:
    """An engine as it was seen.

    Args:
        name: as it is called.
        version: that was looked at.
        date: of that, year and month.
        seen: how: it was run, or its source or documentation was read.
        reads: beginnings of the names that formats have here -> what it needs for them ("": nothing more). The longest that fits
            counts; formats of ours and those that are not listed it does not read.
        act_order: why it does not take columns in act-order; "" where it does.
        widths: bits of integer codes that it has kernels for; None: all.
        groups: group sizes of integer codes; None: all.
        merges: whether it merges modules (`MERGED`), which then need one scheme.
    """

    name: str
    version: str
    date: str
    seen: Literal["run", "source", "documentation"]
    reads: Mapping[str, str]
    act_order: str = ""
    widths: tuple[int, ...] | None = None
    groups: tuple[int | str, ...] | None = None
    merges: bool = False

    def needs(self, format_name: str) -> str | None:
        """What it needs for a format; None where it does not read it."""
        fitting = [start for start in self.reads if format_name.startswith(start)]
        return self.reads[max(fitting, key=len)] if fitting else None


# Not mxfp4, which is gpt-oss: its experts' limit and bias the plug-in refuses by name.
_SAFETENSORS: Final = (
    "native", *PACKED, "gptq", "awq", "compressed-tensors", "fp8", "modelopt", "bitsandbytes", "hqq", "auto-round", "torchao",
    "planar gptq_p",
)  # fmt: skip

ENGINES: Final = (
    KnownEngine(
        "transformers", "5.24.0", "2026-11", "run",
        {
            "gptq": "needs optimum and gptqmodel",
            "awq": "needs gptqmodel and accelerate",
            "compressed-tensors": "needs compressed-tensors",
            "bitsandbytes": "needs bitsandbytes",
            "hqq": "needs hqq",
            "auto-round": "needs auto-round",
            "torchao": "needs torchao",
            "planar gptq_p": "needs optimum and gptqmodel",
            "quanto": "needs optimum-quanto, whose QuantizedModelForCausalLM loads it",
            "fp8": "needs a GPU and kernels from the Hub, or dequantizes it",
            "mxfp4": "needs a GPU and kernels from the Hub, or dequantizes it",
            "gguf": "needs gguf, and dequantizes it",
        },
    ),
    KnownEngine(
        "vLLM", "0.32.0", "2026-11", "run",
        {
            "gptq": "",
            "awq": "",
            "compressed-tensors": "",
            "fp8": "",
            "modelopt": "",
            "mxfp4": "",
            "auto-round": "",
            "torchao": "needs torchao",
            "bitsandbytes": "needs vllm-bnb-plugin",
            "gguf": "needs vllm-gguf-plugin, which does not read every type",
        },
        act_order="act-order was removed in 2026 (RFC 48148)",
        widths=(4, 5, 6, 7, 8),
        groups=(16, 32, 64, 128, "channel"),
        merges=True,
    ),
    KnownEngine(
        PLUGIN, "0.32.0", "2026-11", "run",
        dict.fromkeys(_SAFETENSORS, ""),
    ),
    KnownEngine(
        "SGLang", "0.5.23", "2026-11", "source",
        {
            **dict.fromkeys(("gptq", "awq", "compressed-tensors", "fp8", "modelopt", "mxfp4", "auto-round", "gguf"), ""),
            "bitsandbytes": "needs vllm",
        },
        merges=True,
    ),
    KnownEngine("llama.cpp", "b11549", "2026-10", "run", {"gguf": ""}),
    KnownEngine(
        "Ollama", "its main branch", "2026-11", "documentation",
        {"gguf": "imported with a Modelfile (FROM model.gguf, then ollama create)"},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """Whether an inference engine can serve the checkpoint, and what it needs or why it cannot; `version` that was looked at."""

    name: str
    serves: bool
    notes: tuple[str, ...]
    version: str = ""


def engines_for(
    format_name: str | None, schemes: Mapping[str, QuantScheme], ordered: Sequence[str], floats: Collection[str]
) -> tuple[Engine, ...]:
    """Who can serve a checkpoint: this library, then the engines of the table; those of GGUF alone are left out elsewhere.

    Args:
        format_name: None where nothing is quantized: then the answer is empty.
        schemes: of its quantized modules.
        ordered: those of them whose columns are in act-order.
        floats: modules that are not quantized.
    """
    if format_name is None:
        return ()
    found = [Engine("qkernels", True, ())]
    for known in ENGINES:
        if set(known.reads) == {"gguf"} and format_name != "gguf":
            continue
        if known.name == PLUGIN and format_name == "gguf":
            why = ("vLLM streams safetensors; `qkernels pack` makes a directory of it",)
            found.append(Engine(PLUGIN, False, why, known.version))
            continue
        needs = known.needs(format_name)
        if needs is None:
            found.append(Engine(known.name, False, (_unread(format_name),), known.version))
            continue
        limits = _limits(known, schemes, ordered, floats) if format_name != "gguf" else []
        notes = limits or [note for note in (needs, _of_ranks(known, ordered)) if note]
        found.append(Engine(known.name, not limits, tuple(notes), known.version))
    return tuple(found)


def _unread(format_name: str) -> str:
    if format_name in OURS:
        return "its format is our own; convert it with `qkernels pack … --format gptq`"
    return f"does not read {format_name}"


def _of_ranks(known: KnownEngine, ordered: Sequence[str]) -> str:
    return "on one rank where act-order columns would be cut" if known.name == PLUGIN and ordered else ""


def _limits(
    known: KnownEngine, schemes: Mapping[str, QuantScheme], ordered: Sequence[str], floats: Collection[str]
) -> list[str]:
    """Why an engine that reads the format does not serve these weights."""
    limits = []
    integers = [scheme for scheme in schemes.values() if scheme.codebook is None and scheme.factors is None]
    if known.act_order and ordered:
        limits.append(f"{known.act_order}: {len(ordered)} modules, first {ordered[0]}")
    narrow = sorted({scheme.bits for scheme in integers} - set(known.widths)) if known.widths is not None else []
    if narrow:
        limits.append(
            f"no {' or '.join(map(str, narrow))}-bit kernels" + (" but Humming's" if known.name == "vLLM" else "")
        )
    if known.groups is not None:
        whole = [s for s in integers if s.group_size == "tensor" and s.act is not None]  # W8A8 may have one scale
        groups = sorted({str(s.group_size) for s in integers if s.group_size not in known.groups and s not in whole})
        if groups:
            limits.append(f"group sizes are {', '.join(map(str, known.groups))}, got {', '.join(groups)}")
    differing = list(unequal_merges(schemes, floats)) if known.merges else []
    if differing:
        limits.append(f"merged modules need one scheme: {len(differing)} differ, first {differing[0]}")
    return limits


def engines_of_floats() -> tuple[str, ...]:
    """Who serves a directory that is not quantized."""
    return tuple(known.name for known in ENGINES if set(known.reads) != {"gguf"} and known.name != PLUGIN)


def engines_table() -> str:
    """The table of docs/serving.md: every engine with its version, when and how it was looked at, and what it reads."""
    how = {"run": "run", "source": "source read, not run", "documentation": "documentation read, not run"}
    rows = []
    for known in ENGINES:
        by_need: dict[str, list[str]] = {}
        for start, needs in known.reads.items():
            named = "packed" if start in PACKED else start  # however many layouts there are
            if named not in by_need.setdefault(needs, []):
                by_need[needs].append(named)
        reads = "; ".join(", ".join(starts) + (f" ({needs})" if needs else "") for needs, starts in by_need.items())
        rows.append([known.name, known.version, known.date, how[known.seen], reads])
    return table(["engine", "version", "date", "how it was seen", "reads"], rows)


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
