"""Prompts in, text out: streams, batches, stops, chats."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qkernels import load, load_tokenizer
from qkernels.cli.main import main
from qkernels.errors import ArgumentError
from qkernels.generating import answer, prompt_ids, with_room
from qkernels.generating.sampling import Stream, held_back

DEMO = Path(__file__).parent.parent.parent / "examples" / "demo_model"
PROMPTS = ["It was a dark night", "The king", "He said that the house was"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load(DEMO, dtype="float32"), load_tokenizer(DEMO)


def test_a_stream_says_what_the_whole_answer_is(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    pieces: list[str] = []
    found = answer(model, tokenizer, prompt_ids(tokenizer, PROMPTS[:1]), 24, emit=pieces.append, do_sample=False)
    expected = model.generate(**tokenizer(PROMPTS[:1], return_tensors="pt"), max_new_tokens=24, do_sample=False)
    assert "".join(pieces) == found.texts[0]
    assert PROMPTS[0] + found.texts[0] == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert len(pieces) > 10 and found.tokens == 24
    assert f"; 24 tokens in {found.seconds:.2f} s" in found.rates()


def test_a_batch_answers_as_each_prompt_alone(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    ids = prompt_ids(tokenizer, PROMPTS)
    assert len(set(map(len, ids))) > 1  # so that some are padded
    together = answer(model, tokenizer, ids, 16, do_sample=False)
    alone = [answer(model, tokenizer, [row], 16, do_sample=False) for row in ids]
    assert together.ids == tuple(one.ids[0] for one in alone)
    assert together.prompt_tokens == sum(map(len, ids))


def test_stops_are_not_said(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    ids = prompt_ids(tokenizer, PROMPTS[:1])
    whole = answer(model, tokenizer, ids, 24, do_sample=False).texts[0]
    stop = whole[12:17]
    pieces: list[str] = []
    found = answer(model, tokenizer, ids, 24, [stop, "never said"], emit=pieces.append, do_sample=False)
    assert "".join(pieces) == found.texts[0] == whole[: whole.index(stop)]
    assert found.tokens < 24
    with pytest.raises(ArgumentError, match="--stop must not be empty"):
        answer(model, tokenizer, ids, 4, [""], do_sample=False)
    with pytest.raises(ArgumentError, match="one prompt is streamed, got 2"):
        answer(model, tokenizer, [*ids, *ids], 4, emit=pieces.append)


def test_parts_of_characters_and_of_stops_wait() -> None:
    class Bytes:
        """A token a byte."""

        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    pieces: list[str] = []
    stream = Stream(Bytes(), ["\nUser:"], pieces.append)
    for token in "é is a letter\nUs and\nUser: no".encode():
        stream.token(token)
    stream.end()
    assert "".join(pieces) == "é is a letter\nUs and" and pieces[0] == "é"
    assert all("�" not in piece for piece in pieces)
    assert held_back("abc", ["cd", "bcd"]) == 2


def test_chats_take_the_template(demo: tuple[Any, Any]) -> None:
    _, tokenizer = demo
    with pytest.raises(ArgumentError, match="--chat needs a chat template"):
        prompt_ids(tokenizer, ["hello"], chat=True)
    talking = load_tokenizer(DEMO)
    talking.chat_template = TEMPLATE
    said = talking.decode(prompt_ids(talking, ["hello"], chat=True, system="be brief")[0])
    assert said == "<system>be brief<user>hello<answer>"
    talking.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ArgumentError, match="does not take this prompt: no system here"):
        prompt_ids(talking, ["hello"], chat=True)
    with pytest.raises(ArgumentError, match="add --chat"):
        prompt_ids(tokenizer, ["hello"], system="be brief")


# --- the command -------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["generate", str(DEMO), *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_prompts_by_option_file_and_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("The king\n")
    _, by_option, _ = run(capsys, "--prompt", "The king", "--tokens", "6")
    _, by_file, _ = run(capsys, "--file", str(tmp_path / "prompt.txt"), "--tokens", "6")
    monkeypatch.setattr("sys.stdin", io.StringIO("The king\n"))
    _, by_input, shown = run(capsys, "--tokens", "6")
    assert by_option == by_file == by_input and by_option.startswith("The king ")
    assert "tokens/s" in shown
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert run(capsys)[0] == 1
    _, both, _ = run(capsys, "--prompt", "The king", "--prompt", "It was", "--tokens", "6")
    assert both.startswith("--- 1 of 2\n" + by_option.rstrip("\n") + "\n--- 2 of 2\nIt was")


def test_sampling_is_what_was_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    kept = torch.manual_seed

    def seen(*arguments: Any, **others: Any) -> Any:
        given.update(others)
        return answer(*arguments, **others)

    monkeypatch.setattr("qkernels.generating.answer", seen)
    options = [
        "--temperature",
        "0.7",
        "--top-p",
        "0.9",
        "--top-k",
        "20",
        "--min-p",
        "0.05",
        "--repetition-penalty",
        "1.2",
    ]
    assert run(capsys, "--prompt", "It was", "--tokens", "4", *options, "--seed", "3")[0] == 0
    wanted = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
    }
    assert {name: given[name] for name in wanted} == wanted
    assert torch.manual_seed is kept
    for arguments, why in (
        (["--top-p", "0.5"], "--top-p chooses what to sample from"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
        (["--system", "x"], "add --chat"),
        (["--gpu-layers", "2"], "2 layers are to be on a GPU"),
    ):
        if "--gpu-layers" in arguments and torch.cuda.is_available():
            continue
        code, _, error = run(capsys, "--prompt", "It was", *arguments)
        assert code == 1 and why in error
    with pytest.raises(SystemExit):
        run(capsys, "--prompt", "It was", "--top-p", "1.5")
    with pytest.raises(SystemExit):  # before any weight is read
        run(capsys, "--prompt", "It was", "--stop", "")


def test_no_more_than_there_are_positions(
    demo: tuple[Any, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond them some models end in an index error, and others in words without sense."""
    model, tokenizer = demo
    ids = prompt_ids(tokenizer, ["the " * 1020])
    long, room = len(ids[0]), 1024 - len(ids[0])
    assert 0 < room < 8
    found = answer(model, tokenizer, ids, 60, do_sample=False)
    assert found.tokens == room
    assert f"{room} new tokens at most, not 60: with the prompt they make up the 1024" in caplog.text
    caplog.clear()
    assert with_room(model, ids, room) == room and not caplog.text
    with pytest.raises(ArgumentError, match=f"a prompt of {long + room} tokens leaves no room in the 1024"):
        with_room(model, [[1], ids[0] + ids[0][:room]], 1)
    code, said, error = run(capsys, "--prompt", "the " * 1030)
    assert code == 1 and not said and "leaves no room" in error
    short = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    with pytest.raises(ArgumentError, match="a prompt of 16 tokens leaves no room"):
        answer(short, tokenizer, [[1] * 16], 1)
    assert answer(short, tokenizer, [[1] * 12], 60, min_new_tokens=4, do_sample=False).tokens == 4


