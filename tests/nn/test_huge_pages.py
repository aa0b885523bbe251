"""Packed weights ask for huge pages, and nothing but their place in memory differs."""

from __future__ import annotations

import copy
import io
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qkernels import QuantLinear
from qkernels.nn.huge_pages import HUGE_PAGE, on_huge_pages
from tests.strategies import random_weight, same_weight

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise is asked of Linux")

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GRANTED = ENABLED.exists() and "[never]" not in ENABLED.read_text()


def mapping_of(t: Tensor) -> dict[str, str]:
    """The fields of /proc/self/smaps for the mapping that holds a tensor's first byte."""
    fields: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) <= t.data_ptr() < int(head[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def is_advised(t: Tensor) -> bool:
    return "hg" in mapping_of(t)["VmFlags"].split()


@pytest.fixture(scope="module")
def layer() -> QuantLinear:
    return QuantLinear.from_quant_tensor(random_weight("w4a16_g128", 2048, 2432))  # 1.19 huge pages of codes


@pytest.mark.skipif(not ENABLED.exists(), reason="a kernel without transparent huge pages")
def test_a_packed_weight_asks_and_small_buffers_do_not(layer: QuantLinear) -> None:
    assert layer.qweight.data_ptr() % HUGE_PAGE == 0
    assert is_advised(layer.qweight)
    assert not is_advised(layer.scales)


@pytest.mark.skipif(not GRANTED, reason="this machine gives huge pages to nobody")
def test_the_kernel_grants_them(layer: QuantLinear) -> None:
    granted = int(mapping_of(layer.qweight)["AnonHugePages"].split()[0]) << 10
    if not granted:
        pytest.skip("memory is too fragmented for a huge page")
    assert granted == layer.qweight.numel() // HUGE_PAGE * HUGE_PAGE


@pytest.mark.skipif(not ENABLED.exists(), reason="a kernel without transparent huge pages")
def test_loading_a_state_dict_asks_again(layer: QuantLinear) -> None:
    other = QuantLinear(2432, 2048, bias=False)
    assert not is_advised(other.qweight)  # zeros that wait for a weight
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    other.load_state_dict(state)
    assert is_advised(other.qweight)
    assert same_weight(other.quant_tensor(), layer.quant_tensor())


def test_a_file_holds_the_weight_and_no_padding(layer: QuantLinear) -> None:
    file = io.BytesIO()
    torch.save(layer.qweight, file)
    assert file.tell() < layer.qweight.numel() + 4096
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), layer.qweight)
    x = torch.randn(3, 2432, dtype=layer.dtype)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_memory_goes_with_the_tensor() -> None:
    placed = on_huge_pages(torch.zeros(HUGE_PAGE + 4096, dtype=torch.uint8))
    address = placed.data_ptr()
    view = placed[4096:]
    del placed
    assert view.sum() == 0  # a view keeps it
    del view
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert not any(int(line.split("-")[0], 16) == address for line in maps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bfloat16, torch.float32])
def test_contents_and_shape(dtype: torch.dtype) -> None:
    t = torch.arange(HUGE_PAGE + 6).to(dtype).view(2, -1)
    placed = on_huge_pages(t)
    assert placed is not t
    assert torch.equal(placed, t)
    assert placed.dtype == dtype
    assert on_huge_pages(placed) is placed
    with torch.device("meta"):  # as models are built: the weight is real all the same
        assert torch.equal(on_huge_pages(t), t)


def test_what_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.zeros(2, HUGE_PAGE + 4096, dtype=torch.uint8)
    shared = large.clone().share_memory_()
    for t in (torch.zeros(8), large.T, large.to("meta"), shared):
        assert on_huge_pages(t) is t

    class Refusing(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert on_huge_pages(large) is large
