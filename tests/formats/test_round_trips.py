"""What every registered format promises: weights come back bit for bit, files byte for byte, refusals with reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkernels import RTN, QuantScheme, QuantTensor
from qkernels.checkpoint.registry import WRITTEN, detect, get_format
from qkernels.errors import ArgumentError, CheckpointError, ConversionError
from qkernels.formats import READ_ONLY, Format, Written
from qkernels.group_index import validated_group_index
from tests.checkpoints import A16_FORMATS
from tests.strategies import bytes_of, random_weight, same_weight, schemes

ALL = pytest.mark.parametrize("chosen", WRITTEN.values(), ids=WRITTEN)
A16 = pytest.mark.parametrize("chosen", A16_FORMATS.values(), ids=A16_FORMATS)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


def parsed(chosen: Format, weight: QuantTensor) -> QuantTensor:
    config = chosen.config_of(Written(weight.scheme, {}, act_order=weight.group_index is not None))
    reader = detect(config)
    assert reader.name.startswith(chosen.name)
    tensors = chosen.write(weight)
    assert set(reader.required) <= set(tensors) <= set(reader.suffixes)
    return reader.parse("m", tensors, config).weight


def canonical(weight: QuantTensor) -> QuantTensor:
    """With no group index where a random one happens to be the natural one."""
    index = weight.group_index
    index = None if index is None else validated_group_index(index, weight.K, weight.scheme)
    return replace(weight, group_index=index)


@ALL
@given(
    scheme=schemes(),
    N=st.integers(0, 70),
    K=st.integers(0, 150),
    seed=st.integers(0, 99),
    act_order=st.booleans(),
    dtype=DTYPES,
)
def test_a_weight_comes_back_or_is_refused(
    chosen: Format, scheme: QuantScheme, N: int, K: int, seed: int, act_order: bool, dtype: torch.dtype
) -> None:
    weight = canonical(random_weight(scheme, N, K, seed, act_order, dtype))
    try:
        tensors = chosen.write(weight)
    except ConversionError:
        assert chosen.name != "native"
        return
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = parsed(chosen, weight)
    assert same_weight(back, weight)
    again = chosen.write(back)
    assert list(again) == list(tensors)
    assert all(torch.equal(bytes_of(again[name]), bytes_of(tensors[name])) for name in tensors)


@ALL
@given(scheme=schemes(), data=st.data())
def test_config_of_and_write_refuse_the_same_schemes(chosen: Format, scheme: QuantScheme, data: st.DataObject) -> None:
    """So that asking `config_of` before hours of work is enough."""

    def refused(call: object) -> bool:
        try:
            call()  # type: ignore[operator]
        except ConversionError:
            return True
        return False

    K = 8 * (scheme.group_size if isinstance(scheme.group_size, int) else 4)
    weight = random_weight(scheme, 8, K)
    if chosen.name == "compressed-tensors":  # whose floats have scales of one dtype alone
        made = RTN().with_scheme(replace(scheme, act=None)).quantize(torch.randn(8, K))
        weight = replace(made, scheme=scheme, x_static=weight.x_static)
    assert refused(lambda: chosen.config_of(Written(scheme, {}))) == refused(lambda: chosen.write(weight))


@A16
def test_negative_and_zero_scales(chosen: Format) -> None:
    weight = random_weight("w4a16_g32_asym", 16, 64)
    scales = weight.scales * torch.tensor([1.0, -1.0], dtype=torch.float16)
    scales[3] = 0
    weight = QuantTensor(weight.codes, scales, weight.zeros, None, weight.scheme)
    assert same_weight(parsed(chosen, weight), weight)


@A16
def test_extreme_codes_and_zeros(chosen: Format) -> None:
    for code, zero in ((0, 0), (15, 15), (0, 15), (15, 0)):
        weight = QuantTensor(
            torch.full((40, 64), code, dtype=torch.uint8),
            torch.ones(40, 2, dtype=torch.float16),
            torch.full((40, 2), zero, dtype=torch.uint8),
            None,
            QuantScheme(4, 32, "int"),
        )
        assert same_weight(parsed(chosen, weight), weight)


@pytest.mark.parametrize("first", ["gptq", "gptq_v2", "awq", "compressed-tensors", "native"])
@pytest.mark.parametrize("second", ["gptq", "gptq_v2", "awq", "compressed-tensors", "native"])
@pytest.mark.parametrize("scheme", ["w4a16_g32_asym", "w4a16_g32", "w4a16_channel"])
def test_there_and_back(first: str, second: str, scheme: str) -> None:
    weight = random_weight(scheme, 48, 96)
    there = parsed(WRITTEN[second], parsed(WRITTEN[first], weight))
    assert same_weight(there, weight)
    tensors, again = WRITTEN[first].write(weight), WRITTEN[first].write(there)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "native"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_act_order_survives(name: str, bits: int) -> None:
    weight = random_weight(QuantScheme(bits, 32), 33, 100, act_order=True)
    assert same_weight(parsed(WRITTEN[name], weight), weight)


@ALL
def test_experts_are_kept_or_refused(chosen: Format) -> None:
    weight = random_weight("w4a8_g32" if chosen.name.endswith("a8") else "w4a16_g32", 8, 64, experts=(3,))
    if chosen.stacks:
        assert same_weight(parsed(chosen, weight), weight)
    else:
        with pytest.raises(ConversionError, match=r"one \[N, K\] weight a module, got \[3, 8, 64\]"):
            chosen.write(weight)


@pytest.mark.parametrize(
    ("name", "scheme", "reason"),
    [
        ("gptq", "w5a16_g32", "bits must be 2 or 3 or 4 or 8, got 5"),
        ("gptq_v2", "nf4_g64", "nf4_g64 has a codebook"),
        ("gptq", "w4a16_g32_fzero", "zero points must be integers, w4a16_g32_fzero has zeros='float'"),
        ("gptq", "w8a16_tensor", "no spelling for one scale per tensor"),
        ("gptq", "w4a8_g32", "no field for 8-bit activations"),
        ("awq", "w8a16_g32", "bits must be 4, got 8"),
        ("awq", "w4a16_g32_offset", "zeros='offset'"),
        ("compressed-tensors", "w4a16_g32_fzero", "zeros='float'"),
        ("compressed-tensors", "w4a16_tensor_asym", "one scale per tensor goes with one zero point"),
        ("compressed-tensors", "w4a16_g48", "K=64 is not a multiple of group_size 48"),
    ],
)
def test_refusals_say_why(name: str, scheme: str, reason: str) -> None:
    with pytest.raises(ConversionError, match=f"{name} cannot store this weight: .*{reason}.*native"):
        WRITTEN[name].write(random_weight(scheme, 16, 64))


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_scales_of_zero_only_are_not_written(name: str) -> None:
    weight = random_weight("w4a16_g32", 16, 64)
    weight = QuantTensor(weight.codes, torch.zeros_like(weight.scales), None, None, weight.scheme)
    with pytest.raises(ConversionError, match="all scales are zero"):
        WRITTEN[name].write(weight)
    assert same_weight(parsed(WRITTEN["native"], weight), weight)


def test_unknown_names() -> None:
    with pytest.raises(ArgumentError, match="got 'hqq', which is only read"):
        get_format("hqq")
    with pytest.raises(ConversionError, match="this format is only read; written are native, gptq"):
        READ_ONLY["hqq"].write(random_weight("w4a16_g64_fzero", 8, 64))
    with pytest.raises(ArgumentError, match="format must be one of native, gptq, gptq_v2, awq, .*got 'gguf'"):
        get_format("gguf")


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ({"quant_method": "awq", "version": "marlin"}, "'version': 'marlin'}, a kind that is not read yet"),
        ({"quant_method": "compressed-tensors", "format": "mxfp6-quantized"}, "a kind that is not read yet"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {"format": "x"}},
            "a kind that is not read yet",
        ),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_x"}, "'gptq_x'}, which is not known; read are native"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "'is_marlin_format': True}, a kind that is not read yet"),
        ({"quant_method": "frobnicate"}, "'frobnicate'}, which is not known; read are native, gptq, gptq_v2, awq"),
        ({}, "declares 'no quant_method', which is not known"),
    ],
)
def test_unknown_methods_are_refused_by_name(config: dict[str, object], answer: str) -> None:
    with pytest.raises(CheckpointError, match=answer):
        detect(config)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"method": "gptq", "format": "gptq_v2"}, "gptq_v2"),
        ({"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),  # AutoGPTQ's quantize_config.json
        ({"quant_method": "awq", "version": "GEMM"}, "awq"),
        ({"quant_method": "awq"}, "awq"),
        (
            {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
            "awq",
        ),  # AutoAWQ's quant_config.json
        ({"quant_method": "qkernels", "version": 1}, "native"),
        ({"quant_method": "awq", "version": "gemv"}, "awq gemv"),
        ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMV_FAST"}, "awq gemv_fast"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, "auto-round"),
    ],
)
def test_known_methods(config: dict[str, object], name: str) -> None:
    assert detect(config).name == name
