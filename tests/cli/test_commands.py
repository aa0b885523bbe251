"""The command line as a user meets it: every command, its help, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qkernels import __version__, extension
from qkernels.cli.common import read_text
from qkernels.cli.main import COMMANDS, main, parser
from qkernels.errors import ArgumentError


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text)
    return path


@pytest.fixture(scope="session")
def quantized_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("out") / "gptq"
    arguments = ["--method", "gptq", "--group-size", "32", "--samples", "8", "--seq-len", "32", "--format", "gptq"]
    assert main(["quantize", str(tiny_llama_dir), str(out), *arguments, "--calibration", str(text_file)]) == 0
    return out


def test_quantize_writes_a_checkpoint_and_reports(quantized_dir: Path) -> None:
    config = json.loads((quantized_dir / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 32)
    assert {"model.safetensors", "tokenizer.json", "config.json", "quantize_config.json"} <= {
        p.name for p in quantized_dir.iterdir()
    }


def test_inspect(quantized_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized_dir)]) == 0
    shown = capsys.readouterr().out
    assert "gptq" in shown
    assert "model.layers.1.mlp.down_proj" in shown
    assert main(["inspect", str(quantized_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_pack_converts_without_loss(quantized_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [("native", ["--format", "native"]), ("packed", []), ("cpu_tile_a16", ["--layout", "cpu_tile_a16"])]
    for name, arguments in [*steps, ("gptq", ["--format", "gptq"])]:
        source = quantized_dir if name == "native" else tmp_path / "native"
        assert main(["pack", str(source), str(tmp_path / name), *arguments]) == 0
        assert f"wrote {tmp_path / name}" in capsys.readouterr().out
        assert main(["inspect", str(tmp_path / name), "--json"]) == 0
        assert ("cpu_tile_a16" if name == "packed" else name) in capsys.readouterr().out
    there_and_back = (tmp_path / "gptq" / "model.safetensors").read_bytes()
    assert there_and_back == (quantized_dir / "model.safetensors").read_bytes()


def test_eval_prints_perplexity_and_divergence(
    quantized_dir: Path, tiny_llama_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "eval",
        str(quantized_dir),
        "--text",
        str(text_file),
        "--against",
        str(tiny_llama_dir),
        "--seq-len",
        "32",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "windows of 32 tokens without overlap" in shown
    assert "KL(original ‖ model)" in shown
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert 0 < values["kl"] < 0.1
    assert values["perplexity"] > 1


def test_generate_is_deterministic(quantized_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(quantized_dir), "--prompt", "the cat", "--tokens", "5"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert first.out.startswith("the cat")
    assert "tokens/s" in first.err
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out


def test_doctor_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "everything is well" in shown
    assert "cpu.cpu_tile_a16" in shown
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True


def test_doctor_names_a_missing_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = extension.ExtensionStatus(
        path=None, loaded=False, error="no library beside the package", isa=None, isas=(), cuda=False
    )
    monkeypatch.setattr(extension, "status", lambda: broken)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "BAD  extension    not loaded: no library beside the package" in shown
    assert "pip install . --no-build-isolation" in shown


@pytest.mark.parametrize("name", [command.NAME for command in COMMANDS])
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args([name, "--help"])
    assert stopped.value.code == 0
    assert f"qkernels {name}" in capsys.readouterr().out.split("examples:")[1]


def test_dry_run_writes_nothing(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(tiny_llama_dir), str(out), "--method", "gptq", "--group-size", "32", "--dry-run"]) == 0
    assert "model.layers.0.self_attn.q_proj" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "scheme"),
    [
        (["--method", "hqq", "--bits", "3", "--group-size", "32"], "w3a16_g32_fzero"),
        (["--method", "nf4"], "nf4_g64"),
        (["--method", "smoothquant"], '"w8a8_channel"'),
        (["--method", "smoothquant", "--asym"], '"w8a8_channel_asym"'),
        (["--method", "rtn", "--asym", "--override", "*=w4a8_g32_asym"], '"w4a8_g32_asym"'),
        (["--method", "rtn", "--bits", "8", "--group-size", "channel"], "w8a16_channel"),
        *((["--method", "rtn", "--bits", str(bits), "--group-size", "32"], f"w{bits}a16_g32") for bits in (5, 6, 7)),
        *(
            (["--method", "rtn", "--scheme", scheme], f'"{scheme}"')
            for scheme in ("w4a16_g32_offset", "w6a8_channel_asym")
        ),
        (["--method", "hqq", "--scheme", "w2a16_g16_fzero"], '"w2a16_g16_fzero"'),
        (["--method", "nf4", "--scheme", "fp4_g32"], '"fp4_g32"'),
    ],
)
def test_methods_write_their_scheme(
    arguments: list[str], scheme: str, tiny_llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    text = ["--calibration", str(text_file), "--seq-len", "32", "--samples", "4"] if "smoothquant" in arguments else []
    assert main(["quantize", str(tiny_llama_dir), str(tmp_path / "out"), *arguments, *text]) == 0
    assert scheme in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantize", "{tiny}", "{tmp}/out", "--method", "hqq", "--asym"],
            "--asym gives rtn, gptq, awq and smoothquant integer",
        ),
        (
            ["quantize", "{tiny}", "{tmp}/out", "--method", "awq", "--act-order", "group"],
            "--act-order is an option of gptq",
        ),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "rtn", "--scales", "awq"], "--scales is an option of gptq"),
        (["inspect", "{tmp}/nowhere"], "nowhere does not exist; a checkpoint is"),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "gptq"], "needs calibration: .* \\(--calibration FILE\\)"),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "gptq", "--calibration", "{tmp}/absent.txt"], "absent.txt"),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "gptq", "--calibration", "{empty}"], "is empty"),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "gptq", "--calibration", "{short}"], "calibration"),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "rtn", "--format", "gguf"], "format must be one of"),
        (
            ["quantize", "{tiny}", "{tmp}/out", "--method", "rtn", "--include", "*.nothing"],
            "pattern '\\*.nothing' matches no",
        ),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "rtn", "--override", "*.q_proj=int4"], "a scheme looks like"),
        (["quantize", "{tiny}", "{tiny}", "--method", "rtn"], "holds .*, which is read to write it, and is kept"),
        (["quantize", "{tiny}", "{tiny}", "--method", "rtn", "--overwrite"], "which is read to write it, and is kept"),
        (
            ["quantize", "{tiny}", "{tmp}/out", "--method", "rtn", "--scheme", "w4a16_g32", "--bits", "4"],
            "leave out --bits",
        ),
        (["quantize", "{tiny}", "{tmp}/out", "--method", "nf4", "--scheme", "w4a16_g32"], "NF4 needs a codebook"),
        (
            ["pack", "{tiny}", "{tmp}/out", "--layout", "reference"],
            "--layout must be auto, .* got 'reference'; .*--format native",
        ),
        (["pack", "{tiny}", "{tmp}/out", "--layout", "nope"], "--layout must be auto, (?!.*reference).* got 'nope'"),
        (["eval", "{tiny}", "--text", "{short}", "--seq-len", "32"], "less than one window"),
        (["pack", "{tiny}", "{tmp}/out"], "quantized"),
        (["generate", "{tmp}/nowhere", "--prompt", "x"], "nowhere does not exist; a checkpoint is"),
        (["generate", "{tiny}", "--prompt", ""], "--prompt must have at least one token, got ''"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the cat")
    places = {"tmp": tmp_path, "tiny": tiny_llama_dir, "empty": tmp_path / "empty.txt", "short": tmp_path / "short.txt"}
    assert main([a.format(**places) for a in arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"qkernels {arguments[0]}: error: ")
    assert re.search(message, shown), shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize"], "required: model, out"),
        (["nonsense"], "invalid choice"),
        (["quantize", "a", "b", "--bits", "9"], "invalid choice"),
        (
            ["generate", "a", "--prompt", "b", "--seed", "99999999999999999999"],
            "expected an integer of -2\\^63 … 2\\^64 - 1",
        ),
        (["generate", "a", "--prompt", "b", "--seed", "1e3"], "expected an integer of .*, got '1e3'"),
        (
            ["generate", "a", "--prompt", "b", "--tokens", "9" * 5000],
            "expected a positive integer below 2\\^31, got '9999",
        ),
        (["quantize", "a", "b", "--group-size", "99999999999"], "expected a positive integer below 2\\^31"),
        (["quantize", "a", "b", "--override", "x"], "expected PATTERN=SCHEME"),
        (["quantize", "a", "b", "--device", "gpu"], "expected a device such as cpu or cuda:0, got 'gpu'"),
        (["pack", "a", "b", "--device", "gpu"], "expected a device such as cpu or cuda:0, got 'gpu'"),
        (["eval", "a", "--text", "b", "--device", "mps"], "kernels run on cpu and cuda, got 'mps'"),
        (["bench", "--device", "cuda:99"], "GPUs?, got 'cuda:99': see qkernels doctor"),
        (["generate", "a", "--prompt", "b", "--tokens", "0"], "expected a positive integer"),
        (["generate", "a", "--prompt", "b", "--temperature", "-1"], "expected a number of at least 0, got '-1'"),
        (["generate", "a", "--prompt", "b", "--temperature", "nan"], "expected a number of at least 0, got 'nan'"),
        (["generate", "a", "--prompt", "b", "--temperature", "hot"], "expected a number of at least 0, got 'hot'"),
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_package_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "qkernels", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qkernels {__version__}\n"


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda path: None, "does not exist; name a file with UTF-8 text"),
        (Path.mkdir, "is a folder; name a file with UTF-8 text"),
        (lambda path: path.write_bytes(b"\xff"), "must be UTF-8 text: invalid start byte at byte 0"),
        (lambda path: path.write_bytes(b" \n"), "is empty; give a file with some text"),
    ],
)
def test_a_text_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], object], wanted: str) -> None:
    path = tmp_path / "text"
    make(path)
    with pytest.raises(ArgumentError) as caught:
        read_text(str(path))
    assert str(caught.value) == f"{path} {wanted}"


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["doctor", "--help"]])
def test_help_is_printed_before_torch_is_imported(arguments: list[str]) -> None:
    code = f"import sys, qkernels.cli.main as m\ntry: m.main({arguments})\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: qkernels")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The same text, whether commands are known in full or by name."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown == parser().format_help()
    assert all(command.SUMMARY in " ".join(shown.split()) for command in COMMANDS)


def test_help_is_quick() -> None:
    """Under 0.3 s of processor time, the least of five."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "qkernels", "--help"], capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < 0.3
