"""Types that fit a size: the choice against all choices, what is measured, and the files."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels import RTN, load, quantize, sizing
from qkernels.checkpoint import to_gguf
from qkernels.cli.main import main
from qkernels.errors import ArgumentError
from qkernels.evaluate import compare
from qkernels.sizing import Option, cheapest, choose_types, importance_of
from qkernels.storage.gguf import GgufSource
from tests.gguf_written import model_directory, moe_directory
from tests.tiny_models import tiny_model

pytest.importorskip("transformers")
IDS = torch.arange(256).reshape(4, 64) * 7 % 300
OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=5), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("sizing") / "tiny")


@given(drawn=OPTIONS, nbytes=st.integers(1, 160))
def test_the_choice_is_the_best_but_for_one_step(drawn: list[list[tuple[int, float]]], nbytes: int) -> None:
    options = {str(i): [Option(f"t{j}", *o) for j, o in enumerate(of_one)] for i, of_one in enumerate(drawn)}
    fitting = [
        sum(o.cost for o in chosen)
        for chosen in itertools.product(*options.values())
        if sum(o.nbytes for o in chosen) <= nbytes
    ]
    if not fitting:
        with pytest.raises(ArgumentError, match="the file would have at least"):
            cheapest(options, nbytes)
        return
    found = [choice.option for choice in cheapest(options, nbytes).values()]
    assert sum(option.nbytes for option in found) <= nbytes
    largest_step = max(max(o.cost for o in of_one) - min(o.cost for o in of_one) for of_one in options.values())
    assert sum(option.cost for option in found) <= min(fitting) + largest_step + 1e-9


def test_steps_are_taken_in_order_of_what_a_byte_gains() -> None:
    options = {
        "steep": [Option("a", 10, 9.0), Option("b", 20, 2.0), Option("c", 30, 1.0)],
        "flat": [Option("a", 10, 3.0), Option("b", 20, 2.5), Option("never", 15, 2.9), Option("c", 30, 2.0)],
    }
    chosen = cheapest(options, 45)
    assert {name: choice.option.type for name, choice in chosen.items()} == {"steep": "c", "flat": "a"}
    assert (chosen["steep"].larger, chosen["flat"].smaller) == (None, None)
    assert chosen["flat"].larger == pytest.approx(0.05 * 2**20)


def test_files_fit_and_bytes_go_where_they_count(source: Path, tmp_path: Path) -> None:
    """Nothing that goes through a matrix of zeros costs anything."""
    model = load(source, dtype=torch.float32)
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "hf" / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    found = choose_types(tmp_path / "hf", 900_000, IDS)
    types = {name: choice.option.type for name, choice in found.choices.items()}
    assert {types[f"blk.1.attn_{piece}.weight"] for piece in ("q", "k", "v", "output")} == {"Q2_K"}
    assert "Q2_K" not in {type for name, type in types.items() if "blk.1.attn" not in name}
    to_gguf(
        tmp_path / "hf", tmp_path / "m.gguf", found.mix, tensor_types=found.tensor_types(), importance=found.importance
    )
    size = (tmp_path / "m.gguf").stat().st_size
    assert found.nbytes - 32 * len(types) <= size <= found.nbytes <= 900_000 < size + 40_000
    written = GgufSource.open(tmp_path / "m.gguf")
    assert {name: written.entry(name).type.name for name in types} == types
    divergence = compare(load(tmp_path / "m.gguf", dtype="float32"), model, IDS.flatten(), 64, progress=False).kl
    assert found.cost / 2 < divergence < found.cost * 2


def test_importance_is_the_mean_square_of_inputs(source: Path) -> None:
    found = importance_of(source, IDS)
    model = load(source, dtype=torch.float32)
    seen = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    expected = seen[0].flatten(0, 1).square().mean(0)
    assert torch.allclose(
        found.entries["blk.2.ffn_down.weight"].importance(256, 256), expected, rtol=5e-3
    )  # float16 there
    assert float(found.entries["output.weight"].counts) == 256
    assert "token_embd.weight" not in found.entries


def test_from_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the moon over the town " * 100)
    few = ["--calibration", str(text), "--samples", "2", "--seq-len", "32"]
    out = str(tmp_path / "m.gguf")
    assert main(["quantize", str(source), out, "--target-size", "0.6MiB", *few]) == 0
    assert (tmp_path / "m.gguf").stat().st_size <= 0.6 * 2**20
    printed = capsys.readouterr().out
    assert "| blk.0.attn_k.weight " in printed
    assert "expected KL" in printed
    assert main(["quantize", str(source), out, "--type", "Q4_K_M", "--overwrite", *few]) == 0
    assert GgufSource.open(out).get("quantize.imatrix.entries_count") == 22
    for extra, message in (
        (["--target-size", "1KiB", *few], "the file would have at least"),
        (["--target-size", "1MiB"], "measures what each tensor costs: give it a text with --calibration"),
        (
            ["--target-size", "1MiB", "--type", "Q4_0", *few],
            "--target-size says how a GGUF file is quantized: leave out --type",
        ),
        (["--target-size", "1MiB", "--bits", "4", *few], "leave out --bits"),
        (["--type", "Q4_0", "--imatrix", "x", *few], "leave one of them out"),
    ):
        assert main(["quantize", str(source), str(tmp_path / "n.gguf"), *extra]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", str(source), out, "--target-size", "much", *few])
    assert "expected a size such as 4.2GiB" in capsys.readouterr().err
    assert not (tmp_path / "n.gguf").exists()


def test_what_cannot_fit_is_refused_before_the_work(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "load", None)
    with pytest.raises(ArgumentError, match="the file would have at least"):
        sizing.choose_types(source, 1024, ["a text of some words " * 40], samples=1, seq_len=8)


def test_what_is_quantized_already_has_nothing_to_compare_with(tmp_path: Path, source: Path) -> None:
    quantize(source, RTN(bits=4, group_size=32), save_to=tmp_path / "q", progress=False)
    with pytest.raises(ArgumentError, match="is quantized already"):
        choose_types(tmp_path / "q", 10**6, IDS)


def test_narrow_rows_have_types_of_their_own(tmp_path: Path, source: Path) -> None:
    tiny_model("llama", vocab_size=300, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    found = choose_types(tmp_path, 10**6, IDS)
    assert (
        "Q8_0" in {choice.option.type for choice in found.choices.values()} <= {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    )


def test_experts_get_types_gate_and_up_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Packed when loaded, since gate and up of a layer have one type; and none of them lacks importance."""
    directory = moe_directory(tmp_path / "moe", layers=2, seed=2)
    ids = IDS % load(directory).config.vocab_size
    whole = to_gguf(directory, tmp_path / "whole.gguf", "Q8_0").file_nbytes
    found = choose_types(directory, int(0.9 * whole), ids)
    to_gguf(directory, tmp_path / "m.gguf", found.mix, False, found.tensor_types(), found.importance)
    assert (tmp_path / "m.gguf").stat().st_size <= int(0.9 * whole) and "no importance" not in caplog.text
    types = {name: choice.option.type for name, choice in found.choices.items()}
    assert len(set(types.values())) > 1 and not any("ffn_gate_inp" in name for name in types)
    for layer in range(2):
        assert types[f"blk.{layer}.ffn_gate_exps.weight"] == types[f"blk.{layer}.ffn_up_exps.weight"]
    made = GgufSource.open(tmp_path / "m.gguf")
    assert all(made.entry(name).type.name == type for name, type in types.items())
    assert sum(c.option.nbytes for c in found.choices.values()) == sum(made.entry(name).nbytes for name in types)


