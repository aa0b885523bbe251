"""The arrows of benchmarks/ and tools/: houses stand on each other one way, and neither imports tests. The first minutes on a
GPU (tools/first_light) stand above both: they run the benchmarks' peers as baselines, and nothing imports them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# What each house may import beside itself and the package. Files of benchmarks/ itself (the full set) may import every house.
HOUSES: dict[str, set[str]] = {
    "peers": set(),
    "method": {"peers"},
    "kernels": {"method", "peers"},
    "models": {"kernels", "method", "peers"},
    "quality": {"method"},
}


def modules(tree: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / tree).rglob("*.py"))


def imports_of(source: str, path: Path) -> list[tuple[str, ...]]:
    """What a file imports, as parts of absolute names; `path` from the root of the tree."""
    package, found = path.parent.parts, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) + 1 - node.level],) if node.level else ()
            stem = (*base, *(node.module.split(".") if node.module else ()))
            found += [(*stem, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
    return found


def violations(source: str, path: Path) -> list[str]:
    wrong = []
    for target in imports_of(source, path):
        first_light = path.parts[:2] == ("tools", "first_light")
        low = path.parts[0] == "tools" and target[0] == "benchmarks" and not first_light
        if target[0] == "tests" or low or (target[:2] == ("tools", "first_light") and not first_light):
            wrong.append(f"{path} imports {'.'.join(target)}")
        if path.parts[0] == target[0] == "benchmarks" and len(path.parts) > 2:
            house = path.parts[1]
            if target[1] != house and target[1] not in HOUSES[house]:
                wrong.append(f"{path} imports {'.'.join(target)}")
    return wrong


@pytest.mark.parametrize("path", [*modules("benchmarks"), *modules("tools")], ids=str)
def test_arrows(path: Path) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def test_every_house_has_its_arrows() -> None:
    assert {path.parts[1] for path in modules("benchmarks") if len(path.parts) > 2} == HOUSES.keys()
    assert {path.name for path in modules("benchmarks") if len(path.parts) == 2} == {"__init__.py", "__main__.py"}


def test_the_package_imports_neither_but_for_the_command_that_names_the_suite() -> None:
    for path in modules("qkernels"):
        targets = imports_of((ROOT / path).read_text(encoding="utf-8"), path)
        assert not {target[0] for target in targets} & {"benchmarks", "tools", "tests"}, path


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from tests.cuda import units", "benchmarks/kernels/tune.py"),
        ("def f():\n    import tests.strategies", "tools/guard.py"),
        ("from benchmarks.kernels import shapes", "tools/guard.py"),
        ("from ..kernels import sweep", "benchmarks/method/timing.py"),
        ("from ..models.llama import Llama", "benchmarks/kernels/sweep.py"),
        ("from ..kernels.shapes import find_layer", "benchmarks/quality/runnable.py"),
        ("from ...kernels.shapes import find_layer", "benchmarks/quality/peers/job.py"),
        ("from ..method.timing import Clock", "benchmarks/peers/ggml.py"),
        ("import benchmarks.models.llama", "benchmarks/method/plots.py"),
        ("from .. import quality", "benchmarks/models/sweep.py"),
        ("from tools.first_light import runner", "tools/guard.py"),
        ("import tests.cuda", "tools/first_light/baselines.py"),
    ],
)
def test_a_wrong_arrow_is_found(source: str, path: str) -> None:
    assert violations(source, Path(path))
