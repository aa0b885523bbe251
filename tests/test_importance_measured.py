"""Importance that is measured by running a model on text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qkernels.errors import CalibrationError
from qkernels.formats.gguf import read_importance, write_importance
from qkernels.layerwise.importance import measure_importance
from qkernels.sizing import importance_of
from qkernels.texts import load_tokenizer
from tests.checkpoints import IDS, small_llama
from tests.gguf_golden import FILES
from tests.gguf_written import model_directory
from tests.tiny_models import tiny_model


def test_what_goes_into_each_linear_layer(tmp_path: Path) -> None:
    model = small_llama()
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS.repeat(3, 1))
    hook.remove()
    found = measure_importance(model, [IDS, IDS.repeat(2, 1)], "a.txt")
    names = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(found.entries) == names and (found.chunk_count, found.chunk_size) == (3, 12)
    entry = found.entries["model.layers.1.mlp.down_proj.weight"]
    assert entry.counts.tolist() == [36]
    torch.testing.assert_close(entry.importance(64, 96), seen[0].reshape(-1, 96).square().mean(0))
    write_importance(tmp_path / "i.gguf", found)
    again = read_importance(tmp_path / "i.gguf")
    assert again.datasets == ("a.txt",)
    assert all(torch.equal(again.entries[name].sums, found.entries[name].sums) for name in names)


def test_experts_count_the_tokens_that_the_router_sends() -> None:
    torch.manual_seed(0)
    model = tiny_model("qwen3_moe", vocab_size=64, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    experts = model.model.layers[0].mlp.experts
    seen: list[tuple[Tensor, Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    found = measure_importance(model, [IDS]).entries
    (x, ids), name = seen[0], "model.layers.0.mlp.experts"
    assert {found[f"{name}.{p}"].sums.shape[0] for p in ("gate_up_proj", "down_proj")} == {4}
    for expert in range(4):
        rows = x.reshape(-1, x.shape[-1])[(ids == expert).any(1)]
        gate, up = (rows @ experts.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
        for projection, inputs in (("gate_up_proj", rows), ("down_proj", nn.functional.silu(gate) * up)):
            entry = found[f"{name}.{projection}"]
            assert float(entry.counts[expert]) == len(rows)
            torch.testing.assert_close(entry.sums[expert], inputs.square().sum(0), rtol=1e-5, atol=1e-9)
    assert sum(found[f"{name}.down_proj"].counts.tolist()) == 2 * IDS.numel()


def test_what_llama_imatrix_measured(tmp_path: Path) -> None:
    """On the same windows of 32 tokens, whose first it replaces by the one that begins a text; in float16 there."""
    theirs, older = (read_importance(FILES.parent / "imatrix" / f"tiny.{suffix}") for suffix in ("gguf", "dat"))
    assert (theirs.datasets, theirs.chunk_count, theirs.chunk_size) == (("tiny.txt",), 4, 32)
    assert (older.datasets, older.chunk_count) == (("tiny.txt",), 4)
    source = model_directory(tmp_path / "tiny")
    tokenizer = load_tokenizer(source)
    windows = torch.tensor(tokenizer("the moon and the sea, the sun and the stars; " * 12)["input_ids"])[:128].view(
        4, 32
    )
    windows[:, 0] = tokenizer.bos_token_id
    ours = importance_of(source, windows, samples=4, seq_len=32)
    assert theirs.entries.keys() == older.entries.keys() == ours.entries.keys() - {"output.weight"}
    for name, entry in theirs.entries.items():
        assert entry.counts.tolist() == ours.entries[name].counts.tolist() == [128]
        expected = entry.importance(256, 256)
        assert torch.equal(older.entries[name].importance(256, 256), expected)
        assert float((ours.entries[name].importance(256, 256) - expected).norm() / expected.norm()) < 3e-3, name


def test_what_cannot_be_measured_is_said() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="layers.1.self_attn.q_proj are NaN or infinite"):
        measure_importance(model, [IDS])
    with pytest.raises(CalibrationError, match="no token through a linear layer"):
        measure_importance(nn.Embedding(64, 8), [IDS])
