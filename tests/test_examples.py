"""Every public name has an example in its docstring, and the examples of docs/using.md and of docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shutil
from pathlib import Path

import pytest

import qkernels

pytest.importorskip("transformers")
USING = Path(__file__).parent.parent / "docs" / "using.md"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def examples_of(thing: object) -> doctest.DocTest:
    """Of the docstring of a class or function itself, not of what it inherits from. Names have to be imported in it."""
    return doctest.DocTestParser().get_doctest(inspect.cleandoc(thing.__doc__ or ""), {}, repr(thing), None, None)


def all_examples() -> dict[str, doctest.DocTest]:
    """By name: those of all docstrings of the package that have some."""
    root = Path(qkernels.__path__[0])
    paths = [path.relative_to(root.parent) for path in root.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    modules = [importlib.import_module(".".join(path.with_suffix("").parts)) for path in sorted(paths)]
    finder = doctest.DocTestFinder()
    return {found.name: found for module in modules for found in finder.find(module, globs={}) if found.examples}


def complaints(examples: doctest.DocTest) -> str:
    """What differs from the output that the docstring shows; empty: nothing."""
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    return "".join(said)


EXAMPLES = all_examples()


@pytest.mark.parametrize("name", qkernels.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    thing = getattr(qkernels, name)
    shown = EXAMPLES[f"{thing.__module__}.{name}"].examples
    assert [e.source for e in shown] == [e.source for e in examples_of(thing).examples]
    assert re.search(rf"\b{name}\b", "".join(example.source for example in shown)), "no example shows it"
    assert any(example.want for example in shown), "no output is shown"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    assert complaints(EXAMPLES[name]) == ""


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_the_page_for_users_runs(tiny_llama_dir: Path, sample_text: str) -> None:
    """Its blocks one after another, in a folder with what the page says is there."""
    pytest.importorskip("peft")
    shutil.copytree(tiny_llama_dir, "my-llama")
    Path("text.txt").write_text(sample_text)
    w8a8 = qkernels.RTN().with_scheme("w8a8w_channel")
    qkernels.quantize("my-llama", w8a8, save_to="w8a8", format="compressed-tensors", progress=False)
    blocks = re.findall(r"```python\n(.*?)```", USING.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, object] = {"__name__": "using"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/using.md, block {number}", "exec"), names)


def test_a_wrong_example_is_noticed() -> None:
    """Negative controls: another output, an error, and no example at all."""

    def wrong() -> None:
        """
        >>> 1 + 1
        3
        >>> unknown
        """

    said = complaints(examples_of(wrong))
    assert "Expected:\n    3\nGot:\n    2" in said and "NameError" in said
    assert not examples_of(complaints).examples
