"""The report beside a checkpoint, the room a run needs, and what `inspect` says of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qkernels import GPTQ, RTN, __version__, inspect, load
from qkernels.calibrate import preview
from qkernels.checkpoint import CheckpointWriter, convert
from qkernels.cli.main import main
from qkernels.errors import ArgumentError, CheckpointError
from qkernels.evaluate import compare, perplexity
from tests.tiny_models import loud_model, run, token_windows

TEXT = token_windows(4, 16, seed=5).flatten()


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


@pytest.fixture
def source(tmp_path: Path) -> Path:
    loud_model().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_directorys_report_has_what_eval_says(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(source, GPTQ(4, 16), save_to=out, evaluation=TEXT)
    model, original = (load(path, on_unsupported="reference") for path in (out, source))
    written = json.loads((out / "qkernels_report.json").read_text())
    assert written["perplexity"] == perplexity(model, TEXT, 16).to_json() == report.perplexity
    assert written["comparison"] == compare(model, original, TEXT, 16).to_json() == report.comparison
    assert (
        0 < written["comparison"]["kl"] < 1 and "consecutive windows of 16 tokens" in written["perplexity"]["protocol"]
    )
    assert len(written["modules"]) == 14 and all(0 < module["error"] < 1 for module in written["modules"])
    assert written["versions"].keys() == {"qkernels", "torch", "python", "transformers", "device"}
    assert written["seconds"] > 0 and "act_order" in written["options"]
    text = (out / "qkernels_report.md").read_text()
    assert "KL" in text and "| model.layers.1.mlp.down_proj" in text and "- protocol: 4 consecutive windows" in text
    assert f"top-1 agreement {written['comparison']['top1_agreement']:.2%}" in (inspect(out).quality or "")
    assert "| quality" in inspect(out).to_markdown()


def test_a_report_goes_with_its_weights(source: Path, tmp_path: Path) -> None:
    """From format to format, and into a layout; each step says so."""
    run(source, RTN(4, 16), save_to=tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "gptq", "gptq")
    assert main(["pack", str(tmp_path / "gptq"), str(tmp_path / "packed"), "--format", "native"]) == 0
    first, last = (json.loads((tmp_path / name / "qkernels_report.json").read_text()) for name in ("out", "packed"))
    assert last.pop("rewritten") == [{"format": name, "qkernels": __version__} for name in ("gptq", "native")]
    assert last == first
    assert inspect(tmp_path / "packed").quality == inspect(tmp_path / "out").quality
    text = (tmp_path / "packed" / "qkernels_report.md").read_text()
    assert text.startswith((tmp_path / "out" / "qkernels_report.md").read_text())
    assert [line.split(" by ")[0] for line in text.splitlines()[-2:]] == [
        "- rewritten as gptq",
        "- rewritten as native",
    ]


def test_a_report_that_is_none_is_refused(source: Path, tmp_path: Path) -> None:
    run(source, RTN(4, 16), save_to=tmp_path / "out")
    for text, message in (("[]", "report.json"), ('{"rewritten": 3}', "needs rewritten to be a list, got 3")):
        (tmp_path / "out" / "qkernels_report.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "out", tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq").exists()


def test_a_model_in_memory_is_compared_with_what_it_was(tmp_path: Path) -> None:
    model, original = loud_model(), loud_model()
    report = run(model, GPTQ(4, 16), save_to=tmp_path / "out", evaluation=TEXT)
    assert report.comparison == compare(model, original, TEXT, 16).to_json()
    assert json.loads((tmp_path / "out" / "qkernels_report.json").read_text())["comparison"] == report.comparison


def test_without_a_text_the_report_says_so(source: Path, tmp_path: Path) -> None:
    run(source, RTN(4, 16), save_to=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "qkernels_report.json").read_text())
    assert written["perplexity"] is None and written["comparison"] is None
    assert "not evaluated: no evaluation text was given" in written["quality"]
    assert "not evaluated: no evaluation text was given" in (tmp_path / "out" / "qkernels_report.md").read_text()
    assert inspect(source).quality is None


@pytest.mark.parametrize("quality", [None, 3, "two\nlines", "x" * 501, "\x1b[31mred"])
def test_a_report_that_is_not_ours(quality: Any, source: Path) -> None:
    (source / "qkernels_report.json").write_text(json.dumps({"quality": quality}))
    with pytest.raises(CheckpointError, match=r"qkernels_report\.json needs quality to be one line of text"):
        inspect(source)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (["text"], "need a tokenizer"),
        ("text", "must be a list of texts or token ids"),
        (["text", 3], "must be a list of texts or token ids"),
        (torch.zeros(2, 2, dtype=torch.long), r"integer tensor \[tokens\]"),
        (torch.zeros(1, dtype=torch.long), "less than one window"),
    ],
)
def test_evaluation_that_cannot_be_used(evaluation: Any, message: str) -> None:
    model = loud_model()
    tokenizer = (
        {"tokenizer": None} if evaluation == ["text"] else {"tokenizer": lambda text, **_: {"input_ids": [1, 2]}}
    )
    with pytest.raises(ArgumentError, match=message):
        run(model, RTN(4, 16), evaluation=evaluation, **tokenizer)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)


@pytest.mark.parametrize("method", [RTN(4, 16), GPTQ(4, 16)])
def test_a_full_disk_is_an_error_before_the_work_begins(
    method: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = preview(source, method, samples=24, seq_len=16)
    needed = planned.disk_bytes
    sizes: list[int] = []
    original = CheckpointWriter.close

    def measuring(writer: CheckpointWriter) -> None:
        """The last to be closed is that of the result, while every finished layer is still there."""
        original(writer)
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob(".out.*/**/*") if file.is_file()))

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "close", measuring)
        patch.setattr(shutil, "disk_usage", lambda path: Usage(needed, 0, needed))
        run(source, method, save_to=tmp_path / "out")
    assert planned.bytes_after < max(sizes) == sizes[-1] <= needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed, 1, needed - 1))
    with pytest.raises(CheckpointError, match=r"other needs \d+ MiB of disk while it is made .*, and \d+ MiB are free"):
        run(source, method, save_to=tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))
    arguments = [
        "quantize",
        str(source),
        str(tmp_path / "other"),
        "--method",
        method.name,
        "--group-size",
        "16",
        "--dry-run",
    ]
    assert main([*arguments, "--samples", "24", "--seq-len", "16"]) != 0
    said = capsys.readouterr()
    assert "- disk: " in said.out and "- memory: " in said.out and "MiB are free" in said.err
