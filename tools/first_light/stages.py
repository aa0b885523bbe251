"""What is run on a GPU, in which order, and for how long at most: data. Standard library alone.

A stage is a process. `{drive}`, `{python}`, `{paths}` and `{out}` in its command are put in when it starts: `{paths}` are the
kernels whose check has passed, so that one that hangs or is wrong costs the later stages nothing but itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

PATHS = ("decode", "gemm", "gemm_sm90", "gemm_a8", "gemm_a8_sm90")
PLAIN, INT8 = PATHS[:3], PATHS[3:]

# Attention, gate and up, and down of 8 B and 70 B models; two of 14 B and 32 B; two of the experts of a 30 B one.
SHAPES = (
    (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672),
    (5120, 5120), (51200, 5120), (1536, 2048), (2048, 768),
)  # fmt: skip
FEW = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MANY = (384, 512, 768, 1024, 2048, 4096)
EDGES = (1, 7, 8, 16, 17, 33, 64, 65, 129, 300, 600)
# Schemes that are checked, with the shape for each: N is odd, K no multiple of a ring's, groups end inside a part.
CHECKED = (
    (131, 520, 4, 128, "none", "bf16", 16), (640, 2048, 4, 64, "int", "fp16", 16), (4096, 1024, 8, 0, "none", "bf16", 16),
    (131, 520, 4, 16, "float", "bf16", 16), (640, 2048, 8, 32, "offset", "fp16", 16), (4096, 1024, 3, 128, "int", "bf16", 16),
    (131, 520, 4, 128, "none", "bf16", 8), (640, 2048, 8, 0, "none", "fp16", 8), (640, 2048, 4, 32, "none", "bf16", 8),
    (131, 520, 8, 0, "none", "bf16", "8o6"), (640, 2048, 8, 0, "none", "fp16", "8z"), (131, 520, 4, 32, "none", "fp16", "8sz"),
    (640, 2048, 4, 128, "none", "bf16", "8s"),
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        name: of the stage; unique in its phase.
        command: program and arguments.
        limit: seconds, after which its process group is killed.
        file: of `--out`, which its output is added to.
        needs: a program that must be in PATH; without it the stage is left out, by name.
        judges: the path that this stage is the check of: if it fails, later stages of that path alone are skipped, other checks
            aside, and the others do without it.
        paths: those that `{paths}` may name. The stage is skipped if none of them is left.
        environment: added to that of the runner.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    file: str
    needs: str | None = None
    judges: str | None = None
    paths: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def drive(mode: str, **options: object) -> tuple[str, ...]:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ("{drive}", mode, *words)


def joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def problem(N: int, K: int, bits: int, group: int, zeros: str, kind: str, act: int | str) -> dict[str, object]:
    return {"N": N, "K": K, "bits": bits, "group": group, "zeros": zeros, "type": kind, "act": act}


def scheme(row: tuple[int, int, int, int, str, str, int | str]) -> str:
    N, K, bits, group, zeros, kind, act = row
    return f"{N}x{K} w{bits}a{act} g{group} {zeros} {kind}"


def environment_stages() -> list[Stage]:
    return [
        Stage("clusters", drive("clusters"), 10, "env.txt"),
        Stage("card", ("nvidia-smi", "-q"), 10, "env.txt", needs="nvidia-smi"),
        Stage("nvcc", ("nvcc", "--version"), 5, "env.txt", needs="nvcc"),
        Stage("torch", ("{python}", "-m", "tools.first_light.baselines", "--versions"), 30, "env.txt"),
    ]


def checks(edges: Sequence[int] = EDGES, limit: float = 15) -> list[Stage]:
    """Every configuration of every kernel against fp64: a process for each path and scheme, the smallest problem first."""
    found = []
    for path in PATHS:
        for row in CHECKED:
            if (row[-1] != 16) == (path in INT8):
                command = drive("check", **problem(*row), M=joined(edges), paths=path)
                plain = row[3] in (0, 128) and row[4] == "none" and row[-1] in (8, 16)  # what is timed later
                judges = path if plain else None
                found.append(
                    Stage(f"check {path} {scheme(row)}", command, limit, "check.jsonl", judges=judges, paths=(path,))
                )
    return found


def repeats(limit: float = 15) -> list[Stage]:
    found = []
    for M, act, paths in ((8, 16, PLAIN), (64, 16, PLAIN), (300, 16, PLAIN), (64, 8, INT8)):
        options = problem(1024, 2048, 4, 128, "none", "bf16", act)
        command = drive("repeat", **options, M=M, paths="{paths}", most=12, repeats=200)
        found.append(Stage(f"repeat a{act} M={M}", command, limit, "check.jsonl", paths=paths))
    return found


def sweep(shapes: Sequence[tuple[int, int]] = SHAPES, limit: float = 20) -> list[Stage]:
    """Every configuration up to 256 tokens; beyond, the twelve of which the model expects most."""
    found = []
    for N, K in shapes:
        plain = problem(N, K, 4, 128, "none", "bf16", 16)
        for tokens, most in ((FEW, 1000), (MANY, 12)):
            command = drive("time", **plain, M=joined(tokens), paths="{paths}", most=most)
            found.append(Stage(f"sweep {N}x{K} M={tokens[0]}-{tokens[-1]}", command, limit, "sweep.jsonl", paths=PLAIN))
    return found


def other_schemes(limit: float = 10) -> list[Stage]:
    found = []
    tokens = joined((1, 8, 16, 64, 256, 1024, 4096))
    for N, K in (SHAPES[0], SHAPES[4]):
        for bits, group, act in ((8, 0, 16), (4, 32, 16), (8, 0, 8), (4, 128, 8)):
            options = problem(N, K, bits, group, "none", "bf16", act)
            command = drive("time", **options, M=tokens, paths="{paths}", most=16)
            paths = INT8 if act == 8 else PLAIN
            found.append(Stage(f"sweep {N}x{K} w{bits}a{act} g{group}", command, limit, "sweep.jsonl", paths=paths))
    # Rings that are shorter than what fits sm_90a, and decode's of other than its four stages.
    for path, rings, tokens in (("gemm_sm90", (4, 8), "64,128,512"), ("decode", (3, 6), "1,8,16")):
        for stages in rings:
            options = problem(8192, 8192, 4, 128, "none", "bf16", 16)
            command = drive("time", **options, M=tokens, paths="{paths}", most=6, stages=stages)
            found.append(Stage(f"sweep {path} stages {stages}", command, limit, "sweep.jsonl", paths=(path,)))
    return found


def baselines(limit: float = 25) -> list[Stage]:
    """torch, dequantize + mm, and the peers that are installed, on the same shapes."""
    return [
        Stage(
            "baselines", ("{python}", "-m", "tools.first_light.baselines", "--device", "cuda:0"), limit, "base.jsonl"
        ),
        Stage("calibrate", drive("calibrate"), 25, "probe.jsonl"),
    ]


def experts(limit: float = 40) -> Stage:
    """Blocks of experts: our op beside bf16 grouped_mm and humming, where it is installed, and the tiles of its first product."""
    return Stage("experts", ("{python}", "-m", "tools.first_light.experts", "--device", "cuda:0"), limit, "base.jsonl")


def op_tests(limit: float = 40) -> list[Stage]:
    command = (
        "{python}",
        "-m",
        "pytest",
        "tests/gpu/test_cuda.py",
        "tests/gpu/test_cuda_experts.py",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--maxfail=15",
    )
    return [Stage("ops", (*command, "-n", "6"), limit, "tests.log")]


def sanitizers(limit: float = 12) -> list[Stage]:
    """memcheck on drive, whose buffers are a cudaMalloc each; racecheck only where nothing is asynchronous beyond cp.async: it
    does not follow TMA, mbarriers and wgmma. Triton's kernels are not among them."""
    found = []
    for path, act in ((path, 8 if path in INT8 else 16) for path in PATHS):
        options = {
            **problem(71, 200, 4, 32, "none", "bf16", act),
            "M": "1,17" if path == "decode" else "33",
            "paths": path,
            "most": 4,
        }
        tools = ("memcheck", "initcheck", "racecheck") if not path.endswith("sm90") else ("memcheck", "synccheck")
        for tool in tools:
            command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *drive("check", **options))
            found.append(Stage(f"{tool} {path}", command, limit, "tools.txt", needs="compute-sanitizer", paths=(path,)))
    return found


