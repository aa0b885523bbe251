"""What the compiled ops refuse (csrc/checks.h, and that of each device), how CUDA's read the environment, and their log.

`csrc/inputs.h` copies each tensor's type, shape, device and address into plain values, and the bindings ask these very functions;
what is tested here, in the host build, is what runs beside a GPU. Nothing of it depends on values in buffers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from qkernels.layouts import get_layout
from qkernels.scheme import CODEBOOK_NUMBERS, FACTOR_NUMBERS
from tests.cuda import calls, emulator
from tests.cuda.calls import TYPES
from tests.strategies import random_weight

pytestmark = pytest.mark.skipif(calls.why_not() is not None, reason=str(calls.why_not()))
QUESTIONS = ("product", "decode", "a8", "dequantize", "device", "cpu product", "cpu decode", "cpu a8")
NAMES = ("x", "qweight", "scales", "zeros", "k_order", "outer_scales", "outer_zeros", "bias", "x_static")


@dataclass(frozen=True)
class Plain:
    """`Buffer` of csrc/checks.h."""

    type: int
    int32: bool
    shape: tuple[int, ...]
    contiguous: bool = True
    device: int = 0
    address: int = 1024

    def row(self) -> list[int]:
        sizes = [*self.shape, 0, 0, 0][:3]
        return [1, self.type, self.int32, len(self.shape), *sizes, self.contiguous, self.device, self.address]


def plain(tensor: Tensor, device: int = 0) -> Plain:
    """What `buffer_of` would say of this tensor, if it were on this CUDA device (-1: the CPU)."""
    shape = tuple(tensor.shape)
    return Plain(TYPES.get(tensor.dtype, 0), tensor.dtype == torch.int32, shape, tensor.is_contiguous(), device)


def wrong(tensors: dict[str, Plain | None], question: str = "product", scheme: str = "w4a16_g64", **more: int) -> str:
    """What the checks say to a call for a [70, 200] weight; "" is nothing."""
    rows = torch.tensor([p.row() if (p := tensors.get(name)) else [0] * 10 for name in NAMES], dtype=torch.int64)
    parsed = random_weight(scheme, 1, 200).scheme
    integers = {
        "question": QUESTIONS.index(question), "N": 70, "K": 200, "bits": parsed.bits, "group": parsed.group_length(200),
        "zeros_are_offsets": parsed.zeros == "offset", "codebook": CODEBOOK_NUMBERS[parsed.codebook],
        "factors": FACTOR_NUMBERS[parsed.factors], "sm": 90,
        "act": int(question.endswith("a8")), **more,
    }  # fmt: skip
    text = torch.zeros(512, dtype=torch.uint8)
    emulator.run(calls.UNIT, emulator.Call("wrong", {"tensors": rows, "text": text}, integers))
    return bytes(text.tolist()).split(b"\0")[0].decode()


def good(scheme: str = "w4a16_g64", M: int = 5, layout: str = "mma_tile") -> dict[str, Plain | None]:
    """Everything that an op may be given, from a weight that is really packed."""
    weight = random_weight(scheme, 70, 200, act_order=True)
    packed = get_layout(layout).pack(weight)
    tensors = {"x": torch.zeros(M, 200, dtype=torch.bfloat16), **packed, "bias": torch.zeros(70)}
    device = 0 if layout == "mma_tile" else -1
    return {name: None if t is None else plain(t, device) for name, t in tensors.items()}


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16_g64",
        "w8a16_g32_asym",
        "w3a16_g16_fzero",
        "w4a16_channel_offset",
        "nf4_g64",
        "fp8_channel",
        "nvfp4_g16",
        "nvfp4m_g16",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_xs",
        "w6a16_g64",
    ],
)
def test_what_the_packer_makes_is_taken(scheme: str) -> None:
    """Often the first test that needs the launchers on the CPU: g++ compiles all kernels for it, half a minute on two cores."""
    assert wrong(good(scheme), scheme=scheme) == ""
    assert wrong({**good(scheme), "bias": None, "k_order": None}, scheme=scheme) == ""
    for question in ("decode", "dequantize", "device"):
        assert wrong(good(scheme), question, scheme) == ""
    assert wrong(good(scheme, M=0), scheme=scheme) == ""  # any M
    assert wrong({**good(), "zeros": None}, "a8") == ""


BAD: list[tuple[str, dict[str, object], str]] = [  # tensor, what is different about it, what is said
    ("x", {"type": TYPES[torch.float32]}, ".M, K.: the CUDA kernels take no float32, got float32 .5, 200."),
    ("x", {"shape": (2, 5, 200)}, "x must be bfloat16 or float16 .M, K."),
    ("x", {"shape": (1 << 31, 200)}, "x has too many rows: 2147483648"),
    ("x", {"shape": (5, 264)}, "qweight must be uint8 .2, 10240. for N=70, K=264, bits=4"),
    ("x", {"device": -1}, "x must be on cuda:0 like qweight"),
    ("x", {"device": 1}, "x must be on cuda:0 like qweight, got cuda:1"),
    ("qweight", {"device": -1}, "qweight must be on a CUDA device, like x; move it there"),
    ("qweight", {"type": TYPES[torch.float16]}, "qweight must be uint8 .2, 8192."),
    ("qweight", {"shape": (3, 8192)}, "for N=70, K=200, bits=4; was it packed for another layout. Got uint8 .3, 8192."),
    ("qweight", {"shape": (70, 100)}, "for N=70, K=200, bits=4; was it packed for another layout"),  # plain rows of nibbles
    ("qweight", {"shape": (4, 2, 8192)}, "stacked experts are not taken here"),
    ("qweight", {"contiguous": False}, "qweight must be contiguous"),
    ("qweight", {"address": 1032}, "qweight must be contiguous and start at a multiple of 16 bytes, got .* starts 8 bytes past"),
    ("scales", {"type": TYPES[torch.uint8]}, "scales must be floating .2, 4, 64., got uint8 .2, 4, 64."),
    ("scales", {"shape": (2, 3, 64)}, "scales must be floating .2, 4, 64."),
    ("scales", {"device": 1}, "scales must be on cuda:0"),
    ("scales", {"address": 1026}, "scales must be contiguous and start at"),
    ("zeros", {"type": 0}, "zeros must be uint8 or floating .2, 4, 64. like scales"),
    ("zeros", {"shape": (2, 64, 4)}, "zeros must be uint8 or floating .2, 4, 64. like scales, got uint8 .2, 64, 4."),
    ("zeros", {"device": -1}, "zeros must be on cuda:0"),
    ("zeros", {"address": 1025}, "zeros must be contiguous and start at"),
    ("k_order", {"int32": False}, "k_order must be int32 .K. = .200."),
    ("k_order", {"shape": (199,)}, "k_order must be int32 .K. = .200., got int32 .199."),
    ("k_order", {"device": 1}, "k_order must be on cuda:0"),
    ("k_order", {"address": 1028}, "k_order must be contiguous and start at"),
    ("bias", {"type": TYPES[torch.uint8]}, "bias must be floating .N. = .70."),
    ("bias", {"shape": (71,)}, "bias must be floating .N. = .70., got float32 .71."),
    ("bias", {"device": -1}, "bias must be on cuda:0 like qweight, got a tensor on no CUDA device"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_tensor_is_named(name: str, change: dict[str, object], message: str) -> None:
    tensors = good("w4a16_g64_asym")
    tensor = tensors[name]
    assert tensor is not None
    said = wrong({**tensors, name: replace(tensor, **change)}, scheme="w4a16_g64_asym")  # type: ignore[arg-type]
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"group": 0}, "group_size positive"),
        ({"group": 24}, "group_size must be 16, 32 or a multiple of 64, got 24"),
        ({"N": 1 << 31}, "N and K 0 to 2147483583"),
        ({"N": -1}, "N and K 0 to"),
        ({"zeros_are_offsets": 1}, "zeros must be given where zeros_are_offsets is true"),
    ],
)
def test_wrong_numbers_are_named(more: dict[str, int], message: str) -> None:
    for question in ("product", "dequantize"):
        assert message in wrong({**good(), "zeros": None}, question, **more)


def test_a_static_scale_goes_with_static_activations() -> None:
    tensors = {**good("w4a16_g64"), "zeros": None}
    given = Plain(TYPES[torch.float32], False, (2,))
    for act in range(1, 7):
        static = act >= 5
        assert wrong({**tensors, "x_static": given if static else None}, "a8", act=act) == ""
        said = wrong({**tensors, "x_static": None if static else given}, "a8", act=act)
        assert said.startswith(f"x_static must be {'contiguous float32 [2]' if static else 'None'} for act={act}, got ")
    assert wrong(tensors, "a8", act=7) == "act must be 1 to 6, got 7"
    for change, message in (
        ({"device": 1}, "x_static must be on cuda:0 like qweight, got cuda:1"),
        ({"device": -1}, "x_static must be on cuda:0 like qweight, got a tensor on no CUDA device"),
        ({"type": TYPES[torch.float16]}, "x_static must be contiguous float32 [2] for act=5, got float16 [2]"),
        ({"shape": (1,)}, "got float32 [1]"),
        ({"contiguous": False}, "got float32 [2] that is not contiguous"),
    ):
        assert message in wrong({**tensors, "x_static": replace(given, **change)}, "a8", act=5)  # type: ignore[arg-type]
    cpu = {**good("w4a8_g64", layout="cpu_tile_a8"), "x_static": replace(given, address=0)}  # address 0: it is not read
    assert "x_static must be on the CPU like qweight, got cuda:0" in wrong(cpu, "cpu a8", "w4a8_g64", act=5)


def test_codebooks_and_factors_are_checked() -> None:
    """Against the number of the codebook or the factors, the buffers that they ask for, and those that go with others."""
    floats, factored = {**good("nf4_g64"), "bias": None}, {**good("nvfp4_g16"), "bias": None}
    k_quant = {**good("q4_k"), "bias": None}
    scales, outer = factored["scales"], factored["outer_scales"]
    assert scales is not None
    assert outer is not None
    e8m0 = replace(scales, type=TYPES[torch.float8_e8m0fnu])
    for tensors, scheme, more, message in (
        (floats, "nf4_g64", {"codebook": 7}, "codebook must be 0 to 6, got 7"),
        (floats, "nf4_g64", {"codebook": -1}, "codebook must be 0 to 6, got -1"),
        (floats, "nf4_g64", {"bits": 3}, "codebook 1 takes 4 bits and no zeros, got bits=3"),
        ({**floats, "zeros": floats["scales"]}, "nf4_g64", {}, "takes 4 bits and no zeros, got bits=4 and zeros"),
        ({**floats, "outer_scales": outer}, "nf4_g64", {}, "outer_scales and outer_zeros go with factors"),
        ({**good("w4a16_g16"), "scales": e8m0}, "w4a16_g16", {}, "scales must be floating"),
        (factored, "nvfp4_g16", {"factors": 8}, "factors must be 0 to 7, got 8"),
        (factored, "nvfp4_g16", {"factors": 5}, "factors 5 take bits 4 to 4, group_size 32, codebook 4 and no offsets, got"),
        (factored, "nvfp4_g16", {"codebook": 0}, "factors 6 take bits 4 to 4, group_size 16, codebook 3 and no offsets, got"),
        (k_quant, "q4_k", {"bits": 6}, "qweight must be uint8 [2, 12288] for N=70, K=200, bits=6"),
        (k_quant, "q4_k", {"zeros_are_offsets": 0}, "factors 3 take bits 4 to 5, group_size 32, codebook 0 and offsets, got"),
        ({**k_quant, "scales": e8m0}, "q4_k", {}, "scales must be contiguous uint8 [2, 8, 64] with these factors"),
        ({**k_quant, "zeros": None}, "q4_k", {}, "zeros must be given with these factors"),
        ({**k_quant, "zeros": e8m0}, "q4_k", {}, "zeros must be contiguous uint8 [2, 8, 64] with these factors"),
        ({**k_quant, "outer_zeros": None}, "q4_k", {}, "outer_zeros must be given with these factors"),
        ({**k_quant, "outer_zeros": replace(outer, device=1)}, "q4_k", {}, "outer_zeros must be on cuda:0"),
        ({**factored, "scales": e8m0}, "nvfp4_g16", {}, "scales must be contiguous float8_e4m3fn"),
        ({**factored, "outer_scales": None}, "nvfp4_g16", {}, "outer_scales must be given with these factors"),
        ({**factored, "outer_scales": replace(outer, shape=(2, 2, 64))}, "nvfp4_g16", {}, "floating [2, 1, 64]"),
        ({**factored, "outer_scales": replace(outer, address=1026)}, "nvfp4_g16", {}, "outer_scales must be contiguous"),
        ({**factored, "outer_scales": replace(outer, device=1)}, "nvfp4_g16", {}, "outer_scales must be on cuda:0"),
        ({**factored, "outer_zeros": outer}, "nvfp4_g16", {}, "outer_zeros must be None with these factors"),
    ):  # fmt: skip
        for question in ("product", "dequantize"):
            assert message in wrong(tensors, question, scheme, **more), message
    assert wrong(floats, "a8", "nf4_g64") == "gemm_mma_tile_a8 takes integer codes: codebook must be 0"


def test_offsets_are_floating() -> None:
    assert "zeros must be floating" in wrong(good("w4a16_g64_asym"), scheme="w4a16_g64_asym", zeros_are_offsets=1)


def test_each_op_asks_for_what_it_alone_needs() -> None:
    assert wrong(good(M=33), "decode") == "gemv_mma_tile takes M <= 32 rows of x, got 33; call gemm_mma_tile"
    assert wrong(good("w4a16_g64_asym"), "a8", "w4a16_g64_asym").endswith("zeros must be None")
    assert "takes groups of 32 to 131072 columns, got group_size=16" in wrong(good("w4a16_g16"), "a8", "w4a16_g16")
    assert "qweight must be on a CUDA device" in wrong(
        {**good(), "qweight": Plain(TYPES[torch.uint8], False, (2, 8192), device=-1)}, "dequantize"
    )


# ---- the CPU's ----


@pytest.mark.parametrize("scheme", ["w4a16_g64", "w8a16_g32_asym", "w3a16_g8_fzero", "w4a16_channel_offset"])
def test_what_the_packers_for_the_cpu_make_is_taken(scheme: str) -> None:
    a16, a8 = scheme, scheme.replace("a16", "a8")
    for question, name, layout in (
        ("cpu product", a16, "cpu_tile_a16"), ("cpu decode", a16, "cpu_tile_a16"), ("cpu a8", a8, "cpu_tile_a8"),
    ):  # fmt: skip
        tensors = good(name, layout=layout)
        assert wrong(tensors, question, name) == ""
        assert wrong({**tensors, "bias": None, "k_order": None}, question, name) == ""
        assert tensors["bias"] is not None
        assert wrong({**tensors, "bias": replace(tensors["bias"], contiguous=False)}, question, name) == ""  # is copied
    assert wrong(good(a16, M=0, layout="cpu_tile_a16"), "cpu product", a16) == ""


BAD_FOR_THE_CPU: list[tuple[str, dict[str, object], str]] = [
    ("x", {"type": 0}, "x must be float32, bfloat16 or float16 [M, K], got float64 [5, 200]"),
    ("x", {"shape": (2, 5, 200)}, "x must be float32, bfloat16 or float16 [M, K], got bfloat16 [2, 5, 200]"),
    ("x", {"shape": (5, 264)}, "qweight must be contiguous uint8 [3, 4224] for N=70, K=264, bits=4, got uint8 [3, 3200]"),
    ("qweight", {"type": TYPES[torch.float16]}, "uint8 [3, 3200] for N=70, K=200, bits=4, got float16 [3, 3200]"),
    ("qweight", {"shape": (4, 3, 3200)}, "qweight must be contiguous uint8 [3, 3200]"),
    ("qweight", {"contiguous": False}, "bits=4, got uint8 [3, 3200] that is not contiguous"),
    ("scales", {"type": 0}, "scales must be contiguous floating [3, 4, 32], got float64 [3, 4, 32]"),
    ("scales", {"shape": (3, 4, 31)}, "scales must be contiguous floating [3, 4, 32], got float16 [3, 4, 31]"),
    ("scales", {"contiguous": False}, "scales must be contiguous floating [3, 4, 32]"),
    ("zeros", {"type": 0, "int32": True}, "zeros must be contiguous uint8 or floating [3, 4, 32] like scales, got int32"),
    ("zeros", {"shape": (3, 32, 4)}, "zeros must be contiguous uint8 or floating [3, 4, 32] like scales, got uint8 [3, 32, 4]"),
    ("zeros", {"contiguous": False}, "like scales, got uint8 [3, 4, 32] that is not contiguous"),
    ("k_order", {"int32": False}, "k_order must be contiguous int32 [K] = [200], got float64 [200]"),
    ("k_order", {"shape": (199,)}, "k_order must be contiguous int32 [K] = [200], got int32 [199]"),
    ("k_order", {"contiguous": False}, "k_order must be contiguous int32 [K] = [200]"),
    ("bias", {"type": TYPES[torch.uint8]}, "bias must be floating [N] = [70], got uint8 [70]"),
    ("bias", {"shape": (71,)}, "bias must be floating [N] = [70], got float32 [71]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD_FOR_THE_CPU, ids=lambda value: str(value)[:40])
def test_a_wrong_tensor_on_the_cpu_is_named(name: str, change: dict[str, object], message: str) -> None:
    for question, scheme, layout in (
        ("cpu product", "w4a16_g64_asym", "cpu_tile_a16"), ("cpu a8", "w4a8_g64_asym", "cpu_tile_a8"),
    ):  # fmt: skip
        tensors = good(scheme, layout=layout)
        tensor = tensors[name]
        assert tensor is not None
        said = wrong({**tensors, name: replace(tensor, **change)}, question, scheme)  # type: ignore[arg-type]
        assert message in said, said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8, group_size positive and out_features not negative, got bits=1"),
        ({"bits": 9}, "got bits=9"),
        ({"group": 0}, "group_size=0"),
        ({"N": -1}, "out_features=-1"),
        ({"group": 12}, "group_size must be a multiple of 8, got 12"),
        ({"zeros_are_offsets": 1}, "zeros must be given where zeros_are_offsets is true, got None"),
    ],
)
def test_wrong_numbers_on_the_cpu_are_named(more: dict[str, int], message: str) -> None:
    assert message in wrong({**good(layout="cpu_tile_a16"), "zeros": None}, "cpu product", **more)


def test_each_op_of_the_cpu_asks_for_what_it_alone_needs() -> None:
    tensors = good(M=9, layout="cpu_tile_a16")
    assert wrong(tensors, "cpu decode") == "gemv_cpu_tile_a16 takes M <= 8 rows of x, got 9; call gemm_cpu_tile_a16"
    offsets = good("w4a16_g64_asym", layout="cpu_tile_a16")
    assert "zeros must be contiguous floating [3, 4, 32]" in wrong(
        offsets, "cpu product", "w4a16_g64_asym", zeros_are_offsets=1
    )
    for longest, zeros in ((1 << 16, "uint8"), (1 << 17, "")):
        for K in (longest, longest + 8):
            said = wrong(long_group(K, zeros), "cpu a8", N=32, K=K, bits=4, group=K)
            too_long = f"groups must be at most {longest} long with int8 activations, got {K} of K={K}"
            assert said == (too_long if longest < K else "")


def long_group(K: int, zeros: str) -> dict[str, Plain | None]:
    """32 rows with one group, with and without zero points."""
    of_group = Plain(TYPES[torch.uint8], False, (1, 1, 32), device=-1)
    return {
        "x": Plain(TYPES[torch.float32], False, (1, K), device=-1),
        "qweight": Plain(TYPES[torch.uint8], False, (1, 16 * K), device=-1),
        "scales": replace(of_group, type=TYPES[torch.float16]),
        "zeros": of_group if zeros else None,
    }


# ---- CUDA's devices, environment and log ----


@pytest.mark.parametrize(
    ("sm", "message"), [(75, "this device has 7.5"), (70, "this device has 7.0"), (80, ""), (120, "")]
)
def test_unsupported_architectures_are_refused(sm: int, message: str) -> None:
    said = wrong(good(), "device", sm=sm)
    assert said.endswith(message)
    assert (said == "") == (message == "")


def test_each_line_is_logged_once(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(setting: str | None, first: int) -> list[str]:
        if setting is None:
            monkeypatch.delenv("QKERNELS_LOG", raising=False)
        else:
            monkeypatch.setenv("QKERNELS_LOG", setting)
        emulator.run(calls.UNIT, emulator.Call("log", {}, {"threads": 4, "lines": 3, "first": first}))
        return sorted(capfd.readouterr().err.splitlines())

    assert lines("1", 10) == [
        "qkernels: line 10",
        "qkernels: line 11",
        "qkernels: line 12",
    ]  # by four threads, twice each
    assert lines("1", 11) == ["qkernels: line 13"]
    assert lines("0", 20) == lines(None, 20) == []


@pytest.mark.parametrize(("value", "half"), [(None, 0), ("fp32", 0), ("fp16", 1), ("fp8", -1), ("", -1)])
def test_the_setting_for_fp16_sums(value: str | None, half: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("QKERNELS_ACCUMULATE", raising=False)
    else:
        monkeypatch.setenv("QKERNELS_ACCUMULATE", value)
    found = torch.full((1,), 7, dtype=torch.int32)
    emulator.run(calls.UNIT, emulator.Call("accumulates", {"half": found}))
    assert int(found) == half


def test_remembered_choices_are_the_choices() -> None:
    """More problems than the table has places, by several threads."""
    differ = torch.zeros(1, dtype=torch.int32)
    emulator.run(calls.UNIT, emulator.Call("remember", {"differ": differ}, {"threads": 3, "count": 700}))
    assert int(differ) == 0
