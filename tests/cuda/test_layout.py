"""The bytes of mma_tile: the packer in Python and csrc/cuda/layout.h say the same, for every code, scale and zero."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from qkernels import QuantScheme
from qkernels.errors import ConversionError
from qkernels.layouts import get_layout
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
    places, rest = numbers[: 2 * 64 * 128].view(2, 64, 128, 2), numbers[2 * 64 * 128 :, 0]
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
        ("q4_k", "factors 'k45'"),
        ("w4a8_g32", "8-bit activations"),
        ("w4a16_g24", "neither 16 nor 32"),
        ("w4a16_g8", "g"),
    ],
)
def test_reasons(scheme: str, reason: str) -> None:
    assert any(reason in text for text in LAYOUT.reasons(64, 128, QuantScheme.parse(scheme)))
    with pytest.raises(ConversionError, match="layout mma_tile cannot hold"):
        LAYOUT.pack(random_weight(scheme, 64, 128))