def test_device_auto_is_the_cpu_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert (
        run(capsys, "--prompt", "It was", "--tokens", "4", "--device", "auto")[:2]
        == run(capsys, "--prompt", "It was", "--tokens", "4")[:2]
    )


# --- side by side ------------------------------------------------------------------------------------------------------


def test_answers_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkernels import replace_linear, save
    from qkernels.generating import sidebyside

    model = load(DEMO)
    replace_linear(model, "w2a16_g128")
    save(model, tmp_path / "two")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("It was a dark night\n\nThe king\n")
    command = ["eval", str(tmp_path / "two"), "--prompts", str(prompts), "--tokens", "12"]
    assert main([*command, "--against", str(DEMO)]) == 0
    shown = capsys.readouterr().out
    assert "differs from token" in shown and "answers are garbled" in shown and "w2a16_g128 (28)" in shown
    assert "cpu_tile_a16 (28)" in shown and "model.embed_tokens.weight bfloat16 2.00 MiB" in shown
    rates = iter((110.0, 100.0, 111.0, 100.0))  # not the clock's, which other work on the machine may turn round
    monkeypatch.setattr(sidebyside, "_rate", lambda answers: next(rates))
    itself = ["eval", str(DEMO), "--prompts", str(prompts), "--tokens", "8", "--against", str(DEMO)]
    assert main(itself) == 0
    shown = capsys.readouterr().out
    assert "match rate 100.0%" in shown and "the same" in shown and "little or no memory saved" in shown
    assert "no speed-up" in shown and "stay close to the original" in shown
    assert main(itself) == 0
    assert "no speed-up" not in (shown := capsys.readouterr().out) and "111.0 tokens/s, the original 100.0" in shown
    assert main(command) == 1
    assert "add --against REFERENCE" in capsys.readouterr().err
    assert main(["eval", str(DEMO)]) == 1
    assert "give --text FILE, --prompts FILE" in capsys.readouterr().err
