"""`QuantLinear` as a module: results, dtypes, moving, copying, state dicts, compile, export, gradients, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from qkernels import Problem, QuantLinear, QuantScheme, QuantTensor, UnsupportedProblem, extension, list_kernels
from qkernels.errors import ArgumentError, SchemeError
from qkernels.layouts import get_layout
from tests.ops.conftest import BF16_ISAS
from tests.ops.helpers import integers, layer_in
from tests.strategies import random_weight, same_weight

SCHEMES = [
    "w4a16_g32",
    "w4a16_g32_asym",
    "w4a16_g64_fzero",
    "w4a16_g64_offset",
    "w3a16_g32",
    "w8a16_channel",
    "w8a16_g32_asym",
]


def layer_of(
    scheme: str = "w4a16_g32", N: int = 70, K: int = 100, act_order: bool = False, **kwargs: object
) -> QuantLinear:
    return QuantLinear.from_quant_tensor(random_weight(scheme, N, K, act_order=act_order, exact=True), **kwargs)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_on_integers(scheme: str, act_order: bool, dtype: torch.dtype) -> None:
    """Integer inputs and power-of-two scales: every partial sum is exact, so the only rounding is that of the output."""
    bias = integers(70, dtype=dtype)
    layer = layer_of(scheme, act_order=act_order, bias=bias, dtype=dtype)
    x = integers(2, 3, 100, dtype=dtype)
    expected = (x.double() @ layer.quant_tensor().dequantize().double().T + bias.double()).to(dtype)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == (2, 3, 70)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
def test_the_weight_comes_back_bit_for_bit(scheme: str, act_order: bool) -> None:
    weight = random_weight(scheme, 33, 75, act_order=act_order)
    assert same_weight(QuantLinear.from_quant_tensor(weight).quant_tensor(), weight)


def test_from_linear_rounds_to_nearest() -> None:
    linear = nn.Linear(64, 48)
    layer = QuantLinear.from_linear(linear, "w8a16_g32")
    # Half a step, and what the largest weight loses to a scale rounded to fp16: 128 steps times 2^-11.
    weight = layer.quant_tensor()
    step = weight.scales.float().abs()[:, weight.column_groups()]
    assert ((layer.dequantize() - linear.weight).abs() <= step * (0.5 + 128 * 2**-11)).all()
    assert torch.equal(layer.bias, linear.bias)
    assert layer.dtype == torch.float32


def test_empty_batch_and_empty_layers() -> None:
    assert layer_of()(torch.empty(0, 100)).shape == (0, 70)
    assert layer_of()(torch.empty(2, 0, 100)).shape == (2, 0, 70)


def test_constructed_layer_is_zero_and_can_be_filled() -> None:
    layer = QuantLinear(100, 70, scheme="w4a16_g32")
    assert torch.equal(layer(integers(2, 100)), torch.zeros(2, 70))
    layer.load_state_dict(layer_of(bias=integers(70)).state_dict())
    assert torch.equal(layer(integers(2, 100)), layer_of(bias=integers(70))(integers(2, 100)))


# --- moving and copying ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)],
)
def test_casting_changes_activations_not_codes_or_scales(cast: object) -> None:
    layer = layer_of("w4a16_g32_asym", bias=integers(70))
    before = {name: t.clone() for name, t in layer.named_buffers()}
    cast(layer)
    assert layer.bias.dtype == layer.dtype != torch.float32
    after = dict(layer.named_buffers())
    assert after.keys() == before.keys() == {"_extra_state", "qweight", "scales", "zeros"}
    for name, t in after.items():
        assert t.dtype == before[name].dtype and torch.equal(t, before[name]), name
    assert layer(integers(3, 100, dtype=layer.dtype)).dtype == layer.dtype


@pytest.mark.parametrize("cast", [lambda m: m.type(torch.bfloat16), lambda m: m.type("torch.BFloat16Tensor")])
def test_casting_everything_casts_activations_alone(cast: Callable[[nn.Module], object]) -> None:
    """`Module.type` casts integers as well, unlike `to`."""
    model = nn.Sequential(layer_of("w4a16_g32_asym", act_order=True, bias=integers(70)))
    before = {name: t.clone() for name, t in model.named_buffers()}
    cast(model)
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in model.named_buffers())
    assert (
        model[0].bias.dtype == model[0].dtype == model(integers(3, 100, dtype=torch.bfloat16)).dtype == torch.bfloat16
    )


def test_float64_is_refused_in_words() -> None:
    """No kernel has it. A layer stays in float32 when its model is cast, and says so to what comes in."""
    model, x = nn.Sequential(layer_of(bias=integers(70))), integers(3, 100)
    expected = model(x)
    model.double()
    assert model[0].dtype == model[0].bias.dtype == torch.float32
    assert torch.equal(model(x), expected)
    with pytest.raises(ArgumentError, match="x must be float32, bfloat16 or float16"):
        model(x.double())
    for on_unsupported in ("raise", "reference"):
        with pytest.raises(UnsupportedProblem, match=r"reference +activations must be .* \(got torch.float64\)"):
            QuantLinear.from_linear(nn.Linear(32, 8).double(), "w4a16_g32", on_unsupported=on_unsupported)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_cast_to_what_no_activation_can_be_changes_nothing(dtype: torch.dtype) -> None:
    layer = layer_of(bias=integers(70))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(ArgumentError, match="computes in float16, bfloat16 or float32 and cannot be cast to"):
        layer.type(dtype)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert layer.dtype == torch.float32


def test_dtypes_may_be_named() -> None:
    assert QuantLinear(64, 32, scheme="w4a16_g32", dtype="bfloat16").dtype == torch.bfloat16
    assert layer_of(dtype="torch.float16").dtype == torch.float16
    with pytest.raises(
        ArgumentError, match="dtype must be a torch.dtype or the name of one, such as 'bfloat16', got 'bf17'"
    ):
        QuantLinear(64, 32, dtype="bf17")
    named, plain = (
        Problem(64, 32, "w4a16_g32", "bfloat16"),
        Problem(64, 32, QuantScheme.parse("w4a16_g32"), torch.bfloat16),
    )  # type: ignore[arg-type]
    assert named == plain
    assert str(list_kernels(named)) == str(list_kernels(plain))


@pytest.mark.parametrize("layout", ["cpu_tile_a16", "reference"])
def test_a_layer_made_in_inference_mode_is_usable_outside(layout: str) -> None:
    with torch.inference_mode():
        linear = nn.Linear(96, 40)
        on = "reference" if layout == "reference" else "raise"
        scheme = "w4a16_g12" if layout == "reference" else "w4a16_g32"  # which no compiled kernel takes
        layer = QuantLinear.from_linear(linear, scheme, on_unsupported=on)
    assert layer.layout == layout
    assert not any(t.is_inference() for t in (*layer.parameters(), *layer.buffers()))
    state = copy.deepcopy(layer).state_dict()
    assert layer.load_state_dict(state) == ([], [])
    x = integers(3, 96).requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.dequantize().sum(0).expand(3, 96))
    assert layer.bias.grad.tolist() == [3.0] * 40


def test_casting_twice_returns_to_the_same_results() -> None:
    layer, x = layer_of("w4a16_g32_fzero"), integers(3, 100)
    expected = layer(x)
    assert torch.equal(layer.half().float()(x), expected)


def test_deepcopy_and_pickle() -> None:
    layer, x = layer_of("w4a16_g32_asym", act_order=True, bias=integers(70)), integers(3, 100)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        assert same_weight(twin.quant_tensor(), layer.quant_tensor())
        assert twin.qweight.data_ptr() != layer.qweight.data_ptr()


def test_meta_and_back() -> None:
    layer = QuantLinear(100, 70, scheme="w4a16_g32_asym", device="meta", ordered=True)
    assert all(t.is_meta for t in layer.buffers())
    assert layer(torch.empty(5, 100, device="meta")).shape == (5, 70)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(layer_of("w4a16_g32_asym", act_order=True, bias=integers(70)).state_dict())
    assert torch.equal(
        layer(integers(3, 100)), layer_of("w4a16_g32_asym", act_order=True, bias=integers(70))(integers(3, 100))
    )


def from_elsewhere(layer: QuantLinear) -> QuantLinear:
    """As if the layer had been packed on a device with another layout, of which there is none here."""
    moved = layer_in("reference", layer.quant_tensor(), layer.bias)
    moved._device_type = "cuda"
    return moved


def test_moving_to_a_device_with_another_layout_repacks() -> None:
    layer = layer_of("w4a16_g32_asym", act_order=True, bias=integers(70))
    weight, expected, moved = layer.quant_tensor(), layer(integers(3, 100)), from_elsewhere(layer)
    assert moved.qweight.shape == (70, 100) != layer.qweight.shape
    moved.to("cpu")
    assert moved.layout == layer.layout == "cpu_tile_a16"
    assert torch.equal(moved.qweight, layer.qweight)
    assert same_weight(moved.quant_tensor(), weight)
    assert torch.equal(moved(integers(3, 100)), expected)
    moved.to("meta")
    assert moved.qweight.is_meta


def test_buffers_that_something_else_moved_are_noticed() -> None:
    layer, x = layer_of("w4a16_g32_asym"), integers(3, 100)
    # A hook moved a layer packed for another device onto the CPU: wrong layout for its device.
    moved = from_elsewhere(layer)
    assert torch.equal(moved(x), layer(x))
    assert moved.layout == "cpu_tile_a16"


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_buffers_and_bias_that_something_else_replaced_are_used() -> None:
    layer, other, x = layer_of(bias=integers(70)), layer_of(bias=integers(70, seed=1)), integers(3, 100)
    mine, theirs = layer(x), other(x)
    state = {name: tensor for name, tensor in other.named_buffers()} | dict(other.named_parameters())
    assert torch.equal(torch.func.functional_call(layer, state, (x,)), theirs)
    assert torch.equal(layer(x), mine)
    layer.qweight.data, layer.bias.data = torch.zeros_like(layer.qweight), integers(70, seed=2)
    layer.scales = torch.zeros_like(layer.scales)
    assert torch.equal(layer(x), integers(70, seed=2).expand(3, 70))
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    assert torch.equal(layer(x), 2 * integers(70, seed=2).expand(3, 70))


# --- state dict -----------------------------------------------------------------------------------------------------------


def test_state_dict_holds_tensors_only_and_round_trips() -> None:
    source = layer_of("w4a16_g32_asym", act_order=True, bias=integers(70))
    state = source.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    target = QuantLinear(100, 70, scheme="w4a16_g32_asym", ordered=True)
    assert target.load_state_dict(state) == ([], [])
    assert same_weight(target.quant_tensor(), source.quant_tensor())
    assert target.qweight.data_ptr() != source.qweight.data_ptr()


def test_state_dict_of_another_layout_is_repacked() -> None:
    source = layer_in("reference", random_weight("w4a16_g32_asym", 70, 100, act_order=True))
    target = QuantLinear(100, 70, bias=False, scheme="w4a16_g32_asym")
    target.load_state_dict(source.state_dict())
    assert target.layout == "cpu_tile_a16"
    assert same_weight(target.quant_tensor(), source.quant_tensor())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("qweight", torch.zeros(3, 1600, dtype=torch.uint8), "qweight must be uint8"),
        ("scales", torch.full((3, 4, 32), float("nan")), "scales must be finite"),
        ("scales", torch.zeros(3, 5, 32), "scales must be"),
        ("k_order", torch.zeros(100, dtype=torch.int32), "k_order must be a permutation of 0 … 99"),
        ("k_order", torch.arange(100, dtype=torch.int32) + 1, "k_order must be a permutation"),
        ("k_order", -torch.arange(100, dtype=torch.int32), "k_order must be a permutation"),
        ("zeros", torch.full((3, 4, 32), 16, dtype=torch.uint8), "zeros must be 0 … 15"),
        ("zeros", None, r"zeros must be uint8 \[3, 4, 32\] .* got absent"),
        ("bias", torch.zeros(71), r"bias must be \[70\], got \[71\]"),
    ],
)
def test_a_hostile_state_dict_is_refused(key: str, value: torch.Tensor | None, message: str) -> None:
    state = layer_of("w4a16_g32_asym", act_order=True, bias=integers(70)).state_dict()
    if value is None:
        del state[key]
    else:
        state[key] = value
    layer = QuantLinear(100, 70, scheme="w4a16_g32_asym", ordered=True)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer.qweight, torch.zeros_like(layer.qweight)), "a refused state dict must change nothing"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (b'{"layout": "cpu_tile_a16", "version": 99, "scheme": "w4a16_g32", "shape": [70, 100]}', "version 99"),
        (
            b'{"layout": "cpu_tile_a16", "version": 1, "scheme": "w4a16_g64", "shape": [70, 100]}',
            "buffers hold w4a16_g64",
        ),
        (
            b'{"layout": "cpu_tile_a16", "version": 1, "scheme": "w4a16_g32", "shape": [1, 2]}',
            r"hold w4a16_g32 \[1, 2\]",
        ),
        (b'{"layout": "other", "version": 1, "scheme": "w4a16_g32", "shape": [70, 100]}', "layout must be one of"),
        (b"[1, 2]", "must be JSON"),
        (b"\xff", "must be JSON"),
    ],
)
def test_a_lying_packing_is_refused(extra: bytes, message: str) -> None:
    state = layer_of().state_dict()
    state["_extra_state"] = torch.tensor(list(extra), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        layer_of().load_state_dict(state)


def test_missing_and_unexpected_keys_are_named() -> None:
    state = layer_of(bias=integers(70)).state_dict()
    with pytest.raises(RuntimeError, match='Unexpected key.*"bias"'):
        layer_of().load_state_dict(state)
    with pytest.raises(RuntimeError, match='Missing key.*"qweight"'):
        layer_of().load_state_dict({})


def test_static_scales_of_x_survive() -> None:
    """Copies, state dicts, `assign`, meta, casts of activations: fp32 as it was, or an error that names it."""
    layer = layer_of("w8a8sz_channel", bias=integers(70))
    x, static = integers(4, 100), layer.packed()["x_static"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).bfloat16().float()):
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.packed()["x_static"], static)
    state = layer.state_dict()
    for device, assign in (("cpu", False), ("meta", True)):
        empty = QuantLinear(100, 70, scheme="w8a8sz_channel", device=device)
        empty.load_state_dict(state, assign=assign)
        assert torch.equal(empty(x), layer(x))
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (4, 70)
    for wrong, said in (
        (torch.tensor([torch.nan, 0.0]), "scale of x must be positive"),
        (None, "x_static must be float32"),
    ):
        with pytest.raises(RuntimeError, match=said):
            empty.load_state_dict({name: t for name, t in (state | {"x_static": wrong}).items() if t is not None})


# --- compile, export, autograd ---------------------------------------------------------------------------------------------


def test_compiles_to_one_graph_with_any_number_of_tokens() -> None:
    layer = layer_of("w4a16_g32_asym", act_order=True, bias=integers(70))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 5, 33):
        assert torch.equal(compiled(integers(2, tokens, 100)), layer(integers(2, tokens, 100)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # M = 1 may specialize
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a8sz_channel", "nvfp4_g16"])
def test_exports_with_a_dynamic_number_of_tokens(scheme: str) -> None:
    """torch.export 2.13 miscounts buffers after absent ones: static scales and outer factors come after zeros."""
    layer = layer_of(scheme, bias=integers(70))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (integers(4, 100),), dynamic_shapes=({0: tokens},))
    assert f"qkernels.gemm_{layer.layout}" in str(program.graph)
    assert torch.equal(program.module()(integers(9, 100)), layer(integers(9, 100)))


def test_fx_records_a_call_of_the_module() -> None:
    """As for torch's own layers; in its model's place, with any rank of x."""
    model = nn.Sequential(layer_of(bias=integers(70)), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    for shape in ((2, 100), (2, 3, 100), (100,)):
        assert torch.equal(traced(integers(*shape)), model(integers(*shape)))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(ArgumentError, match="torch.fx cannot trace a QuantLinear with forward hooks"):
        torch.fx.symbolic_trace(model)


def test_gradients_flow_to_x_and_bias() -> None:
    layer = layer_of("w4a16_g32_asym", act_order=True, bias=integers(70).requires_grad_())
    x = integers(3, 100).requires_grad_()
    layer(x).square().sum().backward()
    w, twin, bias = layer.dequantize(), integers(3, 100).requires_grad_(), integers(70).requires_grad_()
    (twin @ w.T + bias).square().sum().backward()
    assert torch.equal(x.grad, twin.grad)
    assert torch.equal(layer.bias.grad, bias.grad)


def test_autocast_runs_in_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_of()(integers(2, 100)).dtype == torch.bfloat16


# --- refusals --------------------------------------------------------------------------------------------------------------


def torch_ops_of(call: Callable[[], object]) -> Counter[str]:
    """How often each op was dispatched, composite ones and those inside other ops included; and `ALLOCATIONS`."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # where the allocator's are, whatever called it
    allocations = [event for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return Counter(event.name for event in recorded.events()) | Counter({ALLOCATIONS: len(allocations)})


ALLOCATIONS = "taken from torch's allocator"
COPIES = {"aten::copy_", "aten::contiguous", "aten::clone", "aten::to", "aten::_to_copy", "aten::zeros", "aten::cat"}


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
@pytest.mark.parametrize(
    ("scheme", "dtype", "allocations"),
    [
        ("w4a16_g32", torch.float32, 1),  # y
        ("w4a16_g32", torch.bfloat16, 1 if extension.status().isa in BF16_ISAS else 2),  # and x in fp32
        ("w4a8_g32", torch.bfloat16, 2),  # and the codes of x
    ],
)
@torch.no_grad()
def test_a_decode_step_copies_nothing(
    shape: tuple[int, ...], scheme: str, dtype: torch.dtype, allocations: int
) -> None:
    layer = layer_of(scheme, K=96, bias=integers(70, dtype=dtype), dtype=dtype)
    x = integers(*shape, dtype=dtype)
    ops = torch_ops_of(lambda: layer(x))
    assert ops[f"qkernels::gemm_{layer.layout}"] == 1
    assert not COPIES & ops.keys()
    assert ops[ALLOCATIONS] == allocations
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a cast that was asked for is seen
        assert {"aten::to", "aten::copy_"} <= torch_ops_of(lambda: layer(x.half())).keys()


def test_wrong_inputs_are_named() -> None:
    layer = layer_of()
    with pytest.raises(ArgumentError, match=r"x must be \[M, K\] with K = in_features = 100, got \[2, 99\]"):
        layer(torch.zeros(2, 99))
    with pytest.raises(ArgumentError, match=r"x must be float32, bfloat16 or float16 \[M, K\], got float64 \[2, 100\]"):
        layer(torch.zeros(2, 100, dtype=torch.float64))
    with pytest.raises(SchemeError, match="a scheme looks like"):
        QuantLinear(64, 64, scheme="int4")
    with pytest.raises(ArgumentError, match=r"bias must be \[N\] = \[70\], got \[3\]"):
        layer_of(bias=torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"takes one \[N, K\] weight, got codes of shape \[2, 8, 32\]"):
        QuantLinear.from_quant_tensor(random_weight("w4a16_g32", 8, 32, experts=(2,)))


def test_nan_weights_are_refused() -> None:
    linear = nn.Linear(32, 8)
    with torch.no_grad():
        linear.weight[1, 2] = float("nan")
    with pytest.raises(ArgumentError, match=r"weight \[8, 32\] has 1 NaN or infinite entries"):
        QuantLinear.from_linear(linear, "w4a16_g32")


def test_a_problem_without_a_kernel_lists_every_reason() -> None:
    weight = random_weight("w4a16_g12", 8, 24)
    with pytest.raises(UnsupportedProblem, match="no kernel for w4a16_g12, N=8 K=24, float16, cpu") as caught:
        QuantLinear.from_quant_tensor(weight)
    assert "cpu.cpu_tile_a16" in str(caught.value)
    assert 'on_unsupported="reference"' in str(caught.value)
    layer = QuantLinear.from_quant_tensor(weight, on_unsupported="reference", dtype=torch.float32)
    assert layer.layout == "reference"
    assert torch.equal(layer(torch.eye(24)).T.contiguous(), weight.dequantize())


def test_buffer_names_are_those_of_the_layout() -> None:
    layer = layer_of(act_order=True)
    names = [buffer.name for buffer in get_layout(layer.layout).buffers]
    assert sorted(layer._buffers) == sorted(["_extra_state", *names])
    assert [t is None for t in layer._buffers.values()] == [False] * 4 + [True] * 3  # absent ones last: torch.export
    assert {name for name, _ in layer.named_buffers()} == {"_extra_state", *names} - {
        "zeros",
        "outer_scales",
        "outer_zeros",
    }
    assert isinstance(layer_of().quant_tensor(), QuantTensor)
