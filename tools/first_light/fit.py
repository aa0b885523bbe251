"""What a sweep says, without a card: how much the choices cost, what the numbers of card.h should be, and a table of the best.

    python -m tools.first_light fit OUT

reads OUT/sweep.jsonl and OUT/env.txt, and writes report.txt, card.txt and table.json to OUT/fit.

Regret of a problem: the time of the configuration that the model thinks fastest over the least time that any had. Numbers are
fitted by coordinate search on the mean of log(predicted / measured)^2, each shape predicted from the others' (leave one out),
so that a number is not praised for what it has seen. The model is csrc/cuda/heuristics.h itself (model.cpp). Standard library
alone.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BUILDS = ROOT / "build" / "first_light"
PATHS = ("decode", "gemm", "dequantize", "gemm_sm90", "gemm_a8", "gemm_a8_sm90")
ZEROS = ("none", "int", "float", "offset")
PROBLEM = ("N", "K", "M", "bits", "group", "zeros", "half", "act", "sm", "multiprocessors")
CONFIG = ("path", "tokens", "warps_n", "warps_k", "splits", "half_accumulate", "stages")
# What a sweep can tell. Of two numbers that only occur as a product one stays as it is (reached_issue with decode_slots).
FITTED = (
    "launch_ns", "decode_start_ns", "gemm_start_ns", "wgmma_start_ns", "cluster_barriers_ns", "l2_bytes_per_ns",
    "reached_bandwidth", "latency_ns", "decode_slots", "producer_clocks", "macs_per_ns", "wgmma_macs_per_ns",
    "macs8_per_ns", "wgmma8_macs_per_ns",
)  # fmt: skip
STEPS = (1.3, 1.1, 1.03, 1.01)  # of the coordinate search, from coarse to fine
WANTED_REGRET = 1.15  # past it a table serves better than the model

Row = dict[str, Any]


def rows_of(path: Path, mode: str = "time") -> list[Row]:
    """The finished lines of a mode. A line that a hang or a fault left behind has no end, and is not one."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("mode") == mode and "error" not in row:
            found.append(row)
    return found


def clusters_of(path: Path) -> list[int]:
    """Of `drive clusters`, as Clusters has them: [blocks - 1][size]."""
    active = [0] * 18
    if path.exists():
        for row in rows_of(path, "clusters"):
            active[9 * (row["blocks"] - 1) + row["size"]] = row["active"]
    return active


def problem_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(ZEROS.index(row[n]) if n == "zeros" else int(row[n]) for n in PROBLEM)


def config_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(PATHS.index(row[n]) if n == "path" else int(row[n]) for n in CONFIG)


def library() -> ctypes.CDLL:
    """The model, compiled by g++ where it is older than its sources."""
    source, made = Path(__file__).with_name("model.cpp"), BUILDS / "libmodel.so"
    sources = [source, *(ROOT / "csrc" / "cuda").glob("*.h"), ROOT / "csrc" / "types.h"]
    if not made.exists() or made.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        compiler = shutil.which("g++")
        if compiler is None:
            raise RuntimeError("the fit needs g++, to compile the model of csrc/cuda/heuristics.h")
        BUILDS.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-DQKERNELS_SM90A", f"-I{ROOT / 'csrc' / 'cuda'}"]
        fresh = made.with_suffix(".new")
        subprocess.run([compiler, *flags, str(source), "-o", str(fresh)], check=True)
        fresh.replace(made)
    model = ctypes.CDLL(str(made))
    model.model_name.restype = ctypes.c_char_p
    model.model_loss.restype = ctypes.c_double
    return model


class Model:
    """The model over rows that stay, for any numbers of the card."""

    def __init__(
        self, problems: Sequence[Sequence[int]], configs: Sequence[Sequence[int]], clusters: Sequence[int]
    ) -> None:
        self.library = library()
        self.count = len(problems)
        self._problems = (ctypes.c_int * (self.count * len(PROBLEM)))(*(v for p in problems for v in p))
        self._configs = (ctypes.c_int * (self.count * len(CONFIG)))(*(v for c in configs for v in c))
        self._clusters = (ctypes.c_int * 18)(*clusters)
        self.names = [self.library.model_name(i).decode() for i in range(self.library.model_numbers())]

    def card(self, sm: int) -> dict[str, float]:
        numbers = (ctypes.c_double * len(self.names))()
        self.library.model_card(sm, numbers)
        return dict(zip(self.names, numbers))

    def _numbers(self, card: Mapping[str, float]) -> ctypes.Array[ctypes.c_double]:
        return (ctypes.c_double * len(self.names))(*(card[name] for name in self.names))

    def predict(self, card: Mapping[str, float]) -> list[float]:
        """Microseconds of each row."""
        us = (ctypes.c_double * self.count)()
        self.library.model_predict(self.count, self._problems, self._configs, self._clusters, self._numbers(card), us)
        return list(us)

    def loss(
        self, card: Mapping[str, float], us: ctypes.Array[ctypes.c_double], counts: ctypes.Array[ctypes.c_char]
    ) -> float:
        given = (self.count, self._problems, self._configs, self._clusters, self._numbers(card), us, counts)
        return float(self.library.model_loss(*given))


@dataclass(frozen=True)
class Regret:
    """Of one problem: the chosen row's time over the best one's, and both configurations."""

    problem: tuple[int, ...]
    ratio: float
    best_us: float
    chosen: tuple[int, ...]
    best: tuple[int, ...]


