"""`plan` against what is loaded, and what it decides."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qkernels import GPTQ, load, quantize, replace_linear, save
from qkernels.calibrate import preview
from qkernels.cli.main import main, parser
from qkernels.errors import ArgumentError, CheckpointError
from qkernels.planning import Plan, plan
from qkernels.planning.deciding import decision
from qkernels.planning.devices import CARDS, Device, device_of
from qkernels.planning.measured import CANDIDATES
from qkernels.reports import readable_size
from tests.planning.resident import held, measure

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "examples" / "demo_model"
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 million parameters, most of them in experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=960, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=8, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    out = tmp_path_factory.mktemp("mixture")
    with torch.device("meta"):
        model: Any = MixtralForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    model.save_pretrained(out)
    return out


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8_g64", "w3a16_g64_asym", "q4_k"])
def test_packed_bytes_are_those_of_the_layer(scheme: str) -> None:
    row = plan(str(DEMO), schemes=[scheme], context=64).rows[0]
    model = load(DEMO)
    replace_linear(model, scheme)
    assert row.weights == held(model)


def test_classes_add_up(mixture: Path) -> None:
    found = plan(str(mixture), ["24GiB"], context=64)
    assert sum(found.classes.values()) == found.rows[0].weights
    assert found.rows[0].weights == held(load(mixture))
    assert found.classes["experts"] == 4 * 8 * 3 * 512 * 960 * 2
    assert found.classes["head"] == found.classes["embeddings"] == 2048 * 512 * 2


def test_checkpoints_as_they_are(tmp_path: Path, mixture: Path, tiny_llama_dir: Path) -> None:
    tokens = torch.arange(64)[None].repeat(2, 1)
    method = GPTQ(group_size=32, act_order="group")
    quantize(tiny_llama_dir, method, tokens % 20, tmp_path / "gptq", "gptq", progress=False)
    mixed = load(mixture)
    replace_linear(mixed, "w4a16_g64_asym", overrides={"*.down_proj": "w8a16_channel"})
    save(mixed, tmp_path / "experts")
    sources = [
        tmp_path / "gptq",
        tmp_path / "experts",
        *(GOLDEN / "own").glob("native*"),
        GOLDEN / "own" / "cpu_tile_a8",
    ]
    for source in [*sources, *(GOLDEN / "gguf" / f"{name}.gguf" for name in ("llama-k", "llama-mixed"))]:
        found = plan(str(source), context=16)
        assert [row.scheme for row in found.rows] == ["as it is"]
        assert found.rows[0].weights == held(load(source)), source


def test_tools_files_are_planned_without_their_codes() -> None:
    """What the format makes of codes that are only shaped like those of the file has the scheme of the file."""
    from qkernels.checkpoint.directory import METADATA, DirectoryCheckpoint, _group
    from qkernels.checkpoint.registry import detect
    from qkernels.planning.models import _without_values
    from qkernels.storage.source import TensorSource, _read_header

    checked = 0
    for path in sorted((GOLDEN / "files").glob("*.safetensors")):
        entries, metadata = _read_header(path)
        config = json.loads(metadata["quantization_config"])
        try:
            found = detect(config)
        except CheckpointError:
            continue
        config |= {METADATA: metadata} if found.needs_metadata else {}
        names = [name for name in entries if not name.startswith(("expected.", "original."))]
        source = TensorSource(path.parent, {}, metadata, entries)
        modules = _group(names, found)
        checkpoint = DirectoryCheckpoint(source, found, config, modules, ())
        for module, tensors in modules.items():
            try:
                real = checkpoint.weight(module).weight
            except CheckpointError:
                continue
            made, ordered = _without_values(checkpoint, module, tensors, at_hand=True)
            assert (made.scheme, made.nbytes, ordered) == (
                real.scheme, real.nbytes - (4 * real.K if real.group_index is not None else 0), real.group_index is not None,
            ), path.name  # fmt: skip
            checked += 1
    assert checked > 30


def check_resident(directory: Path, tokens: int, measured: dict[str, int]) -> None:
    """Weights, and weights and cache, within 3 % or 50 MiB of what a process holds."""
    row = plan(str(directory), context=tokens).rows[0]
    print(f"{directory.name}: {row.weights} and {measured['loaded']}, {row.weights + row.cache} and {measured['read']}")
    for predicted, found in ((row.weights, measured["loaded"]), (row.weights + row.cache, measured["read"])):
        assert abs(predicted - found) <= max(0.03 * found, 50 * 2**20)


def test_resident_memory_of_the_demo_model_and_of_a_mixture(mixture: Path) -> None:
    measure(str(DEMO), 1024)  # with whatever is imported on the way
    for directory in (mixture, DEMO):
        check_resident(directory, 1024, measure(str(directory), 1024))


def alone(directory: Path, tokens: int) -> dict[str, int]:
    """The same in a process that has held nothing else."""
    settings = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [
        sys.executable,
        "-m",
        "tests.planning.resident",
        str(tokens),
        str(GOLDEN / "own" / "native"),
        str(directory),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=settings)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.large
def test_resident_memory_of_a_large_model(tmp_path: Path) -> None:
    """1.2 billion parameters, as they are and in 4 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "floats")
    del model
    check_resident(tmp_path / "floats", 2048, alone(tmp_path / "floats", 2048))
    model = load(tmp_path / "floats")
    replace_linear(model, "w4a16_g128", progress=False)
    save(model, tmp_path / "small")
    del model
    check_resident(tmp_path / "small", 2048, alone(tmp_path / "small", 2048))


