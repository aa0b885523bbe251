"""Headers and configs drawn by hypothesis: a checkpoint or a `CheckpointError`, in two seconds and 512 MiB of address space."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkernels import QuantScheme
from qkernels.checkpoint.registry import WRITTEN
from qkernels.formats import METADATA, READ_ONLY, Written
from qkernels.layouts import LAYOUTS
from tests.checkpoints import sound_or_refused

SUFFIXES = sorted({suffix for f in (*WRITTEN.values(), *READ_ONLY.values()) for suffix in f.suffixes})
METHODS = [
    "gptq",
    "awq",
    "compressed-tensors",
    "bitsandbytes",
    "hqq",
    "torchao",
    "auto-round",
    "mxfp4",
    "fp8",
    "modelopt",
    "qkernels",
    "quanto",
    "x",
]
LABELS = [
    "gptq",
    "gptq_v2",
    "gptq_p",
    "gemm",
    "gemv",
    "gemv_fast",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp8-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
    "auto_round",
    "auto_round:auto_gptq",
]

sizes = st.one_of(st.integers(-1, 70), st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**70]))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    sizes,
    st.floats(allow_nan=False),
    st.text(max_size=6),
    st.sampled_from([*METHODS, *LABELS]),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
KEYS = [
    "quant_method", "checkpoint_format", "format", "version", "packing_format", "bits", "group_size", "sym", "desc_act",
    "zero_point", "dynamic", "extra_config", "config_groups", "ignore", "modules", "scheme", "meta", "load_in_4bit",
    "load_in_8bit", "pack_dtype", "layout", "weight_block_size", "fmt", "activation_scheme", "quant_algo", "quantized_layers",
    "expert_dtype", "modules",
]  # fmt: skip
likely = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(METHODS)},
    optional={
        "checkpoint_format": st.sampled_from(LABELS), "version": st.sampled_from([*LABELS, 1]), "format": st.sampled_from(LABELS),
        "packing_format": st.sampled_from(LABELS), "bits": st.integers(1, 9), "group_size": st.sampled_from([-1, 0, 16, 32]),
        "sym": st.booleans(), "load_in_4bit": st.booleans(), "load_in_8bit": st.booleans(),
    },
)  # fmt: skip
changes = st.dictionaries(st.sampled_from(KEYS), junk, max_size=2)
configs = st.one_of(likely, st.builds(dict.__or__, likely, changes), junk)
BASES: dict[str, dict[str, Any]] = {
    name: f.config_of(Written(scheme, {"m": scheme}))
    for name, f in WRITTEN.items()
    for scheme in [QuantScheme(4, 32, act=LAYOUTS[name].acts[-1] if name in LAYOUTS else None)]
}
PACKED = json.dumps(BASES["compressed-tensors"])


def compressed(body: str, own: str | None = None, **weights: Any) -> dict[str, Any]:
    """The config of a compressed-tensors file of floating-point weights; `own`: what its group calls its format."""
    config: dict[str, Any] = json.loads(PACKED.replace("pack-quantized", body))
    group = config["config_groups"]["group_0"]
    group["weights"] |= {"type": "float", "num_bits": 4} | weights
    group["format"] = own or body
    return config


def static() -> dict[str, Any]:
    """The config of a file of integers with static activations."""
    scheme = QuantScheme(8, "channel", act="int8_static_zero")
    return WRITTEN["compressed-tensors"].config_of(Written(scheme, {"m": scheme}))


BASES |= {
    "compressed-tensors int-quantized": static(),
    "compressed-tensors float-quantized": compressed(
        "float-quantized", num_bits=8, strategy="block", block_structure=[16, 16]
    ),
    "compressed-tensors fp4-pack-quantized": compressed("mxfp4-pack-quantized", group_size=32),
    "compressed-tensors mixed-precision": compressed("mixed-precision", "nvfp4-pack-quantized", group_size=16),
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "awq gemv": {"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 32, "zero_point": True},
    "awq gemv_fast": {"quant_method": "awq", "version": "gemv_fast", "bits": 4, "group_size": 32, "zero_point": True},
    "bitsandbytes 4-bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "hqq": {"quant_method": "hqq"},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False},
    "torchao": {"quant_method": "torchao"},
    "mxfp4": {"quant_method": "mxfp4"},
    "planar gptq_p": {"quant_method": "gptq", "checkpoint_format": "gptq_p", "bits": 5, "group_size": 16, "sym": False},
    "fp8 of DeepSeek-V4": {"quant_method": "fp8", "weight_block_size": [16, 16], "expert_dtype": "fp4"},
    "quanto": {"quant_method": "quanto", "modules": {"m": {"weights": "qint8"}}},
}
ENTRIES = [
    json.dumps({"_type": kind, "_data": {"block_size": block, "shape": [8, 16], "target_dtype": {"_data": "int4"}}})
    for kind in (
        "Int8Tensor",
        "IntxUnpackedToInt8Tensor",
        "Int4Tensor",
        "Int4TilePackedTo4dTensor",
        "Float8Tensor",
        "x",
    )
    for block in ([1, 16], [8, 16], [1, 2**40], None)
]
DTYPES = {"I32": 4, "F16": 2, "U8": 1, "I8": 1, "F32": 4, "I64": 8, "F8_E4M3": 1, "F8_E8M0": 1}


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, Any], int, Any]:
    """A header whose tensors follow each other, mostly; how many bytes they claim together; and a quantization_config, mostly of
    the format whose tensors they are."""
    name = draw(st.sampled_from([*BASES, None]))
    fmt = (WRITTEN | READ_ONLY).get(str(name))
    suffixes = draw(st.lists(st.sampled_from(SUFFIXES if fmt is None else fmt.suffixes), unique=True, max_size=6))
    if fmt is not None and draw(st.integers(0, 9)):
        suffixes = [*fmt.required, *(suffix for suffix in suffixes if suffix not in fmt.required)]
    config = draw(configs) if name is None else BASES[name] | draw(st.one_of(st.just({}), changes))
    header: dict[str, Any] = {}
    begin = 0
    for suffix in suffixes:
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 32]), max_size=3))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        end = begin + DTYPES[dtype]
        for size in shape:
            end += (end - begin) * (size - 1)
        header[f"m.{suffix}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    if draw(st.integers(0, 5)) == 0 and header:  # one lie
        entry = header[draw(st.sampled_from(sorted(header)))]
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
            st.one_of(junk, st.lists(sizes, max_size=3))
        )
    if draw(st.booleans()):
        header[METADATA] = draw(
            st.dictionaries(st.sampled_from(["m.weight", "format"]), st.text(max_size=40), max_size=2)
        )
    return header, begin, config


def outcome(directory: Path, header: Any, length: int, config: Any) -> bool:
    text = json.dumps(header).encode()
    data = bytes(i * 37 % 256 for i in range(min(length, 4096))) + bytes(max(0, length - 4096))
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return sound_or_refused(directory)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@settings(
    max_examples=1000, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(drawn=checkpoints())
def test_headers_and_configs(tmp_path: Path, little_room: None, drawn: tuple[dict[str, Any], int, Any]) -> None:
    start = time.process_time()  # not wall time, which says more about what else the machine does
    outcome(tmp_path, *drawn)
    assert time.process_time() - start < 2


def test_every_format_is_fuzzed() -> None:
    assert BASES.keys() == (WRITTEN | READ_ONLY).keys()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_the_limits_bite(tmp_path: Path, little_room: None) -> None:
    """The control: what needs more than the room is noticed, and a sound file is still read."""
    with pytest.raises(MemoryError):
        bytearray(2**30)
    header = {"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    assert outcome(tmp_path, header, 8, None)
