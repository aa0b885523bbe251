"""Which type each tensor of a GGUF file should have, so that the file has a given size and the model loses least.

What a tensor's error costs is measured, not assumed: one tensor at a time is put into the model as a coarse type makes it, and
the KL divergence of the model's answers from the original's is what it costs. KL grows with the square of a perturbation, so the
cost of every other type is that of the coarse one, times the ratio of their squared output errors (over the calibration's inputs,
columns taken as independent). Costs of tensors are taken to add up. Then types are bought where a byte lowers the sum most: steps
along the convex hull of (bytes, cost) of each tensor, the best first, which is the optimum but for the last step of each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from tqdm import tqdm

from .checkpoint import load
from .checkpoint.gguf_plan import Slots, nearest_mix, plan_of, slots_of
from .errors import ArgumentError
from .formats.gguf import ImportanceFile, SearchName, dequantize, gguf_blocks
from .hub import local_copy
from .layerwise.importance import measure_importance
from .models.gguf_mixes import Chosen, file_order
from .models.gguf_names import Place
from .reports import readable_size
from .storage.gguf_types import GGML_TYPES
from .text import table
from .texts import Windows, calibration_windows, load_tokenizer

_CANDIDATES: Final = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_NARROW: Final = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # where rows are no multiple of 256
_ENTRIES: Final = 2**26  # of the answers that are kept to be compared with: 256 MiB in float32
_ALIGNED: Final = 32  # bytes that padding may take, a tensor


class Option(NamedTuple):
    """A type that a tensor may have, its bytes and what it costs."""

    type: str
    nbytes: int
    cost: float


class Choice(NamedTuple):
    """The type of a tensor, and the steps that were not taken: KL a MiB that the next smaller type would cost, and that the next
    larger one would gain; None at an end."""

    option: Option
    smaller: float | None
    larger: float | None


@dataclass(frozen=True)
class Sizing:
    """What was chosen, and why.

    Args:
        choices: by name in the file.
        nbytes: of the whole file.
        importance: of the inputs on the calibration text.
    """

    choices: Mapping[str, Choice]
    nbytes: int
    importance: ImportanceFile

    @property
    def cost(self) -> float:
        """The expected KL divergence, in nats a token."""
        return sum(choice.option.cost for choice in self.choices.values())

    @property
    def mix(self) -> str:
        """By which the file is called."""
        return nearest_mix({name: (c.option.type, c.option.nbytes) for name, c in self.choices.items()})

    def tensor_types(self) -> list[tuple[str, str]]:
        """As `to_gguf` takes them."""
        return [(f"^{re.escape(name)}$", choice.option.type) for name, choice in self.choices.items()]

    def to_markdown(self) -> str:
        """A row for each tensor."""
        rows = [
            [
                name,
                c.option.type,
                readable_size(c.option.nbytes),
                f"{c.option.cost:.1e}",
                _rate(c.smaller),
                _rate(c.larger),
            ]
            for name, c in self.choices.items()
        ]
        header = ["tensor", "type", "size", "KL", "a MiB less costs", "a MiB more gains"]
        total = (
            f"{readable_size(self.nbytes)}, expected KL {self.cost:.2e} (the sum; nats a token on the calibration text)"
        )
        return f"{table(header, rows)}\n\n{total}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def choose_types(
    source: str | os.PathLike[str],
    nbytes: int,
    calibration: Any,
    samples: int = 128,
    seq_len: int = 512,
    device: torch.device | str = "cpu",
    dataset: str = "",
    search: SearchName = "plain",
) -> Sizing:
    """The types with which a file of at most so many bytes loses least on a text.

    The whole model is in memory, in float32, and every tensor is made in every type, one at a time; each is asked about once.

    Args:
        source: a float checkpoint that `load` reads, of an architecture in `models/gguf_names.py`.
        nbytes: of the file, metadata included.
        calibration: as for `quantize`; it should be like what the model will see.
        samples, seq_len: windows of the calibration, and tokens in each.
        dataset: what a file says that it was measured on.
        search: of `gguf_blocks`, by which errors are measured.

    Raises:
        ArgumentError: the checkpoint is quantized; no mix is so small.
        CalibrationError, CheckpointError, ConversionError: as `calibration_windows` and `checkpoint.to_gguf`.
    """
    path = Path(local_copy(source))
    slots, windows = _asked(path, calibration, samples, seq_len)
    matrices = {
        name: place
        for name, place in slots.places.items()
        if len(slots.shapes[name]) > 1 and place.kind not in ("plain", "row", "parameter", "latent")
    }  # routers and what is no weight stay floats; of latents no importance is measured
    fixed = {
        n: Chosen("F16" if slots.places[n].kind == "latent" else "F32") for n in slots.places.keys() - matrices.keys()
    }
    smallest = {name: Chosen(_candidates(slots.shapes[name])[0]) for name in matrices}
    plan = plan_of(slots, "Q2_K", fixed | smallest)
    room = nbytes - plan.file_nbytes + sum(plan.entries[name].nbytes for name in matrices) - _ALIGNED * len(matrices)
    _check_room(room - sum(plan.entries[name].nbytes for name in matrices))  # before the work, too
    model = load(path, device, torch.float32)
    importance = _importance(model, matrices, windows, dataset)
    options = _options(model, slots, matrices, importance, _probe(windows, slots.config["vocab_size"]), search)
    together = cheapest(options, room)
    total = nbytes - room + sum(choice.option.nbytes for choice in together.values())
    groups = _groups(matrices)
    choices = {name: _share(choice, len(groups[first])) for first, choice in together.items() for name in groups[first]}
    return Sizing({name: choices[name] for name in sorted(choices, key=file_order)}, total, importance)


def importance_of(
    source: str | os.PathLike[str],
    calibration: Any,
    samples: int = 128,
    seq_len: int = 512,
    device: torch.device | str = "cpu",
    dataset: str = "",
) -> ImportanceFile:
    """How much the error of each input column counts on a text: the mean square of that input. The whole model is in memory.

    Args:
        source, calibration, samples, seq_len, dataset: as for `choose_types`.

    Raises:
        CalibrationError, CheckpointError, ConversionError: as `choose_types`.
    """
    path = Path(local_copy(source))
    slots, windows = _asked(path, calibration, samples, seq_len)
    return _importance(load(path, device), slots.places, windows, dataset)


def _asked(path: Path, calibration: Any, samples: int, seq_len: int) -> tuple[Slots, Windows]:
    """Where the tensors belong, and the windows to measure on."""
    slots = slots_of(path)
    if slots.checkpoint.format is not None:
        raise ArgumentError(f"{path} is quantized already: what its tensors lose is measured on the float checkpoint")
    length = min(seq_len, slots.config["max_position_embeddings"])
    return slots, calibration_windows(calibration, samples, length, load_tokenizer(path), slots.config["vocab_size"])


def _groups(matrices: Mapping[str, Place]) -> dict[str, list[str]]:
    """Names in the file of tensors that are one parameter of the model, by the first: gate and up of stacked experts, which run
    packed where they have one type."""
    by_parameter: dict[str, list[str]] = {}
    for name, place in matrices.items():
        by_parameter.setdefault(place.name, []).append(name)
    return {names[0]: names for names in by_parameter.values()}


def _share(choice: Choice, parts: int) -> Choice:
    """Of one of so many tensors that were chosen for together; what a MiB costs is the same."""
    option = choice.option
    return choice._replace(option=option._replace(nbytes=option.nbytes // parts, cost=option.cost / parts))


def _importance(model: nn.Module, places: Mapping[str, Place], windows: Windows, dataset: str) -> ImportanceFile:
    """By name in the file; of a head that shares its weight with the embedding, under the embedding's name."""
    measured = measure_importance(model, windows, dataset)
    found = measured.entries
    entries = {
        name: found[place.name] for name, place in places.items() if place.name in found and place.kind != "latent"
    }
    if "output.weight" not in places and "token_embd.weight" in places and "lm_head.weight" in found:
        entries["token_embd.weight"] = found["lm_head.weight"]
    return replace(measured, entries=entries)