@pytest.mark.large
def test_the_bundled_model_loses_less_than_by_the_mix_of_the_same_size(tmp_path: Path) -> None:
    demo = Path(__file__).parent.parent / "examples" / "demo_model"
    texts = [(demo / f"{name}.txt").read_text() for name in ("calibration", "eval")]
    importance = importance_of(demo, texts[:1], 16, 256)
    original = load(demo, dtype=torch.float32)
    from qkernels import load_tokenizer

    ids = torch.tensor(load_tokenizer(demo)(texts[1], verbose=False)["input_ids"][: 16 * 256])
    for mix, bound in (("Q2_K", 0.7), ("Q3_K_M", 0.8), ("Q4_K_M", 0.9)):
        to_gguf(demo, tmp_path / f"{mix}.gguf", mix, importance=importance)
        found = choose_types(demo, (tmp_path / f"{mix}.gguf").stat().st_size, texts[:1], 16, 256)
        to_gguf(
            demo,
            tmp_path / "s.gguf",
            mix,
            tensor_types=found.tensor_types(),
            importance=found.importance,
            overwrite=True,
        )
        theirs, ours = (
            compare(load(tmp_path / name, dtype=torch.float32), original, ids, 256, progress=False).kl
            for name in (f"{mix}.gguf", "s.gguf")
        )
        print(f"{mix}: {theirs:.5f} by the mix, {ours:.5f} by measured cost")
        assert ours < bound * theirs
