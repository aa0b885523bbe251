"""What every registered layout, format, quantizer and kernel must do. Parametrized over the registries: whatever is
registered is tested from that moment.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from qkernels import QuantScheme, QuantTensor
from qkernels.checkpoint.registry import WRITTEN, detect
from qkernels.errors import ConversionError, QKernelsError, SchemeError
from qkernels.formats import Format, Written
from qkernels.kernels.catalogue import KERNELS, REFERENCES, KernelSpec, Problem
from qkernels.layouts import LAYOUTS, Layout, empty_buffers, unpack_checked
from qkernels.quantizers import QUANTIZERS, RTN
from qkernels.scheme import ACTIVATIONS
from tests.ops.helpers import arguments, integers
from tests.refusals import REFUSED, SCHEMES, reasons_for
from tests.strategies import bytes_of, random_weight, same_weight, scheme_taken

SHAPES = [(32, 64), (33, 75), (1, 1), (70, 200)]
weights = pytest.mark.parametrize(("N", "K"), SHAPES)
schemes = pytest.mark.parametrize("scheme", SCHEMES)
act_orders = pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
formats = pytest.mark.parametrize("fmt", WRITTEN.values(), ids=lambda fmt: fmt.name)
kernels = pytest.mark.parametrize("kernel", [*KERNELS, *REFERENCES], ids=lambda kernel: kernel.name)


def scheme_for(layout: str, zeros: str = "_asym") -> str:
    """A scheme that the layout holds: those with int8 activations hold no other."""
    return scheme_taken(LAYOUTS[layout], f"w4a16_g32{zeros}", "w4a8_g32")


# --- layouts ----------------------------------------------------------------------------------------------------------------


@layouts
@schemes
@weights
@act_orders
def test_layout_round_trip(layout: Layout, scheme: str, N: int, K: int, act_order: bool) -> None:
    weight = random_weight(scheme, N, K, act_order=act_order)
    if layout.reasons(N, K, weight.scheme):
        with pytest.raises(ConversionError, match=str(weight.scheme)):
            layout.pack(weight)
        return
    packed = layout.pack(weight)
    assert same_weight(layout.unpack(packed, N, K, weight.scheme), weight)
    assert same_weight(unpack_checked(layout, packed, N, K, weight.scheme), weight)
    on_meta = layout.pack(weight.to("meta"))
    for name, t in packed.items():
        assert (t is None) == (on_meta[name] is None)
        assert t is None or (t.shape, t.dtype, t.is_contiguous()) == (on_meta[name].shape, on_meta[name].dtype, True), (
            name
        )
    stated = layout.on_meta(N, K, weight.scheme, torch.float16, weight.group_index is not None)
    assert {name: None if t is None else (t.shape, t.dtype) for name, t in packed.items()} == {
        name: None if t is None else (t.shape, t.dtype) for name, t in stated.items()
    }


@layouts
@pytest.mark.parametrize(("N", "K"), [(0, 64), (64, 0), (0, 0)])
def test_layout_takes_empty_weights(layout: Layout, N: int, K: int) -> None:
    weight = random_weight(scheme_taken(layout, "w4a16_g32_asym", "w4a8_g32"), N, K)
    assert same_weight(layout.unpack(layout.pack(weight), N, K, weight.scheme), weight)


@layouts
def test_layout_takes_strided_weights_and_experts(layout: Layout) -> None:
    dense = random_weight(scheme_taken(layout, "w4a16_g32_asym", "w4a8_g32"), 40, 96, experts=(3,))
    strided = QuantTensor(
        dense.codes.transpose(1, 2).contiguous().transpose(1, 2), dense.scales.transpose(0, 2).contiguous().transpose(0, 2),
        dense.zeros, None, dense.scheme,
    )  # fmt: skip
    assert not strided.codes.is_contiguous()
    packed = layout.pack(strided)
    assert same_weight(layout.unpack(packed, 40, 96, dense.scheme), dense)
    zeros = None if dense.zeros is None else dense.zeros[1]
    one = layout.pack(QuantTensor(dense.codes[1], dense.scales[1], zeros, None, dense.scheme))
    assert all(t is None or torch.equal(packed[name][1], t) for name, t in one.items())


@layouts
def test_empty_buffers_are_a_weight_of_zeros(layout: Layout) -> None:
    scheme = QuantScheme.parse(scheme_taken(layout, "w4a16_g32_asym", "w4a8_g32"))
    buffers = empty_buffers(layout, 40, 96, scheme, torch.float16, True, "cpu")
    weight = unpack_checked(layout, buffers, 40, 96, scheme)
    assert torch.equal(weight.dequantize(), torch.zeros(40, 96))


# --- formats ----------------------------------------------------------------------------------------------------------------


@formats
@schemes
@act_orders
def test_format_round_trip_or_refusal(fmt: Format, scheme: str, act_order: bool) -> None:
    """What is written reads back as an equal weight; what cannot be written is refused with every reason (tests/refusals.py)
    before anything is made."""
    weight = random_weight(scheme, 64, 256, act_order=act_order)
    ordered = weight.group_index is not None
    if reasons := reasons_for(fmt.name, scheme, ordered):
        with pytest.raises(ConversionError) as refused:
            fmt.write(weight)
        assert all(reason in str(refused.value) for reason in reasons), refused.value
        return
    config = fmt.config_of(Written(weight.scheme, {"layer": weight.scheme}, act_order=ordered))
    tensors = fmt.write(weight)
    reader = detect(config)
    assert reader is fmt or (fmt.name == reader.name.partition(" ")[0] == "compressed-tensors")
    assert set(reader.required) <= tensors.keys() <= set(reader.suffixes)
    again = reader.parse("layer", tensors, config).weight
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.scheme.bits == weight.scheme.bits
    rewritten = fmt.write(again)
    assert all(torch.equal(bytes_of(rewritten[name]), bytes_of(t)) for name, t in tensors.items())


def test_what_every_format_refuses_is_written_down() -> None:
    assert list(REFUSED) == list(WRITTEN)


def test_every_integer_scheme_has_a_lossless_format() -> None:
    for scheme, act_order in itertools.product(SCHEMES, [False, True]):
        weight = random_weight(scheme, 40, 96, act_order=act_order)
        native = WRITTEN["native"]
        config = native.config_of(Written(weight.scheme, {"layer": weight.scheme}, act_order=act_order))
        assert same_weight(native.parse("layer", native.write(weight), config).weight, weight), scheme


# --- quantizers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", QUANTIZERS.values(), ids=lambda method: method.__name__)
@pytest.mark.parametrize("fields", [{"bits": 9}, {"group_size": 0}, {"group_size": -1}, {"symmetric": 1}])
def test_quantizers_validate_their_options(method: type, fields: dict[str, object]) -> None:
    with pytest.raises(QKernelsError, match=next(iter(fields))):
        method(**fields)


@schemes
def test_round_to_nearest_takes_every_scheme(scheme: str) -> None:
    weight = torch.randn(33, 75, generator=torch.Generator().manual_seed(0))
    if ACTIVATIONS[QuantScheme.parse(scheme).act].static:
        with pytest.raises(SchemeError, match="from a file"):
            RTN().with_scheme(scheme)
        return
    made = RTN().with_scheme(scheme).quantize(weight)
    assert made.scheme == QuantScheme.parse(scheme)
    assert (made.dequantize() - weight).norm() < weight.norm()


# --- kernels ----------------------------------------------------------------------------------------------------------------


def skip_unless_it_runs(kernel: KernelSpec, problem: Problem) -> None:
    """Kernels of other devices have their own tests (tests/cuda runs them on a CPU)."""
    if reasons := kernel.reasons(problem):
        pytest.skip(f"{kernel.name}: {reasons[0]}")


@kernels
@schemes
@act_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_is_exact_where_bits_are_exact(
    kernel: KernelSpec, scheme: str, act_order: bool, dtype: torch.dtype
) -> None:
    """Integers and power-of-two scales: the only rounding left is that of the output."""
    N, K = 70, 200
    weight = random_weight(scheme, N, K, act_order=act_order, exact=True)
    skip_unless_it_runs(kernel, Problem(N, K, weight.scheme, dtype))
    op = getattr(torch.ops.qkernels, kernel.op)
    for M in (0, 1, 2, 9, 17):
        x, bias = integers(M, K, dtype=dtype), integers(N, dtype=dtype)
        if weight.scheme.codebook is not None and weight.scheme.act is None:
            # its entries are no short fractions: a sum of one product is exact
            x, bias = 2 * torch.eye(K, dtype=dtype)[:M], torch.zeros(N, dtype=dtype)
        if weight.scheme.act == "int8":  # max |x| / 127 = 1 for every token: quantized to themselves
            x[:, 5] = 127
        seen = x.clone()
        if weight.scheme.act == "int8_wide":  # max |x| / 127.5 = 1, and 127.5 becomes 127
            x[:, 5], seen[:, 5] = 127.5, 127
        elif weight.scheme.act == "int8_zero":  # 255 steps of 1, and 0 is the zero point
            x[:, 5], x[:, 6] = 127, -128
        elif weight.scheme.act == "int8_outliers":  # max |x| / 127 = 1 / 32
            x[:, 5] = 127 / 32
        elif weight.x_static is not None:  # the whole numbers from -3 to 3 are multiples of 1 / 32, its scale
            assert float(weight.x_static[0]) == 1 / 32
        if weight.scheme.act != "int8_wide":
            seen = x
        expected = (seen.double() @ weight.dequantize().double().T + bias.double()).to(dtype)
        assert torch.equal(op(*arguments(weight, x, bias, kernel.layout)), expected), M


@kernels
@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16_g32_asym", "w4a8_g32", "w4a8_g32_asym"])
def test_kernel_passes_opcheck(kernel: KernelSpec, scheme: str) -> None:
    weight = random_weight(scheme, 40, 96, act_order=True, exact=True)
    skip_unless_it_runs(kernel, Problem(40, 96, weight.scheme, torch.float32))
    args = arguments(weight, integers(3, 96).requires_grad_(), integers(40), kernel.layout)
    result = opcheck(getattr(torch.ops.qkernels, kernel.op).default, args)
    assert set(result.values()) == {"SUCCESS"}, result


@kernels
def test_kernel_compiles_into_one_graph_with_dynamic_tokens(kernel: KernelSpec) -> None:
    weight = random_weight(scheme_for(kernel.layout), 40, 96, exact=True)
    skip_unless_it_runs(kernel, Problem(40, 96, weight.scheme, torch.float32))
    op = getattr(torch.ops.qkernels, kernel.op)

    def run(x: torch.Tensor) -> torch.Tensor:
        return op(*arguments(weight, x * 2, layout=kernel.layout)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (2, 5, 64):
        assert torch.equal(compiled(integers(M, 96)), run(integers(M, 96)))
    torch._dynamo.reset()


@kernels
def test_a_wrong_weight_is_noticed(kernel: KernelSpec) -> None:
    """Negative control of the exactness test: one code off by one, in one place, must show."""
    weight = random_weight(scheme_for(kernel.layout, zeros=""), 40, 96, exact=True)
    skip_unless_it_runs(kernel, Problem(40, 96, weight.scheme, torch.float32))
    wrong = weight.codes.clone()
    wrong[39, 95] ^= 1
    off = QuantTensor(wrong, weight.scales, None, None, weight.scheme)
    x = torch.ones(1, 96)
    op = getattr(torch.ops.qkernels, kernel.op)
    assert not torch.equal(op(*arguments(off, x, layout=kernel.layout)), x @ weight.dequantize().T)
