"""GGUF files whose blocks are calibrated: those of the methods bit for bit, layer after layer, all or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import RTN, load, quantize
from qkernels.calibrate_gguf import preview_gguf, quantize_gguf
from qkernels.checkpoint import plan_gguf, to_gguf
from qkernels.cli.main import main
from qkernels.errors import ArgumentError, CheckpointError, ConversionError
from qkernels.evaluate import compare
from qkernels.formats.gguf import dequantize, gguf_blocks
from qkernels.layerwise.gguf_blocks import gguf_gptq
from qkernels.quantizers import InputStatistics
from qkernels.storage.gguf import GgufSource
from qkernels.texts import load_tokenizer
from tests.gguf_golden import FILES
from tests.gguf_written import FIELDS, moe_directory
from tests.tiny_models import tiny_model

pytest.importorskip("transformers")
FEW: dict[str, Any] = {"samples": 4, "seq_len": 32, "progress": False}
IDS = (torch.arange(128).reshape(4, 32) * 7 + torch.arange(4)[:, None] ** 2) % 300
MIXED = ("ffn_down", "Q6_K")


def directory_of(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    load_tokenizer(FILES / "llama.gguf").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = tiny_model("llama", **{**FIELDS, "num_hidden_layers": 1})
    return directory_of(model, tmp_path_factory.mktemp("calibrated") / "tiny")


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "m.gguf"
    quantize_gguf(source, path, "Q4_K_S", IDS, tensor_types=[MIXED], **FEW)
    return path


def inputs_of(model: Any, module: str) -> Tensor:
    """The Hessian of what goes into a linear layer."""
    layer = model.get_submodule(module)
    statistics = InputStatistics(layer.in_features)
    hook = layer.register_forward_pre_hook(lambda module, args: statistics.update(args[0]))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return statistics.hessian(module)


def test_blocks_are_those_of_gptq_on_what_quantized_layers_put_out(source: Path, written: Path) -> None:
    plan = plan_gguf(source, "Q4_K_S", tensor_types=[MIXED], calibrated=True)
    file, model = GgufSource.open(written), load(source, dtype="float32")
    assert {n: e.type.name for n, e in file.entries.items()} == {n: e.chosen.type for n, e in plan.entries.items()}
    layer = "model.layers.0"
    for spelled, module in (("attn_v", f"{layer}.self_attn.v_proj"), ("attn_q", f"{layer}.self_attn.q_proj")):
        entry = file.entry(f"blk.0.{spelled}.weight")
        blocks = gguf_gptq(model.get_submodule(module).weight.detach(), inputs_of(model, module), entry.type.name)
        expected = plan.entries[f"blk.0.{spelled}.weight"].place.rows_in_file(blocks)
        assert torch.equal(file.blocks(f"blk.0.{spelled}.weight").view(expected.shape), expected), spelled
    down = model.get_submodule(f"{layer}.mlp.down_proj")
    whole = load(written, dtype="float32")
    before = {name: whole.get_submodule(f"{layer}.{name}").dequantize() for name in INNER}
    for name, value in before.items():
        model.get_submodule(f"{layer}.{name}").weight.data.copy_(value)
    made = gguf_gptq(down.weight.detach(), inputs_of(model, f"{layer}.mlp.down_proj"), "Q6_K")
    assert torch.equal(file.blocks("blk.0.ffn_down.weight").view(made.shape), made)
    embedding = model.model.embed_tokens.weight.detach()
    found = file.blocks("token_embd.weight")
    assert torch.equal(
        found.view(len(embedding), -1), gguf_blocks(embedding, file.entry("token_embd.weight").type.name, search="best")
    )


INNER = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"]


def test_the_answers_come_closer(source: Path, written: Path, tmp_path: Path) -> None:
    model = load(source, dtype="float32")
    to_gguf(source, tmp_path / "plain.gguf", "Q4_K_S", tensor_types=[MIXED])
    quantize_gguf(source, tmp_path / "awq.gguf", "Q4_K_S", IDS, "awq", tensor_types=[MIXED], **FEW)
    quantize_gguf(source, tmp_path / "both.gguf", "Q4_K_S", IDS, "awq+gptq", tensor_types=[MIXED], **FEW)
    plain, gptq, awq, both = (
        compare(load(path, dtype="float32"), model, IDS.flatten(), 32, progress=False).kl
        for path in (tmp_path / "plain.gguf", written, tmp_path / "awq.gguf", tmp_path / "both.gguf")
    )
    assert gptq < 0.6 * plain and awq < plain and both < 0.6 * plain
    unchanged = model.model.layers[0].post_attention_layernorm.weight.detach()
    for path, folded in ((written, False), (tmp_path / "awq.gguf", True), (tmp_path / "both.gguf", True)):
        assert torch.equal(GgufSource.open(path).read("blk.0.ffn_norm.weight"), unchanged) != folded


def test_an_interrupted_run_goes_on(
    source: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the file is written: nothing is there, and the same command with resume makes the same bytes."""
    import qkernels.calibrate_gguf as at

    path = tmp_path / "m.gguf"

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(at, "fill_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_gguf(source, path, "Q4_K_S", IDS, tensor_types=[MIXED], **FEW)
    assert not path.exists()
    with pytest.raises(CheckpointError, match="pass --resume"):
        quantize_gguf(source, path, "Q4_K_S", IDS, tensor_types=[MIXED], **FEW)
    with pytest.raises(CheckpointError, match="with another method than this run's"):
        quantize_gguf(source, path, "Q3_K_S", IDS, resume=True, **FEW)
    quantize_gguf(source, path, "Q4_K_S", IDS, tensor_types=[MIXED], resume=True, **FEW)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    names = GgufSource.open(path).entries
    assert all(torch.equal(GgufSource.open(path).blocks(n), GgufSource.open(written).blocks(n)) for n in names)


def test_experts_are_calibrated_by_their_tokens(tmp_path: Path) -> None:
    directory = moe_directory(tmp_path / "moe", layers=1, seed=5)
    ids = IDS % load(directory).config.vocab_size
    path = tmp_path / "m.gguf"
    _, report = quantize_gguf(directory, path, "Q4_0", ids, routing="all", **FEW)
    stacks = [module for module in report.modules if module.name.endswith("_proj") and ".experts." in module.name]
    assert {module.method for module in stacks} == {"gptq"} and len(stacks) == 2
    loaded = load(path, dtype="float32").get_submodule("model.layers.0.mlp.experts").dequantize(torch.float32)
    to_gguf(directory, tmp_path / "plain.gguf", "Q4_0")
    file, plain = GgufSource.open(path), GgufSource.open(tmp_path / "plain.gguf")
    for piece, rows in (("gate", slice(0, None)), ("up", slice(None))):
        name = f"blk.0.ffn_{piece}_exps.weight"
        type = file.entry(name).type.name
        made = dequantize(file.blocks(name), type)
        half = loaded["gate_up_proj"].chunk(2, dim=1)[piece == "up"]
        assert torch.equal(made, half[rows]) and not torch.equal(file.blocks(name), plain.blocks(name))
    with pytest.raises(ConversionError, match=r"ffn_gate_exps.weight was to be Q4_0 and blk.0.ffn_up_exps.weight Q8_0"):
        quantize_gguf(directory, path, "Q4_0", ids, tensor_types=[("up_exps", "Q8_0")], overwrite=True, **FEW)


def test_command(source: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the moon and the sea and the moon " * 40)
    out = tmp_path / "m.gguf"
    common = [str(source), str(out), "--type", "Q4_K_S"]
    few = ["--calibration", str(text), "--samples", "2", "--seq-len", "16"]
    assert main(["quantize", *common, "--method", "gptq", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "gptq would quantize 7 linear layers" in printed and "| attn_q.weight" in printed and not out.exists()
    assert main(["quantize", *common, "--method", "gptq", *few]) == 0
    printed = capsys.readouterr().out
    assert "gptq q4_k: 7 layers quantized on 2 x 16 tokens" in printed and f"wrote {out}" in printed
    assert re.search(r"lm_head was skipped: Q6_K by the better search", printed)
    assert main(["eval", str(out), "--text", str(text), "--seq-len", "16"]) == 0
    capsys.readouterr()
    for extra, message in (
        (["--method", "rtn"], "made by --method gptq, by --method awq, or without --method by a search; got rtn"),
        (["--method", "gptq"], "--method gptq is calibrated: give it a text with --calibration"),
        (["--method", "gptq", "--search", "best", *few], "leave out --search"),
        (["--method", "awq", "--scales", "awq", *few], "--scales is an option of gptq, got --method awq"),
        (["--scales", "awq"], "leave out --scales"),
        (["--method", "gptq", "--imatrix", "x"], "leave out --imatrix"),
        (["--method", "gptq", "--bits", "4", *few], "leave out --bits"),
        (["--resume"], "leave out --resume"),
        (["--method", "gptq", *few], "m.gguf"),
        (["--method", "gptq", "--tensor-type", "=F16", *few], "expected REGEX=TYPE"),
    ):
        try:
            status = main(["quantize", *common, *extra])
        except SystemExit as error:
            status = int(error.code or 0)
        assert status and re.search(message, capsys.readouterr().err), extra


def test_what_cannot_be_calibrated_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(ArgumentError, match='method must be "gptq", "awq" or "awq\\+gptq", got \'rtn\''):
        quantize_gguf(source, out, "Q4_K_M", IDS, "rtn")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="routing must be"):
        quantize_gguf(source, out, "Q4_K_M", IDS, routing="none")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="a GGUF file is called something.gguf"):
        quantize_gguf(source, tmp_path / "m", "Q4_K_M", IDS)
    with pytest.raises(ArgumentError, match="there is nothing to calibrate; leave out --method gptq"):
        quantize_gguf(source, out, "F16", IDS)
    quantize(source, RTN(bits=4, group_size=64), save_to=tmp_path / "q", progress=False)
    with pytest.raises(ArgumentError, match="is quantized already"):
        preview_gguf(tmp_path / "q", "Q4_K_M")
    assert not out.exists()
