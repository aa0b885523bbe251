"""Executed paths of SASS, on a text made by hand: needs no nvcc."""

from __future__ import annotations

from tools.sass_paths import parse, round_of, shortest_round, way_to

# Stall counts are bits 41 ... 44 of the upper word: 2, 4, 1 and so on.
UPPER = {stall: f"0x{stall << 41:016x}" for stall in range(16)}


def text_of(*lines: tuple[str, int] | str) -> str:
    result, address = [], 0
    for line in lines:
        if isinstance(line, str):
            result.append(line)
        else:
            result += [
                f"        /*{address:04x}*/                   {line[0]} ;    /* 0x0000000000000000 */",
                f"                                      /* {UPPER[line[1]]} */",
            ]
            address += 16
    return "\n".join(result)


# A loop with a copy behind one branch, a spin on a barrier of its own, and a product.
LOOP = text_of(
    ("MOV R1, c[0x0][0x28]", 1),
    ".L_x_1:",
    ("@!P0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4]", 2),
    ("@!P0 BRA `(.L_x_1)", 4),
    ".L_x_0:",
    ("ISETP.NE.AND P1, PT, R0, RZ, PT", 2),
    ("@P1 BRA `(.L_x_2)", 4),
    ("LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64]", 1),
    ("IADD3 R2, R2, 0x800, RZ", 5),
    ".L_x_2:",
    ("HMMA.16816.F32 R4, R8, R12, R4", 3),
    ("LOP3.LUT R5, R5, 0xf, R6, 0xea, !PT", 2),
    ("BRA.U !UP0, `(.L_x_0)", 6),
    ("EXIT", 5),
)


def test_a_round_is_the_shortest_path_that_has_what_it_needs() -> None:
    code = parse(LOOP)
    short, long = (shortest_round(code, needs) for needs in ({"HMMA": 1}, {"HMMA": 1, "LDGSTS": 1}))
    assert short is not None
    assert long is not None
    assert (short.instructions, short.half_rate, short.stalls) == (5, 2, 17)
    assert (long.instructions, long.half_rate, long.stalls) == (7, 3, 23)
    assert long.names() == {"ISETP": 1, "BRA": 2, "LDGSTS": 1, "IADD3": 1, "HMMA": 1, "LOP3": 1}


def test_what_no_loop_has_is_not_found() -> None:
    code = parse(LOOP)
    assert shortest_round(code, {"HGMMA": 1}) is None
    assert shortest_round(code, {"HMMA": 2}) is None
    assert round_of(code, 1, {"HMMA": 1}) is None  # the spin has no product


def test_the_way_to_an_instruction_is_the_shortest_from_the_entry() -> None:
    code = parse(LOOP)
    first = way_to(code, "LDGSTS")
    assert first is not None
    assert [one.name for one in first.path] == ["MOV", "SYNCS", "BRA", "ISETP", "BRA", "LDGSTS"]
    assert way_to(code, "HGMMA") is None