def profiles(limit: float = 10) -> list[Stage]:
    found = []
    for N, K, M in (
        (8192, 8192, 1),
        (4096, 4096, 1),
        (8192, 8192, 8),
        (8192, 8192, 64),
        (8192, 8192, 128),
        (8192, 8192, 512),
    ):
        options = problem(N, K, 4, 128, "none", "bf16", 16)
        command = ("ncu", "--set", "full", "--clock-control", "none", "-k", "regex:decode|gemm_wgmma", "-s", "2", "-c", "1",
                   "--page", "details", *drive("check", **options, M=M, paths="{paths}", most=1))  # fmt: skip
        found.append(Stage(f"ncu {N}x{K} M={M}", command, limit, "tools.txt", needs="ncu", paths=PLAIN))
    return found


def first() -> list[Stage]:
    """Phase 1: is it right, and what are the numbers. 395 s; what does not fit is named in the log."""
    return [
        *environment_stages(), *checks(), *repeats(), *sweep(), *other_schemes(), *baselines(), *op_tests(), *sanitizers(),
        *profiles(), experts(),
    ]  # fmt: skip


def second() -> list[Stage]:
    """Phase 2, after the fit: the new build against the old one by turns, ops, models in graphs, Triton, peers."""
    found = [*environment_stages()[:1], *checks((1, 17, 65, 300), 8)]
    for N, K in SHAPES[:3] + SHAPES[4:5]:
        options = problem(N, K, 4, 128, "none", "bf16", 16)
        command = drive("time", **options, M="1,8,16,32,64,128,512,1024", paths="{paths}", most=2)
        for which in ("new", "old"):
            program = command if which == "new" else ("{old}", *command[1:])
            found.append(Stage(f"{which} {N}x{K}", program, 8, "sweep.jsonl", paths=PLAIN))
    python = ("{python}", "-m")
    models = (*python, "benchmarks.models.sweep", "--size", "8b", "--device", "cuda:0", "--modes", "graph", "--out")
    return [
        *found,
        *op_tests(35),
        Stage("models", (*models, "{out}/models.json"), 60, "tests.log"),
        Stage("triton", (*python, "pytest", "tests/gpu/test_triton.py", "-m", "gpu", "-q", "-n", "8"), 45, "tests.log"),
        experts(),
        Stage("peers", (*python, "tools.first_light.baselines", "--device", "cuda:0"), 40, "base.jsonl"),
        *(
            Stage(
                check,
                (*python, "tests.gpu.properties", check, "--repeats", "200", "--kernels", "cuda"),
                20,
                "tests.log",
            )
            for check in ("graph", "streams", "repeats")
        ),
    ]


def whole() -> list[Stage]:
    """`make gpu-check`: both phases with limits that leave nothing out, memory checks of the ops (one cudaMalloc a tensor), and
    the benchmarks."""
    generous = [replace(stage, limit=20 * stage.limit) for stage in first()]
    own = ("{python}", "-m", "tests.gpu.properties")
    each = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    more = [stage for stage in second() if stage.name in ("models", "triton", "graph", "streams", "repeats")]
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")
    return [
        *generous,
        *(replace(stage, limit=20 * stage.limit) for stage in more),
        Stage(
            "memcheck ops",
            (*sanitizer, *own, "shapes", "--kernels", "cuda"),
            1800,
            "tools.txt",
            needs="compute-sanitizer",
            environment=each,
        ),
        Stage("bench", ("{python}", "-m", "qkernels.cli.main", "bench", "--device", "cuda:0"), 600, "base.jsonl"),
    ]


PHASES = {"first": first, "second": second, "all": whole}
