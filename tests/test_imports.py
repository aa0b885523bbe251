"""The house rules of `import`: arrows run one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qkernels

PACKAGE = Path(__file__).parent.parent / "qkernels"

# A room may import from rooms that stand above it in this list, and from itself.
STOREYS = (
    ("errors", "text", "_version"),
    ("codebooks",),
    ("extension", "machine", "memory", "optional", "scheme", "storage"),
    ("factors", "group_index", "hub", "models", "reports"),
    ("tensor",),
    ("formats", "layouts", "quantizers", "texts"),
    ("ops",),
    ("kernels",),
    ("nn",),
    ("checkpoint", "evaluate"),
    ("generating", "layerwise"),
    ("calibrate", "engines", "sizing"),
    ("calibrate_gguf",),
    ("inspection", "planning"),
    ("integrations",),
    ("cli",),
    ("__main__",),
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


TEST_FILE = re.compile(
    r"^\s*(?:from|import) tests\.(?:\w+\.)*test_\w+|^\s*from tests(?:\.\w+)* import (?:\([^)]*|.*)\btest_\w+",
    re.MULTILINE,
)


def test_test_files_are_no_libraries() -> None:
    """Each can be read, moved and left out alone; what several need lies beside them."""
    tests = Path(__file__).parent
    assert [
        str(path) for path in sorted(tests.rglob("*.py")) if TEST_FILE.search(path.read_text(encoding="utf-8"))
    ] == []
    for source in (
        "from tests.cuda.test_kernels import bound",
        "import tests.test_calibrate",
        "from tests import test_calibrate",
        "from tests.formats import (\n    packers,\n    test_hqq,\n)",
    ):
        assert TEST_FILE.search(source), source


def _python(code: str) -> str:
    """What a fresh interpreter prints; it may keep what it compiles, as an installed package does."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


EVERYTHING = "for name in qkernels.__all__: getattr(qkernels, name)\n"


def test_import_is_silent_and_lean() -> None:
    heavy = "('triton', 'transformers', 'matplotlib', 'tokenizers')"
    code = f"import sys, qkernels\n{EVERYTHING}print([m for m in {heavy} if m in sys.modules])"
    assert _python(code) == "[]"
    assert _python("import sys, qkernels; dir(qkernels); print('torch' in sys.modules)") == "False"


def test_import_touches_no_gpu() -> None:
    assert _python(f"import qkernels, torch\n{EVERYTHING}print(torch.cuda.is_initialized())") == "False"


def test_import_is_fast() -> None:
    """`import qkernels`, and then everything public, each under 0.1 s on top of torch; processor time, because wall time says
    more about what else the machine does. Of five, the first may compile. torch leaves so many young objects that somebody
    pays for one whole collection soon after it (60 ms and more): not counted to whoever imports next."""
    code = (
        "import gc, time, torch\ngc.collect()\ngc.freeze()\nt = time.process_time()\nimport qkernels\n"
        f"u = time.process_time()\n{EVERYTHING}print(u - t, time.process_time() - u)"
    )
    times = [tuple(map(float, _python(code).split())) for _ in range(5)]
    assert min(first for first, _ in times) < 0.1
    assert min(rest for _, rest in times) < 0.1


# --- names that are imported when they are asked for ------------------------------------------------------------------------


def test_type_checkers_see_the_names_that_there_are() -> None:
    """The imports that only they read, `__all__`, and what `__getattr__` finds are the same names from the same places."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name))
    seen = {alias.name: str(n.module) for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == qkernels._HOME_OF
    assert sorted(seen) == sorted(qkernels.__all__)
    for name, home in seen.items():
        assert getattr(qkernels, name) is getattr(importlib.import_module(f"qkernels.{home}"), name)


def test_modules_are_attributes_as_before() -> None:
    code = "import qkernels; print(qkernels.nn.QuantLinear is qkernels.QuantLinear, qkernels.layouts.__name__)"
    assert _python(code) == "True qkernels.layouts"
    code = "from qkernels import *; from qkernels import formats; print(RTN().name, formats.__name__)"
    assert _python(code) == "rtn qkernels.formats"
    assert {"nn", "quantize", "QuantScheme", "__version__"} <= set(dir(qkernels))
    with pytest.raises(AttributeError, match="module 'qkernels' has no attribute 'lood'"):
        qkernels.lood  # noqa: B018


def test_with_torch_there_the_ops_are_defined_at_once() -> None:
    """As an exported program needs them; and by any public name that computes, in the other order."""
    assert _python("import torch, qkernels; print(hasattr(torch.ops.qkernels, 'gemm_reference'))") == "True"
    code = "from qkernels import QuantLinear; import torch; print(hasattr(torch.ops.qkernels, 'gemm_kpack'))"
    assert _python(code) == "True"
