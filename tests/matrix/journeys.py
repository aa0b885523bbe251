"""What every architecture of the matrix must stand, and the cells of the table that come of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkernels import GPTQ, RTN, QuantLinear, QuantReport, load, quantize
from qkernels.calibrate import preview
from qkernels.errors import QKernelsError
from qkernels.integrations.transformers import QKernelsConfig
from qkernels.nn import QuantExperts, set_module
from qkernels.nn.packed import PackedModule
from qkernels.nn.selection import A_HEAD
from qkernels.quantizers import Options

from .rows import Row
from .tiny import answers, tokens

FLOAT, RTN_8, GPTQ_4, GENERATE, PLUG_IN, LEFT = COLUMNS = (
    "float", "RTN 8", "GPTQ 4", "generate", "QKernelsConfig", "stays as it is"
)  # fmt: skip
METHODS: dict[str, Options] = {RTN_8: RTN(bits=8, group_size=32), GPTQ_4: GPTQ(bits=4, group_size=32)}
SCHEME = "w8a16_g32"  # that of RTN 8
RELATIVE = 1e-5  # from the outputs of the dequantized model

Answers = Mapping[str, Tensor]


def travel(row: Row, path: Path) -> dict[str, str]:
    """Take a tiny model of an architecture every way; returns its cells, by column."""
    model = row.model()
    inputs = row.inputs(model)
    model.save_pretrained(path / FLOAT)  # before it runs: that may change it (RWKV)
    expected = answers(model, inputs)
    assert expected and all(bool(value.isfinite().all()) for value in expected.values())
    back = load(path / FLOAT)
    assert type(back) is type(model)
    same(answers(back, inputs), expected)
    cells = {FLOAT: "✓", GENERATE: "✓" if model.can_generate() else "–"}
    for column, method in METHODS.items():
        if column in row.refused:
            refused(row.refused[column], model, path, method)
            cells[column] = row.refused[column]
            continue
        report = quantize(path / FLOAT, method, save_to=path / column, progress=False, **windows_for(method))
        back = load(path / column)
        cells[column] = counted(report)
        cells[LEFT] = left(report)
        check(back, inputs)
        if method.needs != "weight":
            in_memory(model, method, back, report)
    plugged_in(load(path / RTN_8), path, inputs)
    cells[PLUG_IN] = "✓"
    return {column: cells[column] for column in COLUMNS}


def windows_for(method: Options) -> dict[str, Any]:
    """Calibration, where it is asked for."""
    return {} if method.needs == "weight" else {"calibration": tokens(12, 16), "seq_len": 16}


def check(model: Any, inputs: dict[str, Tensor]) -> None:
    """A quantized model computes what its dequantized weights say, one pass and token by token."""
    plain = dequantized(model)
    near(answers(model, inputs), answers(plain, inputs))
    if model.can_generate():
        options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


def in_memory(model: Any, method: Options, back: Any, report: QuantReport) -> None:
    """A model in memory is quantized to the same weights as its directory, for the same reasons."""
    mine = copy.deepcopy(model)
    again = quantize(mine, method, progress=False, **windows_for(method))
    assert {m.name: m.fallback for m in again.modules} == {m.name: m.fallback for m in report.modules}
    assert quantized(mine).keys() == {module.name for module in report.modules}
    same_weights(mine, back)


def plugged_in(expected: Any, path: Path, inputs: dict[str, Tensor]) -> None:
    """`from_pretrained` quantizes to what `quantize` does, and both loaders read what `save_pretrained` then writes."""
    kind = type(expected)
    model = kind.from_pretrained(path / FLOAT, quantization_config=QKernelsConfig(SCHEME))
    model.save_pretrained(path / PLUG_IN)
    same_weights(model, expected)
    near(answers(model, inputs), answers(copy.deepcopy(expected), inputs))
    theirs, info = kind.from_pretrained(path / PLUG_IN, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    for back in (load(path / PLUG_IN), theirs):
        assert type(back) is kind
        same_weights(back, expected)
        near(answers(back, inputs), answers(copy.deepcopy(expected), inputs))


def refused(reason: str, model: Any, path: Path, method: Options) -> None:
    """A dry run says no as the work itself does, of a directory and of a model in memory, and nothing is made or changed."""
    mine = copy.deepcopy(model)
    with pytest.raises(QKernelsError, match=re.escape(reason)):
        preview(path / FLOAT, method, seq_len=16)
    for source in (path / FLOAT, mine):
        with pytest.raises(QKernelsError, match=re.escape(reason)):
            quantize(source, method, save_to=path / "refused", progress=False, **windows_for(method))
    assert not quantized(mine) and not (path / "refused").exists()


def quantized(model: nn.Module) -> dict[str, PackedModule]:
    """Linear layers, and stacks of experts."""
    found: dict[str, PackedModule] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[name] = module
        elif isinstance(module, QuantExperts):
            found |= {f"{name}.{projection}": stack for projection, stack in module.stacks.items()}
    return found


def dequantized(model: Any) -> Any:
    """The same model with a float layer for every quantized one."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantExperts):
            floats = copy.copy(module.shell)
            floats._parameters = {n: nn.Parameter(t, requires_grad=False) for n, t in module.dequantize().items()}
            set_module(plain, name, floats)
    for name, layer in quantized(model).items():
        if not isinstance(layer, QuantLinear):
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight.data, linear.bias = layer.dequantize(), layer.bias
        set_module(plain, name, linear)
    return plain


def same_weights(one: nn.Module, other: nn.Module) -> None:
    """Quantized layers and all other tensors. (Outputs may differ by a rounding: Jamba asks `config._is_quantized`, which only
    transformers sets, and computes the same by another road.)"""
    mine, others = quantized(one), quantized(other)
    assert mine.keys() == others.keys()
    for name, layer in mine.items():
        assert torch.equal(layer.dequantize(), others[name].dequantize()), name
    plain, expected = (
        {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in mine}
        for model in (one, other)
    )
    assert plain.keys() == expected.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, expected[name]), name


def same(one: Answers, other: Answers) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def near(one: Answers, other: Answers) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert bool(other[name].isfinite().all())
        assert float((one[name] - other[name]).norm()) <= RELATIVE * float(other[name].norm()), name


def counted(report: QuantReport) -> str:
    """How many layers were quantized, and where not all of them could be calibrated, how many were."""
    done = sum(module.fallback is None for module in report.modules)
    return f"✓ {done}" if done == len(report.modules) else f"✓ {done} of {len(report.modules)}"


def left(report: QuantReport) -> str:
    """What is not quantized, in a word each."""
    kinds = []
    for reason in report.skipped.values():
        if reason == A_HEAD:
            kinds.append("head")
        elif reason.startswith("a router"):
            kinds.append("router")
        elif reason.startswith("stacked experts"):
            kinds.append("experts")
        elif reason.startswith("its weight is shared"):
            kinds.append("shared weights")
        elif found := re.search(r" of (\w+), which is not|^(\w+) is a subclass|^nn\.(\w+) reads", reason):
            kinds.append(f"`{next(filter(None, found.groups()))}`")
        else:
            kinds.append(reason.partition(" (")[0].partition(",")[0])
    return ", ".join(sorted(dict.fromkeys(kinds), key=lambda kind: (kind != "head", kind)))
