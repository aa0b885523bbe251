"""What the extension's build leaves for the tests: ptxas's report, cut by architecture."""

from __future__ import annotations

from tools.kept_nvcc import PTXAS, reports
from tools.nvcc import complaints, usages


def entry(name: str, arch: str, registers: int) -> str:
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_{arch}'\n"
        f"ptxas info    : Function properties for {name}\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 0 barriers, 360 bytes cmem[0]\n"
        "ptxas info    : Compile time = 21.679 ms\n"
    )


SERIAL = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'b'\n"
)
GMEM = "ptxas info    : 0 bytes gmem\n"


def test_each_architecture_gets_its_own() -> None:
    text = (
        GMEM + entry("a", "80", 8) + entry("b", "80", 10) + SERIAL + GMEM + entry("a", "90a", 9) + entry("b", "90a", 11)
    )
    found = reports(text)
    assert {arch: [(u.kernel, u.registers) for u in usages(report)] for arch, report in found.items()} == {
        "80": [("a", 8), ("b", 10)],
        "90a": [("a", 9), ("b", 11)],
    }
    assert (complaints(found["80"]), complaints(found["90a"])) == ([], [SERIAL.strip()])


def test_a_complaint_at_the_end_is_not_lost() -> None:
    assert complaints(reports(GMEM + entry("b", "90a", 11) + SERIAL)["90a"]) == [SERIAL.strip()]


def test_only_numbers_are_left_out_of_what_is_printed() -> None:
    warning = "x.cu(3): warning #177-D: variable was declared but never referenced\n"
    shown = [
        line
        for line in (GMEM + entry("a", "80", 8) + SERIAL + warning).splitlines(keepends=True)
        if not PTXAS.match(line)
    ]
    assert shown == [SERIAL, warning]
