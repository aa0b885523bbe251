"""Stacked experts in GGUF files: run packed where their blocks have a kernel, else dequantized and said; never left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import inspect, load, save
from qkernels.checkpoint import convert, open_checkpoint
from qkernels.errors import CheckpointError, UnsupportedProblem
from qkernels.formats.gguf import dequantize
from qkernels.nn import QuantExperts, QuantStack
from qkernels.storage.gguf import GgufSource
from tests.gguf_golden import FILES, Tensors, rewritten

IDS = torch.arange(12)[None] * 7 % 64


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def experts(model: Any) -> list[QuantExperts]:
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


@pytest.mark.parametrize(
    ("name", "schemes"),
    [("mixtral", ["w4a16_g32", "w5a16_g32_offset"]), ("qwen2moe", ["mxfp4_g32", "q4_k"])],
)
def test_blocks_of_experts_run_packed(name: str, schemes: list[str], tmp_path: Path) -> None:
    """Bit for bit the numbers of the blocks, gate's rows first; equal in the native format."""
    model, source = load(FILES / f"{name}.gguf", dtype="float32"), GgufSource.open(FILES / f"{name}.gguf")
    found = experts(model)
    assert len(found) == model.config.num_hidden_layers
    for layer, module in enumerate(found):
        assert [str(stack.scheme) for stack in module.stacks.values()] == schemes
        parts = {
            leaf: dequantize(
                source.blocks(f"blk.{layer}.ffn_{leaf}_exps.weight"),
                source.entry(f"blk.{layer}.ffn_{leaf}_exps.weight").type.name,
            )
            for leaf in ("gate", "up", "down")
        }
        weights = module.dequantize(torch.float32)
        assert torch.equal(weights["gate_up_proj"], torch.cat([parts["gate"], parts["up"]], dim=1))
        assert torch.equal(weights["down_proj"], parts["down"])
    convert(FILES / f"{name}.gguf", tmp_path / "native")
    save(model, tmp_path / "saved")
    for directory in (tmp_path / "native", tmp_path / "saved"):
        assert torch.equal(logits(load(directory, dtype="float32")), logits(model))


def test_blocks_without_a_kernel_are_dequantized(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both projections, for a model has both quantized or neither; by type, and where a machine has no kernel for it."""
    with caplog.at_level(logging.WARNING):
        model = load(FILES / "qwen3moe.gguf", dtype="float32")
    assert not experts(model)
    assert "experts of which not all are in one type of blocks that has a kernel are dequantized" in caplog.text
    caplog.clear()
    expected = logits(load(FILES / "mixtral.gguf", dtype="float32"))

    def no_kernel(*_: Any, **__: Any) -> QuantStack:
        raise UnsupportedProblem("no kernel")

    monkeypatch.setattr(QuantStack, "of", no_kernel)
    with caplog.at_level(logging.WARNING):
        model = load(FILES / "mixtral.gguf", dtype="float32")
    assert "w4a16_g32 has no kernel for float32 on this cpu and is dequantized: 2 modules" in caplog.text
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_gate_and_up_of_two_types_are_dequantized(tmp_path: Path) -> None:
    def up_in_bytes(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("ffn_up_exps.weight")]:
            kind, blocks = tensors[name]
            tensors[name] = ("F16", dequantize(blocks, kind).half())

    path = rewritten("mixtral", tmp_path / "m.gguf", change=up_in_bytes)
    model = load(path, dtype="float32")
    assert not experts(model)
    expected = logits(load(FILES / "mixtral.gguf", dtype="float32"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)  # Q4_0 x d in float16
    assert not torch.equal(logits(model), expected)


def test_inspect_counts_every_expert() -> None:
    found = inspect(FILES / "mixtral.gguf")
    stack = next(layer for layer in found.layers if layer.name == "model.layers.1.mlp.experts.gate_up_proj")
    assert (stack.experts, stack.out_features, stack.in_features, stack.scheme) == (4, 128, 32, "w4a16_g32")
    assert stack.nbytes == 4 * 128 * 18 and stack.weights == 4 * 128 * 32
    assert "| 4 x 128 x 32 | w4a16_g32" in found.to_markdown().replace("  ", " ")
    in_blocks = next(layer for layer in inspect(FILES / "qwen3moe.gguf").layers if "down_proj" in layer.name)
    assert (in_blocks.experts, in_blocks.scheme) == (4, "IQ3_S")


def test_what_is_missing_or_malformed_is_an_error(tmp_path: Path) -> None:
    def without(name: str) -> Any:
        return lambda tensors: tensors.pop(name)

    path = rewritten("mixtral", tmp_path / "a.gguf", change=without("blk.1.ffn_up_exps.weight"))
    with pytest.raises(
        CheckpointError, match=r"needs 2 tensors of one shape for model\.layers\.1\.mlp\.experts\.gate_up"
    ):
        load(path)
    path = rewritten("mixtral", tmp_path / "b.gguf", change=without("blk.1.ffn_down_exps.weight"))
    with pytest.raises(CheckpointError, match="and not its other projection"):
        load(path)
    path = rewritten("mixtral", tmp_path / "c.gguf", change=without("blk.1.ffn_gate_inp.weight"))
    with pytest.raises(
        CheckpointError, match=r"tensors it needs are missing, for example model\.layers\.1\.mlp\.gate\.weight"
    ):
        load(path)

    def fewer(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_exps" in name and "blk.1" in name]:
            tensors[name] = (tensors[name][0], tensors[name][1][:3].contiguous())

    path = rewritten("mixtral", tmp_path / "d.gguf", change=fewer)
    with pytest.raises(CheckpointError, match=r"there must be 4 experts, got 3"):
        load(path)

    def flat(tensors: Tensors) -> None:
        kind, blocks = tensors["blk.0.ffn_down_exps.weight"]
        tensors["blk.0.ffn_down_exps.weight"] = (kind, blocks.flatten(0, 1).contiguous())

    path = rewritten("mixtral", tmp_path / "e.gguf", change=flat)
    with pytest.raises(CheckpointError, match=r"must be the weights \[E, N, K\] of stacked experts"):
        load(path)
    assert open_checkpoint(FILES / "mixtral.gguf").format is not None
