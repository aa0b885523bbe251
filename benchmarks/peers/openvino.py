"""OpenVINO's own runtime on the CPU: 4- and 8-bit weights in groups, compressed as its converters write them (codes less a zero
point, times a scale in fp16, then MatMul), with 16-bit activations, or quantized to 8 bits by it.

Its plug-in takes x and gives y in fp32, which is counted. Properties as in OpenVINO 2026.4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels.kernels.catalogue import Problem
from qkernels.tensor import QuantTensor

from . import Peer, Prepared, integer_zeros, needs, unlike


def reason(problem: Problem) -> str | None:
    return unlike(problem, bits=(4, 8), groups=(32, 64, 128), zeros=("none", "int"), dtypes=(torch.bfloat16,),
                  acts=(None, "int8"), k_multiple=2)  # fmt: skip


class Layer:
    """One compiled product. Copying it compiles it again, with weights of its own."""

    def __init__(self, weight: QuantTensor) -> None:
        import openvino
        import openvino.opset13 as ops

        self.weight = weight
        N, K, groups = weight.N, weight.K, weight.scales.shape[1]
        kind = openvino.Type.u4 if weight.scheme.bits == 4 else openvino.Type.u8
        codes = weight.codes.to(torch.uint8)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4 if weight.scheme.bits == 4 else codes
        held = openvino.Tensor(kind, [N, groups, K // groups])
        held.data.reshape(-1).view("uint8")[:] = packed.contiguous().numpy().reshape(-1)
        zeros = integer_zeros(weight)[:, :, None].to(torch.uint8).numpy()
        scales = weight.scales.half()[:, :, None].numpy()
        f16, f32 = openvino.Type.f16, openvino.Type.f32
        x = ops.parameter([-1, K], f32)
        whole = ops.subtract(ops.convert(ops.constant(held), f16), ops.convert(ops.constant(zeros), f16))
        rows = ops.reshape(ops.multiply(whole, ops.constant(scales)), ops.constant([N, K], dtype="int64"), False)
        y = ops.matmul(x, ops.convert(rows, f32), False, True)
        # the size of groups of x that get a scale of their own in int8; 0: not quantized
        length = 0 if weight.scheme.act is None else K // groups
        properties = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "bf16", "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": length,
        }  # fmt: skip
        compiled: Any = openvino.Core().compile_model(openvino.Model([y], [x]), "CPU", properties)
        self.request = compiled.create_infer_request()

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return Layer(self.weight)

    def multiply(self, x: Tensor) -> Tensor:
        """x `[M, K]` -> y `[M, N]` in fp32, valid until the next call."""
        self.request.infer([x.float().numpy()], share_inputs=True)
        return torch.from_numpy(self.request.get_output_tensor(0).data)


def prepare(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Prepared:
    bits = 8 if weight.scheme.act else None
    nbytes = weight.N * weight.K * weight.scheme.bits // 8 + 2 * weight.scales.numel()
    return Prepared(
        Layer(weight), lambda layer, x: layer.multiply(x), nbytes, activation_bits=bits, note="x and y in fp32"
    )


PEER: Peer = Peer("openvino", needs("openvino", "openvino", device="cpu"), reason, prepare)
