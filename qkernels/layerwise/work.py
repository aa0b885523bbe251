"""`WorkDirectory`: finished layers of a run that streams from a directory, kept beside the target until all are done.

    .<target>.qkernels-work/
      key.json              what the run depends on, one entry a part, hashed
      unit-00000/           one decoder layer, or one linear layer that needs no calibration
        unit.json           its name and the report of its linear layers
        config.json, model.safetensors         its tensors, as a native checkpoint: that format takes every weight
        activations/        what the next layer is fed with; of the last unit only

Every unit appears complete or not at all (`atomic_directory`), so a kill loses at most the layer at work. Activations are
stored in the dtype they have in memory, hence a run that goes on gets the bits that one in a single piece gets, on the same
machine with the same number of threads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from ..errors import ArgumentError, CalibrationError, CheckpointError, ConversionError, UnsupportedProblem
from ..models.experts import stack_at
from ..models.linears import as_stored
from ..quantizers import Options
from ..reports import ModuleReport
from ..storage import CONFIG, ShardWriter, TensorSource, atomic_directory, locked, read_json, write_json
from ..storage.files import memory_of
from ..tensor import QuantTensor
from ..texts import Windows
from .running import Routing

log = logging.getLogger(__name__)

KEY, UNIT, ACTIVATIONS = "key.json", "unit.json", "activations"

# After these the same call fails the same way, and what it has finished is of no use to anybody.
FUTILE = (ArgumentError, CalibrationError, ConversionError, UnsupportedProblem)


class WorkDirectory:
    """The units that are finished. Make it with `work_directory`, which holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, list[ModuleReport]] = {}
        for unit in self._units():
            try:
                values = read_json(unit / UNIT)
                self.finished[values["name"]] = [ModuleReport(**fields) for fields in values["modules"]]
            except (CheckpointError, KeyError, TypeError) as error:
                raise _unusable(path, error) from error

    def add(
        self,
        name: str,
        modules: list[ModuleReport],
        quantized: Mapping[str, QuantTensor],
        plain: Mapping[str, Tensor],
        hidden: list[Tensor] | None,
    ) -> None:
        """Keep a unit that is finished.

        Args:
            modules: the report of its linear layers.
            quantized: its quantized weights by module.
            plain: its other tensors by name; not written where nothing is quantized, for then nothing has changed.
            hidden: what the next decoder layer is fed with.

        Raises:
            CheckpointError: the disk refuses.
        """
        index = len(self.finished)
        with atomic_directory(self._unit(index)) as temporary:
            if quantized:
                writer = CheckpointWriter(temporary, {})
                for module, weight in quantized.items():
                    (writer.add_experts if weight.codes.dim() == 3 else writer.add_quantized)(module, weight)
                for tensor_name, tensor in plain.items():
                    writer.add_tensor(tensor_name, tensor)
                writer.close()
            if hidden is not None:
                (temporary / ACTIVATIONS).mkdir()
                shards = ShardWriter(temporary / ACTIVATIONS)
                for batch, tensor in enumerate(hidden):
                    shards.add(f"{batch:05d}", tensor)
                shards.close()
                write_json(temporary / ACTIVATIONS / CONFIG, {})
            write_json(temporary / UNIT, {"name": name, "modules": [asdict(module) for module in modules]})
        self.finished[name] = modules
        if hidden is not None and index:
            shutil.rmtree(self._unit(index - 1) / ACTIVATIONS, ignore_errors=True)

    def activations(self) -> list[Tensor] | None:
        """What the layer after the last finished one is fed with, one tensor a batch; None where no layer is finished."""
        with_some = [unit for unit in self._units() if (unit / ACTIVATIONS).is_dir()]
        if not with_some:
            return None
        source = TensorSource.open(with_some[-1] / ACTIVATIONS)
        return [source.read(name) for name in source.names()]

    def tensors(self, unit: str, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors of a decoder layer that is finished, dequantized, by their names in it; empty where it is not, or where
        nothing in it was quantized."""
        if unit not in self.finished:
            return {}
        path = self._unit(list(self.finished).index(unit))
        if not (path / CONFIG).is_file():
            return {}
        quantized = open_checkpoint(path)
        found = {name.removeprefix(f"{unit}."): quantized.read(name) for name in quantized.names()}
        for module in quantized.modules:
            leaf = module.removeprefix(f"{unit}.")
            if (stack := stack_at(layer, leaf)) is not None:
                found[leaf] = stack[1].stored(stack[2], quantized.weight(module).weight.dequantize())
                continue
            found[f"{leaf}.weight"] = as_stored(layer.get_submodule(leaf), quantized.weight(module).weight.dequantize())
        return found

    def copy_to(self, writer: CheckpointWriter) -> set[str]:
        """Write every finished unit, one tensor at a time; returns the names in the float model that they stand for."""
        done: set[str] = set()
        for unit in self._units():
            if not (unit / CONFIG).is_file():
                continue
            quantized = open_checkpoint(unit)
            for name, module in quantized.in_file_order():
                if module is None:
                    writer.add_tensor(name, quantized.read(name))
                    done.add(name)
                else:
                    weight = quantized.weight(module).weight
                    if weight.codes.dim() == 3:
                        writer.add_experts(module, weight)
                        done.add(module)
                    else:
                        writer.add_quantized(module, weight)
                        done.add(f"{module}.weight")
        return done

    def _unit(self, index: int) -> Path:
        return self.path / f"unit-{index:05d}"

    def _units(self) -> list[Path]:
        return sorted(self.path.glob("unit-?????"))


@contextmanager
def work_directory(target: str | os.PathLike[str], key: Mapping[str, str], resume: bool) -> Iterator[WorkDirectory]:
    """The work directory of a target, locked. It goes when the body succeeds, or fails as it would again; it stays after
    everything else (a kill, an interrupt, a full disk), for a run with `resume`.

    Args:
        key: see `run_key`.

    Raises:
        CheckpointError: there are finished layers and not `resume`; or they are of a run with another key; or another run
            is at work.
    """
    path = work_path(target)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path) as alone:
        if not alone:
            raise CheckpointError(
                f"another run is writing {target} (it holds {path}); wait for it or choose another target"
            )
        work = WorkDirectory(path)
        if work.finished:
            _check_resumable(work, target, key, resume)
            log.info("%s: going on after %d finished layers", target, len(work.finished))
        else:
            write_json(path / KEY, key)
        try:
            yield work
        except FUTILE:
            shutil.rmtree(path, ignore_errors=True)
            raise
        except BaseException:
            if work.finished:
                log.warning(
                    "%s: %d finished layers are kept; the same command with --resume (resume=True) goes on after them",
                    target,
                    len(work.finished),
                )
            else:
                shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)


def run_key(
    checkpoint: Checkpoint,
    methods: Mapping[str, Options],
    windows: Windows | None,
    versions: Mapping[str, str],
    routing: Routing,
) -> dict[str, str]:
    """What the bits of a result depend on. Tensors of the checkpoint are told by their files' names, sizes and times, for
    hashing a large model takes longer than reading it."""
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files()]
    tokens = b"".join(memory_of(group.contiguous()) for group in windows or ())
    return {
        "config": _digest(json.dumps(checkpoint.config, sort_keys=True)),
        "method": _digest(repr(sorted((name, repr(method)) for name, method in methods.items()))),
        "calibration": hashlib.sha256(tokens).hexdigest()
        + f" {[list(group.shape) for group in windows or ()]} {routing}",
        "source": _digest(repr(stamps)),
        "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _unusable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}, which an interrupted run left, is damaged or of another version of qkernels ({error}); remove the directory to "
        "start anew"
    )


def _check_resumable(work: WorkDirectory, target: str | os.PathLike[str], key: Mapping[str, str], resume: bool) -> None:
    """Refuse to mix two runs, and to throw away what one has finished."""
    try:
        kept: dict[str, Any] = read_json(work.path / KEY)
    except CheckpointError as error:
        raise _unusable(work.path, error) from error
    differing = [part for part in key if kept.get(part) != key[part]]
    what = f"{work.path} keeps {len(work.finished)} finished layers of an interrupted run for {target}"
    if differing:
        raise CheckpointError(
            f"{what}, with another {' and '.join(differing)} than this run's: repeat that run with --resume (resume=True), or "
            f"remove the directory to start anew"
        )
    if not resume:
        raise CheckpointError(
            f"{what}: pass --resume (resume=True) to go on with it, or remove the directory to start anew"
        )


def work_path(target: str | os.PathLike[str]) -> Path:
    """Where the work directory of a target is."""
    path = Path(target).expanduser().resolve()
    return path.parent / f".{path.name}.qkernels-work"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
