"""The house rules of `import`: arrows run one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qkernels"

# A room may import from rooms that stand above it in this list, and from itself.
STOREYS = (
    ("errors", "markdown", "_version"),
    ("extension", "machine", "scheme", "storage"),
    ("models", "reports", "tensor", "texts"),
    ("formats", "layouts", "quantizers"),
    ("ops",),
    ("kernels",),
    ("nn",),
    ("checkpoint", "evaluate"),
    ("layerwise",),
    ("calibrate", "engines"),
    ("inspection",),
    ("integrations",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}


def imports_of(source: str, module: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Modules of this package that a source imports, as paths below `qkernels`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module[: len(module) - node.level]
            stem = tuple(node.module.split(".")) if node.module else ()
            found += [(*base, *stem, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qkernels":
            found.append(tuple((node.module or "").split(".")[1:]))
        elif isinstance(node, ast.Import):
            found += [tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "qkernels"]
    return [path for path in found if path]


def violations(source: str, module: tuple[str, ...]) -> list[str]:
    """Imports against the arrows, for a module given as its path below `qkernels` (without `__init__`)."""
    own = module[0]
    wrong = []
    for target in imports_of(source, module):
        room = target[0]
        if room not in LEVEL:  # a plain name of qkernels/__init__.py, such as __version__
            continue
        sideways = LEVEL[room] == LEVEL[own] and room != own
        if LEVEL[room] > LEVEL[own] or sideways:
            wrong.append(f"{'.'.join(module)} imports {'.'.join(target)}")
    return wrong


def modules() -> list[tuple[str, ...]]:
    paths = [p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py")]
    return [p.parts for p in paths if p.parts != ("__init__",)]


@pytest.mark.parametrize("module", modules(), ids=".".join)
def test_arrows(module: tuple[str, ...]) -> None:
    source = PACKAGE.joinpath(*module).with_suffix(".py").read_text()
    assert not violations(source, module)


def test_every_room_has_a_storey() -> None:
    assert {module[0] for module in modules()} <= LEVEL.keys()


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from ..layouts import get_layout", ("formats", "gptq")),
        ("from ..kernels import catalogue", ("quantizers", "rtn")),
        ("from .formats import detect", ("tensor",)),
        ("import qkernels.nn", ("ops", "schema")),
        ("from qkernels.cli import main", ("nn", "linear")),
    ],
)
def test_a_wrong_arrow_is_found(source: str, module: tuple[str, ...]) -> None:
    assert violations(source, module)


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_is_silent_and_lean() -> None:
    heavy = "('triton', 'transformers', 'matplotlib', 'tokenizers')"
    assert _python(f"import sys, qkernels; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_import_touches_no_gpu() -> None:
    assert _python("import qkernels, torch; print(torch.cuda.is_initialized())") == "False"


def test_import_is_fast() -> None:
    """Under 0.2 s on top of torch; processor time, because wall time says more about what else the machine does."""
    code = "import torch, time; t = time.process_time(); import qkernels; print(time.process_time() - t)"
    assert min(float(_python(code)) for _ in range(5)) < 0.2
