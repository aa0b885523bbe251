"""The bytes of mma_tile: the packer in Python and csrc/cuda/layout.h say the same, for every code, scale and zero."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from qkernels import QuantScheme
from qkernels.errors import ConversionError, TensorError
from qkernels.layouts import get_layout
from qkernels.layouts.tiles import GPU_PLANES
from tests.cuda.emulator import CUDA, CXX
from tests.strategies import random_weight

LAYOUT = get_layout("mma_tile")
PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "layout.h"
using namespace qkernels::cuda;
int main() {
  for (int width = 4; width <= 8; width += 4)
    for (int n = 0; n < 64; ++n)
      for (int k = 0; k < 128; ++k) {
        const CodePlace p = code_place(n, k, width);
        std::printf("%d %d\\n", static_cast<int>(p.byte), p.shift);
      }
  for (int plane = 1; plane <= 2; ++plane)
    for (int n = 0; n < 64; ++n)
      for (int k = 0; k < 64; ++k) {
        const CodePlace p = plane_place(n, k, plane);
        std::printf("%d %d\\n", static_cast<int>(p.byte), p.shift);
      }
  for (int n = 0; n < 64; ++n) std::printf("%d 0\\n", group_place(n));
  for (int K : {0, 1, 17, 64, 200, 256}) for (int group : {16, 32, 64, 128, 200})
    std::printf("%d 0\\n", static_cast<int>(padded_groups(K, group)));
}
"""


@pytest.mark.skipif(CXX is None, reason="no g++")
def test_packer_and_header_agree(tmp_path: Path) -> None:
    (tmp_path / "layout.cpp").write_text(PROGRAM)
    subprocess.run(
        [str(CXX), "-std=c++17", f"-I{CUDA}", tmp_path / "layout.cpp", "-o", tmp_path / "layout"], check=True
    )
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout.split()
    numbers = torch.tensor(list(map(int, printed))).view(-1, 2)
    places, rest = numbers[: 2 * 64 * 128].view(2, 64, 128, 2), numbers[3 * 64 * 128 :, 0]
    planes = {plane: p for plane, p in zip((1, 2), numbers[2 * 64 * 128 : 3 * 64 * 128].view(2, 64, 64, 2))}
    planes[4] = places[0][:, :64]
    for bits in (2, 3, 5, 6):
        weight = random_weight(f"w{bits}a16_g64", 64, 128)
        packed = LAYOUT.pack(weight)["qweight"]
        assert packed is not None
        codes, low, at = torch.zeros(64, 128, dtype=torch.uint8), 0, 0
        for plane in GPU_PLANES[bits]:
            for step in range(2):
                byte = packed[0][step * 512 * bits + at * 512 + planes[plane][..., 0]]
                codes[:, step * 64 : step * 64 + 64] |= (byte >> planes[plane][..., 1] & (2**plane - 1)) << low
            low, at = low + plane, at + plane
        assert torch.equal(codes, weight.codes), bits
    for place, bits in zip(places, (4, 8)):
        weight = random_weight(f"w{bits}a16_g32_asym", 64, 128, act_order=True)
        packed = LAYOUT.pack(weight)
        order, qweight, scales, zeros = packed["k_order"], packed["qweight"], packed["scales"], packed["zeros"]
        assert order is not None and qweight is not None and scales is not None and zeros is not None
        codes = qweight[0][place[..., 0]] >> place[..., 1] & (2**bits - 1)
        assert torch.equal(codes, weight.codes[:, order.long()])
        assert torch.equal(scales[0].T[rest[:64]], weight.scales)
        assert torch.equal(zeros[0].T[rest[:64]], weight.zeros)  # type: ignore[arg-type]
    from qkernels.layouts.mma_tile import padded_groups

    expected = [padded_groups(K, group) for K in (0, 1, 17, 64, 200, 256) for group in (16, 32, 64, 128, 200)]
    assert rest[64:].tolist() == expected