def _probe(windows: Windows, vocabulary: int) -> list[Tensor]:
    """As many windows as there is room to keep the answers of, at least a part of one."""
    room = max(16, _ENTRIES // vocabulary)
    taken = []
    for row in (row for batch in windows for row in batch):
        if room < 2:
            break
        taken.append(row[:room])
        room -= len(row)
    return taken


def _candidates(shape: tuple[int, ...]) -> tuple[str, ...]:
    columns = shape[-1]
    return _CANDIDATES if columns % 256 == 0 else _NARROW if columns % 32 == 0 else ("F16",)


def _options(
    model: Any,
    slots: Slots,
    matrices: Mapping[str, Place],
    importance: ImportanceFile,
    probe: Sequence[Tensor],
    search: SearchName,
) -> dict[str, list[Option]]:
    """What each tensor costs in each type."""
    expected = _answers(model, probe)
    parameters = dict(model.named_parameters())
    options: dict[str, list[Option]] = {}
    for name, names in tqdm(_groups(matrices).items(), desc="asking", unit="tensor", leave=False, delay=2):
        place = matrices[name]
        parameter = parameters[place.name]
        weight = place.rows_in_file(_turned(place, parameter.detach().cpu()))
        entry = importance.entries.get(name)
        columns = None if entry is None else entry.importance(*weight.shape)
        found = {type: _made(weight, type, columns, search) for type in _candidates(slots.shapes[name])}
        shapes = [slots.shapes[one] for one in names]
        coarse, (_, error) = next(iter(found.items()))
        divergence = (
            _divergence(model, parameter, _turned(place, place.rows(found[coarse][0])), probe, expected)
            if error > 0
            else 0.0
        )
        options[name] = [
            Option(type, sum(_nbytes(shape, type) for shape in shapes), divergence * e / error if error > 0 else 0.0)
            for type, (_, e) in found.items()
        ]
    return options


def _turned(place: Place, weight: Tensor) -> Tensor:
    """Experts that their model has transposed, as a file has them; and back. Which row is whose makes no difference here."""
    return weight.transpose(-1, -2).contiguous() if place.turned else weight


def _made(weight: Tensor, type: str, columns: Tensor | None, search: SearchName) -> tuple[Tensor, float]:
    """The weight as a type makes it, and its squared error, of the output's square."""
    if GGML_TYPES[type].dtype is not None:
        made = weight.to(GGML_TYPES[type].dtype).float()
    else:
        made = dequantize(gguf_blocks(weight, type, columns, search), type)
    each = torch.ones(weight.shape[-1]) if columns is None else columns.unsqueeze(-2)
    whole = float((weight.square() * each).sum(dtype=torch.float64))
    return made, float(((made - weight).square() * each).sum(dtype=torch.float64)) / whole if whole > 0 else 0.0


def _nbytes(shape: tuple[int, ...], type: str) -> int:
    ggml = GGML_TYPES[type]
    return torch.Size(shape).numel() // ggml.elements * ggml.nbytes


def _answers(model: Any, probe: Iterable[Tensor]) -> list[Tensor]:
    """Log-probabilities `[tokens, vocabulary]` in float32, on the model's device."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return [log_softmax(model(row[None].to(device)).logits[0].float(), -1) for row in probe]


def _divergence(
    model: Any, parameter: nn.Parameter, weight: Tensor, probe: Sequence[Tensor], expected: Sequence[Tensor]
) -> float:
    """Mean KL divergence of the answers with another weight in a place, in nats a token; the weight comes back afterwards."""
    before = parameter.data
    parameter.data = weight.to(before.device, before.dtype)
    try:
        answers = _answers(model, probe)
    finally:
        parameter.data = before
    total = sum(float((p.exp() * (p - q)).sum(dtype=torch.float64)) for p, q in zip(expected, answers, strict=True))
    return max(0.0, total / sum(len(p) for p in expected))


def cheapest(options: Mapping[str, Sequence[Option]], nbytes: int) -> dict[str, Choice]:
    """One option for each name, of at most so many bytes together and of a low cost: steps along each name's convex hull, the
    steepest first.

    Raises:
        ArgumentError: the smallest options are larger.

    >>> from qkernels.sizing import Option, cheapest
    >>> options = {"a": [Option("Q2_K", 2, 9.0), Option("Q4_K", 4, 1.0)], "b": [Option("Q2_K", 2, 3.0), Option("Q4_K", 4, 1.0)]}
    >>> {name: choice.option.type for name, choice in cheapest(options, 6).items()}
    {'a': 'Q4_K', 'b': 'Q2_K'}
    """
    hulls = {name: _hull(of_one) for name, of_one in options.items()}
    at = dict.fromkeys(hulls, 0)
    room = nbytes - sum(hull[0].nbytes for hull in hulls.values())
    _check_room(room)
    steps = [(-_slope(hull, i), name, i) for name, hull in hulls.items() for i in range(len(hull) - 1)]
    for _, name, i in sorted(steps):
        more = hulls[name][i + 1].nbytes - hulls[name][i].nbytes
        if at[name] == i and more <= room:  # a step is taken after those before it alone
            at[name], room = i + 1, room - more
    mib = 2**20
    return {
        name: Choice(
            hull[at[name]],
            _slope(hull, at[name] - 1) * mib if at[name] > 0 else None,
            _slope(hull, at[name]) * mib if at[name] < len(hull) - 1 else None,
        )
        for name, hull in hulls.items()
    }


def _check_room(room: int) -> None:
    if room < 0:
        raise ArgumentError(
            f"the file would have at least {readable_size(-room)} more than that, with every tensor in its smallest type; allow "
            "more, or take a smaller model"
        )


def _slope(hull: Sequence[Option], i: int) -> float:
    """What a byte of the step from i to i + 1 gains."""
    return (hull[i].cost - hull[i + 1].cost) / (hull[i + 1].nbytes - hull[i].nbytes)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of (bytes, cost), from the smallest option to the least costly one."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) <= _slope([hull[-1], option], 0):
            hull.pop()
        hull.append(option)
    return hull