# --- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arch", "memory"),
    [
        ("24GiB", "sm86", 24 * 2**30),
        ("24 gb", "sm86", 24 * 10**9),
        ("512MiB", "sm86", 2**29),
        ("h200", "sm90", 141 * 10**9),
        ("RTX4090", "sm89", 24 * 2**30),
        ("rtx_4090", "sm89", 24 * 2**30),
        ("A100-80GB", "sm80", 80 * 10**9),
    ],
)
def test_devices(text: str, arch: str, memory: int) -> None:
    found = device_of(text)
    assert (found.arch, found.memory, found.here) == (arch, memory, False)


def test_this_machine_is_a_device() -> None:
    found = device_of("cpu")
    assert found.here and found.is_cpu and 2**28 < found.memory < 2**50
    for text, why in (("cuda:7", "this torch sees no GPU"), ("rtx9", "a device is cpu"), ("", "a device is cpu")):
        if text != "cuda:7" or not torch.cuda.is_available():
            with pytest.raises(ArgumentError, match=why):
                device_of(text)


def test_cards_say_where_their_numbers_are_from() -> None:
    assert all(card.source and card.arch.startswith("sm") and card.gbs > 100 for card in CARDS.values())


# --- what it decides -----------------------------------------------------------------------------------------------------


LAYERS = 8
LAYER = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # bytes in 16 bits
TABLE = 2 * 128256 * 4096


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config.json with layers like those of a model of 8 billion parameters, a quarter of them: 5.3 GiB in 16 bits."""
    from transformers import LlamaConfig

    out = tmp_path_factory.mktemp("config")
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(out)  # fmt: skip
    return str(out / "config.json")


def row(found: Plan, scheme: str) -> Any:
    return next(x for x in found.rows if x.scheme == scheme)


def test_a_model_on_cards(described: str) -> None:
    """A token's cache takes 2 x 8 heads x 128 x 2 bytes in each layer."""
    small = plan(described, ["5GiB"], context=8192)
    assert row(small, "as it is").cache == 8192 * 4096 * LAYERS
    assert row(small, "as it is").weights == pytest.approx(LAYERS * LAYER + 2 * TABLE, rel=1e-4)
    assert row(small, "as it is").verdict == "short" and row(small, "w4a16_g128").fits
    assert row(small, "w2a16_g128").verdict == "fits" and row(small, "w5a16_g128").verdict == "tight"
    assert small.decision.startswith("Take w5a16_g128: ") and ", tight: " in small.decision  # w2 loses too much
    assert "The next better, w" in small.decision
    large = plan(described, ["h200"], context=131072, schemes=["w4a16_g128"])
    assert row(large, "w4a16_g128").cache == 131072 * 4096 * LAYERS
    assert not plan(described, ["2GiB"], schemes=["w4a16_g128"]).fits


