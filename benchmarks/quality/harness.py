"""lm-eval (EleutherAI's harness) with a checkpoint of any format that `qkernels.load` reads, also without a network.

pip install lm-eval
HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 python -m benchmarks.quality.harness out/ --text held-out.txt
HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 python -m benchmarks.quality.harness out/ --questions questions.jsonl
python -m benchmarks.quality.harness out/ --tasks hellaswag --limit 100          # the harness fetches these
lm_eval --model local-completions --model_args model=out/,base_url=http://127.0.0.1:8000/v1/completions …  # vLLM with our plug-in

The harness's own `--model hf --model_args pretrained=out/` does not know our formats; it takes a loaded model. Written for
lm-eval 0.4.13. Questions are lines of JSON: {"question": …, "choices": [ … ], "answer": 0}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from qkernels import load, load_tokenizer
from qkernels.errors import ArgumentError, CheckpointError
from qkernels.text import table

TEXT, QUESTIONS = "text_here", "questions_here"


def task_of_text(file: Path) -> dict[str, Any]:
    """Likelihood of a text that lies here: word and byte perplexity, bits a byte. `file`: lines of JSON with a "page" each."""
    return {
        "task": TEXT,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }


def task_of_questions(file: Path) -> dict[str, Any]:
    """Multiple choice from a file that lies here."""
    return {
        "task": QUESTIONS,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def check_questions(file: Path) -> None:
    """Raise for a line that is no question.

    Raises:
        CheckpointError: names the line.
    """
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            sound = isinstance(found["question"], str) and found["choices"][found["answer"]] is not None
        except (ValueError, KeyError, TypeError, IndexError):
            sound = False
        if not sound:
            raise CheckpointError(
                f'{file}, line {number}: expected {{"question", "choices", "answer"}}, got {line:.80}'
            )


def evaluate(
    checkpoint: str,
    text: Path | None = None,
    questions: Path | None = None,
    tasks: tuple[str, ...] = (),
    limit: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch: int = 1,
) -> dict[str, dict[str, float]]:
    """The harness's results by task.

    Args:
        text: UTF-8; each paragraph is a document of its own.
        questions: see above.
        tasks: names of the harness's own, which it fetches.

    Raises:
        ArgumentError: there is nothing to evaluate on.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if text is None and questions is None and not tasks:
        raise ArgumentError("give --text FILE, --questions FILE, or --tasks NAME")
    with tempfile.TemporaryDirectory(prefix="qkernels-harness-") as scratch:
        chosen: list[Any] = list(tasks)
        if text is not None:
            pages = [page for page in text.read_text(encoding="utf-8").split("\n\n") if page.strip()]
            file = Path(scratch) / "text.jsonl"
            file.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
            chosen.append(task_of_text(file))
        if questions is not None:
            check_questions(questions)
            chosen.append(task_of_questions(questions.resolve()))
        model = load(checkpoint, device=device, dtype=dtype)
        runner = HFLM(pretrained=model, tokenizer=load_tokenizer(checkpoint), batch_size=batch)
        found: Any = lm_eval.simple_evaluate(model=runner, tasks=chosen, limit=limit, bootstrap_iters=0)
    return {
        task: {name.partition(",")[0]: float(v) for name, v in values.items() if isinstance(v, (int, float))}
        for task, values in found["results"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, help="UTF-8 text that lies here")
    parser.add_argument("--questions", type=Path, help="lines of JSON that lie here")
    parser.add_argument("--tasks", nargs="*", default=[], help="the harness's own")
    parser.add_argument("--limit", type=int, help="documents of each task, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    found = evaluate(a.checkpoint, a.text, a.questions, tuple(a.tasks), a.limit, a.device, a.dtype, a.batch)
    if a.json:
        print(json.dumps(found, indent=2))
        return
    rows = [[task, name, f"{value:.5f}"] for task, values in found.items() for name, value in values.items()]
    print(table(["task", "metric", "value"], rows))


if __name__ == "__main__":
    main()
