"""lm-eval with our checkpoints: without a network, and with the numbers that the model itself says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.quality import harness
from qkernels import load, load_tokenizer, replace_linear, save
from qkernels.errors import ArgumentError, CheckpointError

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo_model"


def test_questions_are_checked_first(tmp_path: Path) -> None:
    good = {"question": "The sea is", "choices": ["wet", "dry"], "answer": 0}
    (tmp_path / "good.jsonl").write_text(json.dumps(good))
    harness.check_questions(tmp_path / "good.jsonl")
    for bad in ("{}", "no json", json.dumps(good | {"answer": 7}), json.dumps(good | {"choices": 3})):
        (tmp_path / "bad.jsonl").write_text(json.dumps(good) + "\n" + bad)
        with pytest.raises(CheckpointError, match="line 2: expected"):
            harness.check_questions(tmp_path / "bad.jsonl")


def test_it_says_what_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    model = load(DEMO, dtype="float32")
    replace_linear(model, "w4a16_g128")
    save(model, tmp_path / "native")
    load_tokenizer(DEMO).save_pretrained(tmp_path / "native")
    page = (DEMO / "eval.txt").read_text()[:600].replace("\n\n", " ").strip()
    (tmp_path / "text.txt").write_text(page)
    question = {"question": "The king of", "choices": ["Israel", "qqqq xx"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    found = harness.evaluate(
        str(tmp_path / "native"), tmp_path / "text.txt", tmp_path / "questions.jsonl", dtype="float32"
    )
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer(page, add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        logs = load(tmp_path / "native", dtype="float32")(rows).logits.log_softmax(-1)[0, :-1]
    said = float(logs[torch.arange(len(ids)), ids].double().sum())
    assert found[harness.TEXT]["bits_per_byte"] == pytest.approx(-said / len(page.encode()) / math.log(2), rel=1e-5)
    assert found[harness.QUESTIONS]["acc"] == 1.0
    with pytest.raises(ArgumentError, match="give --text"):
        harness.evaluate(str(tmp_path / "native"))