def test_the_longest_context_fits_and_one_more_does_not(described: str) -> None:
    longest = plan(described, ["4GiB"], 1, schemes=["w4a16_g128"]).rows[0].longest
    assert 1 < longest < 131072
    found = [plan(described, ["4GiB"], context, schemes=["w4a16_g128"]).rows[0] for context in (longest, longest + 1)]
    assert [x.fits for x in found] == [True, False]


def test_preferences(described: str) -> None:
    found = plan(described, ["24GiB"], context=4096)
    taken = {prefer: decision(found.rows, prefer).split()[1].rstrip(":") for prefer in ("quality", "speed", "size")}
    assert (
        taken["quality"] == "as" and taken["speed"].startswith("w3") and taken["size"].startswith("w3")
    )  # w2 loses too much


def test_two_devices_share_layers(described: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device("cpu", "cpu", 64 * 2**30, 20.0, "made up", True, 0)
    monkeypatch.setattr("qkernels.planning.planner.with_bandwidth", lambda device, bench: device)
    small = dataclasses.replace(cpu, name="card", arch="sm89", memory=4 * 2**30, gbs=500.0, here=False)
    places = {"cpu": cpu, "card": small}
    monkeypatch.setattr("qkernels.planning.planner.device_of", places.__getitem__)
    found = plan(described, ["card", "cpu"], context=4096).rows[0]
    assert found.fits and 1 < found.layers_on < LAYERS
    assert found.command.endswith(f"--prompt 'It was' --gpu-layers {found.layers_on}")
    other = dataclasses.replace(small, name="other")
    monkeypatch.setitem(places, "other", other)
    assert plan(described, ["card", "other"], context=4096).rows[0].command.endswith("--prompt 'It was' --device auto")
    alone = plan(described, ["cpu"], context=4096).rows[0]
    assert alone.tokens_per_s[0] < found.tokens_per_s[0]


def test_commands_of_rows_are_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a plan says to run, the command line takes; without a GPU all that can be wrong is that there is none."""
    monkeypatch.setattr("qkernels.planning.planner.with_bandwidth", lambda device, bench: device)
    demo, own = str(DEMO), str(GOLDEN / "own" / "native")
    for model, devices in ((demo, ["cpu"]), (demo, ["620MiB", "cpu"]), (demo, ["620MiB"] * 2), (own, ["cpu"])):
        for made in plan(model, devices, context=16).rows:
            words = shlex.split(made.command)[1:]
            parser(words).parse_args(words)
            if words[0] == "generate":
                code = main([*words, "--tokens", "1"])
                error = capsys.readouterr().err
                assert code == 0 or "this torch sees none" in error or "has no readable tokenizer" in error, (
                    words,
                    error,
                )


def test_active_experts_set_the_speed(mixture: Path) -> None:
    one, eight = (row(plan(str(mixture), ["h200"], context=64, batch=b), "as it is") for b in (1, 8))
    experts = 4 * 8 * 3 * 512 * 960 * 2
    others = one.weights - experts - 2048 * 512 * 2
    read = one.tokens_per_s[0]
    assert 4800e9 / read == pytest.approx(others + experts / 4 + one.cache, rel=0.02)
    assert 8 * 4800e9 / eight.tokens_per_s[0] == pytest.approx(others + experts + eight.cache, rel=0.02)


def test_what_making_it_costs(mixture: Path, tiny_llama_dir: Path) -> None:
    """What a dry run says of it, and a time that was measured."""
    found = plan(str(tiny_llama_dir), ["24GiB"], schemes=["w4a16_g128"])
    (line,) = (note for note in found.notes if note.startswith("making w4a16_g128"))
    told = preview(tiny_llama_dir, GPTQ())
    for nbytes in (told.device_bytes, told.host_bytes, told.disk_bytes):
        assert readable_size(nbytes) in line
    assert re.search(r"; about \S+ min \(measured .*\)$", line)
    rounded = plan(str(mixture), ["cpu"], schemes=["w4a16_g64"], context=16).notes
    assert any("making w4a16_g64" in note and "tokens" not in note for note in rounded)
    as_it_is = plan(str(tiny_llama_dir), ["24GiB"]).notes
    assert not any(note.startswith("making") for note in as_it_is)


def test_a_tied_head_reads_the_embeddings() -> None:
    found = plan(str(DEMO), ["h200"], context=64, schemes=["w4a16_g64"]).rows[0]
    assert found.tokens_per_s is not None
    assert 4800e9 / found.tokens_per_s[0] == pytest.approx(found.weights + found.cache, rel=1e-3)


def test_experts_have_kernels_of_16_bit_activations_on_a_card(mixture: Path) -> None:
    found = plan(str(mixture), ["rtx4090"], context=64, schemes=["w4a16_g128", "w4a8_g128"])
    assert row(found, "w4a16_g128").verdict == "fits"
    assert row(found, "w4a8_g128").verdict == "no kernel"
    assert any("no grouped kernels for stacked experts" in note for note in found.notes)
    assert {x.method for x in found.rows}.isdisjoint({"awq+gptq", "smoothquant"})


def test_refusals(described: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for arguments, why in (
        ({"kv_dtype": "fp4"}, "kv_dtype must be one of"),
        ({"devices": ["24GiB"] * 3}, "one device, or two"),
        ({"devices": ["cpu", "24GiB"]}, "of two devices the first is a GPU.* got cpu and 24GiB"),
        ({"devices": ["cpu", "cpu"]}, "of two devices the first is a GPU"),
        ({"schemes": ["int4"]}, "a scheme looks like"),
        ({"devices": ["24GiB"], "bench": str(tmp_path / "x.json")}, "says nothing about 24GiB"),
    ):
        with pytest.raises(ValueError, match=why):
            plan(described, **{"devices": ["24GiB"], **arguments})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="quantized already"):
        plan(str(GOLDEN / "own" / "native"), schemes=["w4a16_g128"])
    (tmp_path / "bench.json").write_text('{"conditions": {}}')
    with pytest.raises(ArgumentError, match="no result of qkernels bench"):
        plan(described, ["cpu"], bench=str(tmp_path / "bench.json"))


def test_a_benchmark_sets_the_bandwidth(described: str, tmp_path: Path) -> None:
    result = {"conditions": {"roofs": {"read_gbs": 123.0}, "environment": {"device": "cpu"}}}
    (tmp_path / "bench.json").write_text(json.dumps(result))
    assert plan(described, ["cpu"], context=16, bench=str(tmp_path / "bench.json")).devices[0].gbs == 123.0


def test_qualities_are_those_of_the_page() -> None:
    """The numbers of docs/quality.md, which are those of the committed results."""
    page = (ROOT / "docs" / "quality.md").read_text()
    for candidate in CANDIDATES[1:]:
        if candidate.kl is not None:
            mantissa, exponent = f"{candidate.kl:.1e}".split("e")
            assert f"{mantissa}e{exponent}" in page


def test_commands_and_exit_codes(described: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", described, "--device", "24GiB", "--context", "1024"]) == 0
    shown = capsys.readouterr().out
    assert "| w4a16_g128_asym |" in shown and shown.splitlines()[-1].startswith("Take ")
    assert main(["plan", described, "--device", "1GiB", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["fits"] is False
