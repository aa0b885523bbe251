"""Whatever a checkpoint holds, the answer is a checkpoint or a `CheckpointError`: never another exception, never a hang."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels import QuantScheme, inspect
from qkernels.checkpoint import CheckpointWriter
from qkernels.storage import ShardWriter, TensorSource, read_json, write_json
from tests.checkpoints import A16_FORMATS, sound_or_refused, with_random_bytes
from tests.strategies import random_weight

JUNK: list[Any] = [
    None, True, False, 0, -1, 5, 2**31, 2**70, -(2**70), 1.5, "", "4", "w4a16_g32", "w4a16_g99999999999999999999", "\ud800",
    [], [1], {}, {"a": 1}, {"": {}}, {"+:": []}, {"-:": {}}, {".*": {"bits": "x"}}, {"(": {}}, {"layers": {"bits": 2**70}},
]  # fmt: skip


@pytest.fixture(params=A16_FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    writer = CheckpointWriter(tmp_path, {"model_type": "llama"}, request.param)
    writer.add_quantized("layers.0.a", random_weight("w4a16_g32_asym", 16, 64, act_order=request.param != "awq"))
    writer.add_quantized("layers.1.a", random_weight(QuantScheme(4, 32), 16, 64))
    writer.add_tensor("norm.weight", torch.ones(8))
    writer.close()
    inspect(tmp_path)
    return tmp_path


def test_every_field_of_the_config_replaced_by_junk(checkpoint: Path) -> None:
    config = read_json(checkpoint / "config.json")
    fields = {
        *config["quantization_config"],
        "dynamic",
        "meta",
        "modules",
        "scheme",
        "is_marlin_format",
        "w_bit",
        "format",
    }
    outcomes = []
    for field in sorted(fields):
        for junk in JUNK:
            changed = config["quantization_config"] | {field: junk}
            text = json.dumps(config | {"quantization_config": changed})
            (checkpoint / "config.json").write_text(text)
            outcomes.append(sound_or_refused(checkpoint))
    assert True in outcomes
    assert False in outcomes


def test_the_whole_config_replaced_by_junk(checkpoint: Path) -> None:
    for junk in JUNK:
        (checkpoint / "config.json").write_text(json.dumps({"quantization_config": junk, "architectures": junk}))
        sound_or_refused(checkpoint)


def test_random_bytes_in_the_header(checkpoint: Path) -> None:
    path, draw = checkpoint / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    outcomes = []
    for _ in range(300):
        spoiled = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 8])):
            spoiled[draw.randrange(end)] = draw.choice([draw.randrange(256), *b'0123456789[]{},:"'])
        path.write_bytes(spoiled)
        outcomes.append(sound_or_refused(checkpoint))
    assert False in outcomes


def test_random_bytes_in_the_data(checkpoint: Path) -> None:
    """Codes can be anything; scales, shapes and group indices cannot. Nothing but refusals may come of it."""
    path, draw = checkpoint / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    outcomes = []
    for _ in range(100):
        path.write_bytes(with_random_bytes(whole, begin, draw))
        outcomes.append(sound_or_refused(checkpoint))
    assert True in outcomes


def test_tensors_of_every_other_dtype_and_shape(checkpoint: Path) -> None:
    source = TensorSource.open(checkpoint)
    tensors = {name: source.read(name) for name in source.entries}
    others = [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(3),
        torch.zeros(0, 0),
        torch.zeros(5, 5).int(),
        torch.zeros(1, 1, 1),
    ]
    others += [
        torch.zeros(16, 64, dtype=dtype) for dtype in (torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn)
    ]
    for name in (n for n in tensors if n.startswith("layers.0.")):
        for other in others:
            directory = checkpoint / "changed"
            directory.mkdir()
            writer = ShardWriter(directory)
            for key, tensor in (tensors | {name: other}).items():
                writer.add(key, tensor)
            writer.close()
            write_json(directory / "config.json", source.config)
            assert not sound_or_refused(directory), (name, other.dtype, list(other.shape))
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
