"""A checkpoint format is one file and one registration line (docs/adding-a-format.md): this file is the file of a toy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor, inspect, load
from qkernels.checkpoint import CheckpointWriter, convert, open_checkpoint, registry
from qkernels.errors import ConversionError
from qkernels.formats import Config, Format, Parsed, Written
from qkernels.formats.validation import check_float, expect, naming
from tests.strategies import random_weight, same_weight

SCHEME = QuantScheme(8, "channel")


def parse(module: str, tensors: Mapping[str, Tensor], config: Config) -> Parsed:
    with naming(module):
        signed, scales = tensors["signed"], tensors["scale"]
        expect("signed", signed, (torch.int8,), tuple(signed.shape))
        check_float("scale", scales, (signed.shape[0], 1), "one a row")
        return Parsed(QuantTensor((signed.short() + 128).to(torch.uint8), scales, None, None, SCHEME))


def write(weight: QuantTensor) -> dict[str, Tensor]:
    if weight.scheme != SCHEME or weight.group_index is not None:
        raise ConversionError(f"toy holds {SCHEME}, got {weight.scheme}")
    return {"signed": (weight.codes.short() - 128).to(torch.int8), "scale": weight.scales}


def config_of(written: Written) -> dict[str, Any]:
    if written.schemes != {SCHEME}:
        raise ConversionError(f"toy holds {SCHEME}, got {', '.join(map(str, written.schemes))}")
    return {"quant_method": "toy"}


TOY = Format(
    "toy", ("signed", "scale"), (), lambda config: config.get("quant_method") == "toy", parse, write, config_of
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.WRITTEN, TOY.name, TOY)  # the one line


def test_it_is_detected_read_written_inspected_and_converted(tmp_path: Path) -> None:
    weight = random_weight(SCHEME, 16, 32)
    source = tmp_path / "toy"
    source.mkdir()
    writer = CheckpointWriter(source, {"architectures": ["None"]}, "toy")
    writer.add_quantized("layers.0.a", weight)
    writer.close()
    opened = open_checkpoint(source)
    assert opened.format is TOY
    assert same_weight(opened.weight("layers.0.a").weight, weight)
    assert inspect(source).schemes == {"w8a16_channel": 1}
    convert(source, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "again", "toy")
    assert same_weight(open_checkpoint(tmp_path / "again").weight("layers.0.a").weight, weight)


def test_a_whole_model_goes_through_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from qkernels import RTN, quantize

    quantize(tiny_llama_dir, RTN(bits=8, group_size="channel"), save_to=tmp_path / "out", format="toy", progress=False)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert bool(torch.isfinite(load(tmp_path / "out")(ids).logits).all())
    with pytest.raises(ConversionError, match="toy holds w8a16_channel, got w4a16_g32"):
        quantize(tiny_llama_dir, RTN(group_size=32), save_to=tmp_path / "no", format="toy", progress=False)