def test_padding_contributes_nothing() -> None:
    packed = LAYOUT.pack(random_weight("w4a16_g16_offset", 65, 70))
    scales, zeros, qweight = packed["scales"], packed["zeros"], packed["qweight"]
    assert scales is not None and zeros is not None and qweight is not None
    assert list(qweight.shape) == [2, 2 * 2048]
    assert list(scales.shape) == [2, 8, 64]  # five groups, and three of padded columns
    assert not scales[:, 5:].any()
    assert not zeros[:, 5:].any()
    assert (scales[1] != 0).sum() == 5  # row 64 alone


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("w4a8_g32", "8-bit activations"),
        ("w4a16_g24", "neither 16 nor 32"),
        ("w4a16_g8", "g"),
    ],
)
def test_reasons(scheme: str, reason: str) -> None:
    assert any(reason in text for text in LAYOUT.reasons(64, 128, QuantScheme.parse(scheme)))
    with pytest.raises(ConversionError, match="layout mma_tile cannot hold"):
        LAYOUT.pack(random_weight(scheme, 64, 128))


# What takes more than 4 % more than the information of a weight of whole tiles: codes of 7 bits take 8, integer zeros beside
# codes of 2 and 3 bits in short groups lie in bytes, and so do the factors of Q2_K, of 4 bits.
FAT = {f"w7a16_g{group}{zeros}": 8 / 7 for group in (32, 128) for zeros in ("", "_asym")} | {
    "w2a16_g32_asym": 1.08, "w3a16_g32_asym": 1.05, "q2_k": 1.2,
}  # fmt: skip


@pytest.mark.parametrize("scheme", [
    *(f"w{bits}a16_g{group}{zeros}" for bits in range(2, 9) for group in (32, 128) for zeros in ("", "_asym")),
    "nf4_g64", "mxfp4_g32", "fp8_channel", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "nvfp4_g16",
])  # fmt: skip
def test_packed_weights_take_the_bytes_of_their_codes(scheme: str) -> None:
    dtype = torch.float8_e8m0fnu if scheme == "mxfp4_g32" else torch.float16
    weight = random_weight(scheme, 256, 1024, dtype=dtype)
    buffers = LAYOUT.pack(weight)
    assert buffers["qweight"] is not None
    assert buffers["qweight"].numel() * 8 == 256 * 1024 * (8 if scheme.startswith("w7") else weight.scheme.bits)
    packed = sum(t.numel() * t.element_size() for t in buffers.values() if t is not None)
    assert weight.nbytes <= packed <= weight.nbytes * FAT.get(scheme, 1.04), packed / weight.nbytes
    if scheme in FAT:
        assert packed > weight.nbytes * 1.04, "no longer so fat"


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_was_packed_before_there_were_planes_is_read(bits: int) -> None:
    """Version 1 by the words of its contract, which are those of 4 and 8 bits today; and it is what mma_tile_a8 has."""
    weight = random_weight(f"w{bits}a16_g32_asym", 37, 130, act_order=True)
    packed = LAYOUT.pack(weight)
    order = weight.k_order()
    assert order is not None
    width = 4 if bits <= 4 else 8
    old = torch.zeros(1, 192 * 64 * width // 8, dtype=torch.uint8)
    for n, k in product(range(37), range(130)):
        tile, high, r = n // 16, n // 8 % 2, n % 8
        right, c, odd, step = k // 8 % 2, k // 2 % 4, k % 2, k % (64 if width == 4 else 32) // 16
        lane = (k // (64 if width == 4 else 32) * 4 + tile) * 512 + (4 * r + c) * 16
        byte = lane + (4 * step + 2 * odd + right if width == 4 else 4 * (2 * step + right) + 2 * odd + high)
        old[0, byte] |= int(weight.codes[n, order[k]]) << (4 * high if width == 4 else 0)
    upgraded = LAYOUT.upgraded(1, packed | {"qweight": old}, 37, 130, weight.scheme)
    for name, t in packed.items():
        assert t is None or torch.equal(upgraded[name], t), name  # type: ignore[arg-type]
    symmetric = random_weight(f"w{bits}a8_g32", 37, 130)
    int8 = get_layout("mma_tile_a8").pack(symmetric)["qweight"]
    plain = replace(symmetric, scheme=QuantScheme(bits, 32))
    new = LAYOUT.pack(plain)
    assert int8 is not None
    assert new["qweight"] is not None
    assert torch.equal(LAYOUT.upgraded(1, new | {"qweight": int8}, 37, 130, plain.scheme)["qweight"], new["qweight"])  # type: ignore[arg-type]
    if bits not in (4, 7, 8):
        with pytest.raises(TensorError, match="qweight must be uint8"):
            LAYOUT.upgraded(1, packed | {"qweight": old[:, :-1]}, 37, 130, weight.scheme)
