"""Tensors of a module as files of other origins hold them, by the formulas of each format, and the configs beside them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from qkernels import QuantScheme, QuantTensor
from qkernels.checkpoint.registry import WRITTEN
from qkernels.formats import METADATA, Written
from qkernels.formats.compressed_writing import PACKED
from qkernels.scheme import CODEBOOKS

HQQ_SHIFTS = {
    "8bit_u8": [0],
    "4bit_u8": [4, 0],
    "3bit_32": [27, 24, 21, 18, 15, 12, 9, 6, 3, 0],
    "2bit_u8": [6, 4, 2, 0],
}
HQQ_PACKINGS = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}


def as_text(value: str) -> Tensor:
    return torch.tensor([ord(c) for c in value], dtype=torch.uint8)


def hqq(weight: QuantTensor, **changes: Tensor) -> dict[str, Tensor]:
    assert weight.zeros is not None
    size, packing = weight.scheme.group_length(weight.K), HQQ_PACKINGS[weight.scheme.bits]
    rows, shifts = weight.codes.reshape(-1, size).tolist(), HQQ_SHIFTS[packing]
    rows += [[0] * size] * (-len(rows) % len(shifts))
    step = len(rows) // len(shifts)
    words = [
        [sum(rows[i + part * step][j] << shift for part, shift in enumerate(shifts)) for j in range(size)]
        for i in range(step)
    ]
    number = {"nbits": weight.scheme.bits, "group_size": size, "axis": 1}
    flags = {name: 0 for name in ("view_as_float", "quant_scale", "quant_zero")}
    return {
        "W_q": torch.tensor(words, dtype=torch.int32 if packing == "3bit_32" else torch.uint8),
        "scale": weight.scales.reshape(-1, 1),
        "zero": weight.zeros.reshape(-1, 1),
        "shape": torch.tensor([weight.N, weight.K]),
        "packing": as_text(packing),
        "compute_dtype": as_text("__import__('os').abort()"),
        "unpack_view_dtype": as_text("torch.uint8"),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in number.items()},
        **{name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()},
        **changes,
    }


BITSANDBYTES_STATE = "weight.quant_state.bitsandbytes__"


def json_bytes(fields: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def bitsandbytes(weight: QuantTensor, kind: str = "nf4", **fields: Any) -> dict[str, Tensor]:
    flat = weight.codes.flatten().tolist()
    data = [flat[i] << 4 | flat[i + 1] for i in range(0, len(flat), 2)]
    state = {
        "quant_type": kind,
        "blocksize": weight.scheme.group_size,
        "dtype": "float16",
        "shape": [weight.N, weight.K],
    }
    return {
        "weight": torch.tensor(data, dtype=torch.uint8)[:, None],
        "weight.absmax": weight.scales.flatten(),
        "weight.quant_map": torch.tensor(CODEBOOKS[kind], dtype=torch.float32),
        f"{BITSANDBYTES_STATE}{kind}": json_bytes(state | fields),
    }


AUTO_ROUND_BODIES = {
    "auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2", "auto_round:auto_awq": "awq",
}  # fmt: skip


def auto_round_config(packing: str, **fields: Any) -> dict[str, Any]:
    made = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False}
    return made | fields


def auto_round(weight: QuantTensor, packing: str) -> dict[str, torch.Tensor]:
    tensors = WRITTEN[AUTO_ROUND_BODIES[packing]].write(weight)
    return tensors if packing == "auto_round:gptqmodel" else {k: t for k, t in tensors.items() if k != "g_idx"}


def torchao_config(kind: str, block: Any, module: str = "m", **fields: Any) -> dict[str, Any]:
    entry = {"_type": kind, "_data": {"block_size": block, **fields}, "_tensor_data_names": []}
    return {"quant_method": "torchao", METADATA: {f"{module}.weight": json.dumps(entry)}}


def torchao_block(weight: QuantTensor) -> list[int]:
    if weight.scheme.group_size == "tensor":
        return [weight.N, weight.K]
    return [1, weight.scheme.group_length(weight.K)]


def torchao(weight: QuantTensor) -> dict[str, Tensor]:
    """A byte a code; zero points as torchao writes them, also where they are 0."""
    middle = weight.scheme.mid_code
    zeros = torch.full(weight.scales.shape, middle) if weight.zeros is None else weight.zeros
    zeros = zeros - middle if zeros.is_floating_point() else (zeros.short() - middle).to(torch.int8)
    parts = {"scale": weight.scales, "zero_point": zeros}
    if weight.scheme.group_size == "tensor":
        parts = {name: tensor[:1, :1] for name, tensor in parts.items()}
    return {"_weight_qdata": (weight.codes.short() - middle).to(torch.int8)} | {
        f"_weight_{k}": v for k, v in parts.items()
    }


def gemv_config(group_size: int, version: str = "gemv") -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": version}


def _zero_words(weight: QuantTensor) -> int:
    size = weight.scheme.group_length(weight.K)
    words, multiple = -(-weight.G // 8), {64: 2, 32: 4}.get(size, 1)
    return -(-words // multiple) * multiple


def gemv(weight: QuantTensor) -> dict[str, Tensor]:
    assert weight.zeros is not None
    words = _zero_words(weight)
    qweight = torch.zeros(weight.N, weight.K // 8, dtype=torch.int64)
    qzeros = torch.zeros(weight.N, words, dtype=torch.int64)
    scales = torch.zeros(weight.N, 8 * words, dtype=torch.float16)
    for k in range(weight.K):
        qweight[:, k // 8] |= weight.codes[:, k].long() << 4 * (k % 8)
    for g in range(weight.G):
        qzeros[:, g // 8] |= weight.zeros[:, g].long() << 4 * (g % 8)
    scales[:, : weight.G] = weight.scales
    return {"qweight": qweight.int(), "qzeros": qzeros.int(), "scales": scales}


def gemv_fast(weight: QuantTensor) -> dict[str, Tensor]:
    assert weight.zeros is not None
    qweight = torch.zeros(weight.N // 4, weight.K, dtype=torch.int64)
    for n in range(weight.N):
        for k in range(weight.K):
            r = k % 32
            moved = 32 * (k // 32) + 8 * (r % 8 // 2) + 4 * (r % 2) + r // 8
            qweight[n // 4, 64 * (moved // 64) + 16 * (n % 4) + moved % 64 // 4] |= int(weight.codes[n, k]) << 4 * (
                moved % 4
            )
    padded = (8 * _zero_words(weight), weight.N)
    scales, qzeros = torch.zeros(padded, dtype=torch.float16), torch.zeros(padded, dtype=torch.float16)
    scales[: weight.G] = weight.scales.T
    qzeros[: weight.G] = -(weight.scales * weight.zeros).T
    return {"qweight": qweight.short(), "qzeros": qzeros, "scales": scales}


# By themselves, not from the reader: which planes a code of so many bits has, the lowest first.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planar(codes: Tensor, bits: int) -> Tensor:
    """int32 `[..., bits n]` of codes `[..., 32 n]`: word by word, bit by bit."""
    rows = codes.reshape(-1, codes.shape[-1])
    words = torch.zeros(rows.shape[0], rows.shape[1] // 32 * bits, dtype=torch.int64)
    for row in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            first, code = k // 32 * bits, int(rows[row, k])
            for width in _PLANES[bits]:
                place, lane = divmod(k % 32, 32 // width)
                words[row, first + place] |= (code & (1 << width) - 1) << width * lane
                code >>= width
                first += width
    return torch.where(words >= 2**31, words - 2**32, words).int().reshape(*codes.shape[:-1], -1)


def planar_tensors(weight: QuantTensor) -> dict[str, Tensor]:
    """The tensors of a module, with true zero points."""
    bits = weight.scheme.bits
    zeros = weight.zeros if weight.zeros is not None else torch.full_like(weight.scales, weight.scheme.mid_code).byte()
    tensors = {
        "qweight": planar(weight.codes, bits).T.contiguous(), "qzeros": planar(zeros.T, bits),
        "scales": weight.scales.T.contiguous(),
    }  # fmt: skip
    return tensors | ({} if weight.group_index is None else {"g_idx": weight.group_index})


def planar_config(weight: QuantTensor) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq_p", "bits": weight.scheme.bits, "sym": weight.scheme.symmetric,
        "group_size": weight.scheme.group_size, "desc_act": weight.group_index is not None,
    }  # fmt: skip


def compressed_config(scheme: str = "w4a16_g32_asym", **fields: Any) -> dict[str, Any]:
    made = PACKED.config_of(Written(QuantScheme.parse(scheme), {}))
    made["config_groups"]["group_0"]["weights"] |= fields
    return made