class Sweep:
    """Rows with their times, and what the model makes of them."""

    def __init__(self, rows: Iterable[Row], clusters: Sequence[int]) -> None:
        kept = [row for row in rows if row.get("us")]
        if not kept:
            raise ValueError("the sweep has no finished row with a time")
        self.problems, self.configs = [problem_of(r) for r in kept], [config_of(r) for r in kept]
        self.us = [float(r["us"][1]) for r in kept]
        self.model = Model(self.problems, self.configs, clusters)
        self._us = (ctypes.c_double * len(kept))(*self.us)
        self.sm = self.problems[0][PROBLEM.index("sm")]

    def shapes(self) -> list[tuple[int, int]]:
        return sorted({(p[0], p[1]) for p in self.problems})

    def regrets(self, card: Mapping[str, float], only: tuple[int, int] | None = None) -> list[Regret]:
        predicted = self.model.predict(card)
        by_problem: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, problem in enumerate(self.problems):
            if self.configs[i][-1] == 0 and (only is None or problem[:2] == only):  # rings as deep as they fit
                by_problem[problem].append(i)
        found = []
        for problem, those in sorted(by_problem.items()):
            chosen = min(those, key=lambda i: predicted[i])
            best = min(those, key=lambda i: self.us[i])
            ratio = self.us[chosen] / self.us[best]
            found.append(Regret(problem, ratio, self.us[best], self.configs[chosen], self.configs[best]))
        return found

    def fit(self, start: Mapping[str, float], without: tuple[int, int] | None = None) -> dict[str, float]:
        """The numbers of FITTED that make the loss least on all shapes but one."""
        counts = ctypes.create_string_buffer(bytes(p[:2] != without for p in self.problems), len(self.problems))
        card = dict(start)
        least = self.model.loss(card, self._us, counts)
        for step in STEPS:
            better = True
            while better:
                better = False
                for name in FITTED:
                    for factor in (step, 1 / step):
                        moved = {**card, name: card[name] * factor}
                        loss = self.model.loss(moved, self._us, counts)
                        if loss < least * (1 - 1e-6):
                            card, least, better = moved, loss, True
        return card


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def spoken(config: tuple[int, ...]) -> str:
    path, tokens, warps_n, warps_k, splits, *_ = config
    warps = f" {warps_n}x{warps_k}" if PATHS[path] == "decode" else ""
    return f"{PATHS[path]} {tokens}{warps} /{splits}"


def report(sweep: Sweep) -> tuple[str, dict[str, float], float]:
    """The text, the fitted card, and the worst regret of a shape that was left out."""
    card = sweep.model.card(sweep.sm)
    now = sweep.regrets(card)
    lines = ["N K M bits group zeros half act | regret, best us | chosen -> best"]
    for r in now:
        values = [ZEROS[v] if name == "zeros" else str(v) for name, v in zip(PROBLEM[:8], r.problem)]
        lines.append(f"{' '.join(values)} | {r.ratio:.3f} {r.best_us:.2f} | {spoken(r.chosen)} -> {spoken(r.best)}")
    lines += ["", "regret               geometric mean   worst"]

    def said(what: str, regrets: Sequence[Regret]) -> str:
        return f"{what:<20} {geometric_mean([r.ratio for r in regrets]):.3f}            {max(r.ratio for r in regrets):.3f}"

    lines.append(said("as it is", now))
    left_out = [r for shape in sweep.shapes() for r in sweep.regrets(sweep.fit(card, shape), shape)]
    if len(sweep.shapes()) > 1:
        lines.append(said("fitted, left out", left_out))
    fitted = sweep.fit(card)
    lines.append(said("fitted", sweep.regrets(fitted)))
    worst = max(r.ratio for r in left_out)
    if worst > WANTED_REGRET:
        lines.append(f"worst regret above {WANTED_REGRET}: the table serves better than the model")
    return "\n".join(lines) + "\n", fitted, worst


def card_lines(fitted: Mapping[str, float], before: Mapping[str, float], source: str) -> str:
    """Lines for card.h, of the numbers that moved."""
    moved = [name for name in fitted if abs(fitted[name] / before[name] - 1) > 1e-3] if before else []
    return "".join(f'  c.{name} = {{{fitted[name]:.5g}, "{source}"}};  // was {before[name]:.5g}\n' for name in moved)


def table(sweep: Sweep) -> list[dict[str, Any]]:
    """The best configuration of each problem."""
    found = []
    for r in sweep.regrets(sweep.model.card(sweep.sm)):
        problem = {n: ZEROS[v] if n == "zeros" else v for n, v in zip(PROBLEM, r.problem)}
        config = {n: PATHS[v] if n == "path" else v for n, v in zip(CONFIG, r.best)}
        found.append({**problem, **config, "us": r.best_us, "regret": round(r.ratio, 4)})
    return found


def fit(out: Path, source: str) -> str:
    """Reads the sweep of `out`, writes out/fit/; returns the report."""
    sweep = Sweep(rows_of(out / "sweep.jsonl"), clusters_of(out / "env.txt"))
    text, fitted, _ = report(sweep)
    before = {name: value for name, value in sweep.model.card(sweep.sm).items() if value != 0}
    folder = out / "fit"
    folder.mkdir(exist_ok=True)
    lines = card_lines({name: fitted[name] for name in before}, before, source)
    (folder / "report.txt").write_text(text + "\n" + lines)
    (folder / "card.txt").write_text(lines)
    (folder / "table.json").write_text(json.dumps(table(sweep), indent=0) + "\n")
    return text + "\n" + lines
