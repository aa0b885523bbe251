"""The launch table: nearest shapes, any card, the user's own table before the shipped one, and files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qkernels.errors import ArgumentError
from qkernels.kernels.triton import table
from qkernels.kernels.triton.table import (
    Config,
    Entry,
    choose,
    choose_tile,
    read,
    run_bytes,
    shared_fields,
    tiles_in,
    user_table,
    with_entries,
    write,
)
from qkernels.layouts import kpack
from qkernels.layouts.tiles import GPU_PLANES

OWN = Config("gemm", 32, 32, 128, 2, 4, 3)


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "settings" / "triton.json"
    monkeypatch.setenv(table.USER_TABLE, str(path))
    return path


def test_takes_the_nearest_shape_and_any_card() -> None:
    assert choose("sm90", 1, 4096, 4096).kernel == "gemv"
    assert choose("sm90", 8, 4096, 4096).kernel == "gemm"
    assert choose("sm90", 5000, 4096, 4096) == next(e.config for e in read()["sm90"] if e.M == 512)
    assert choose("sm103", 64, 4096, 4096) == choose("default", 64, 4096, 4096)
    assert {"default", "sm80", "sm86", "sm89", "sm90", "sm120"} == set(read())


def test_stacked_experts_take_tiles_of_tensor_cores_of_64_rows_at_most(own_table: Path) -> None:
    for M in (1, 8, 64, 5000):
        config = choose_tile("sm90", M, 4096, 4096)
        assert config.kernel == "gemm"
        assert config.block_m <= 64
    write(own_table, {"sm90": (Entry(1, 4096, 4096, OWN), Entry(4096, 4096, 4096, replace(OWN, block_m=128)))})
    assert choose("sm90", 4096, 4096, 4096).block_m == 128
    assert choose_tile("sm90", 1, 4096, 4096) == OWN
    assert choose_tile("sm90", 4096, 4096, 4096).block_m <= 64


def test_distances_are_those_of_logarithms(own_table: Path) -> None:
    """M = 1 is as far from 4 as 4 from 16, and tokens count double."""
    far, near = replace(OWN, block_n=64), replace(OWN, block_n=128)
    write(own_table, {"sm77": (Entry(512, 64, 64, far), Entry(2048, 64, 64, near))})
    assert choose("sm77", 1000, 64, 64) == far
    assert choose("sm77", 1100, 64, 64) == near
    write(own_table, {"sm77": (Entry(4096, 2048, 2048, far), Entry(8192, 4096, 4096, near))})
    assert choose("sm77", 4096, 4096, 4096) == far  # one doubling of N and one of K, or one of M: a tie, the first wins
    assert choose("sm77", 4200, 4096, 4096) == near


def test_the_users_entries_come_first_and_leave_the_rest(own_table: Path) -> None:
    shipped = choose("sm90", 2048, 4096, 4096), choose("sm90", 1, 4096, 4096), choose("sm80", 64, 4096, 4096)
    assert choose("sm90", 64, 4096, 4096) != OWN
    write(own_table, {"sm90": (Entry(64, 4096, 4096, OWN),)})
    assert choose("sm90", 64, 4096, 4096) == OWN  # a shape that the shipped table has, too
    assert (choose("sm90", 2048, 4096, 4096), choose("sm90", 1, 4096, 4096), choose("sm80", 64, 4096, 4096)) == shipped


def test_a_card_of_the_users_alone_still_has_the_default(own_table: Path) -> None:
    write(own_table, {"sm103": (Entry(1, 4096, 4096, OWN),)})
    assert choose("sm103", 1, 4096, 4096) == OWN
    assert choose("sm103", 2048, 4096, 4096) == choose("default", 2048, 4096, 4096)


def test_writing_replaces_the_same_shapes_only(own_table: Path) -> None:
    first = with_entries({}, "sm90", [Entry(1, 64, 64, OWN), Entry(2, 64, 64, OWN)])
    other = replace(OWN, num_warps=8)
    both = with_entries({**first, "sm80": (Entry(3, 64, 64, OWN),)}, "sm90", [Entry(2, 64, 64, other)])
    write(own_table, both)
    assert read(own_table) == {
        "sm80": (Entry(3, 64, 64, OWN),),
        "sm90": (Entry(1, 64, 64, OWN), Entry(2, 64, 64, other)),
    }
    assert [p.name for p in own_table.parent.iterdir()] == ["triton.json"]


ROW: dict[str, Any] = {
    "M": 1, "N": 64, "K": 64, "kernel": "gemm", "block_m": 16, "block_n": 64, "block_k": 64, "programs_per_sm": 0,
    "num_warps": 4, "num_stages": 2,
}  # fmt: skip


def cards(**changes: Any) -> str:
    return json.dumps({"cards": {"sm90": [ROW | changes]}})


def test_the_row_of_the_checks_below_is_good(own_table: Path) -> None:
    own_table.parent.mkdir()
    own_table.write_text(cards())
    assert len(read(own_table)["sm90"]) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        ("{}", "'cards' is missing"),
        ('{"cards": []}', "no attribute 'items'"),
        ('{"cards": {"sm90": [7]}}', "not subscriptable"),
        ('{"cards": {"sm90": [{"M": 1, "N": 1}]}}', "'K' is missing"),
        (cards(kernel="rm"), 'kernel must be "gemv", "gemm" or "dequantize", got \'rm\''),
        (cards(block_n=48), "block_n must be a power of two, got 48"),
        (cards(block_k=32), "block_k must be an integer from 64 to 1024, got 32"),
        (cards(num_warps=1e9), "num_warps must be an integer from 1 to 32, got 1000000000.0"),
        (cards(kernel="gemv"), "block_m must be an integer from 1 to 1, got 16"),
        (cards(kernel="dequantize"), "block_m must be an integer from 1 to 1, got 16"),
        (cards(block_m=4), "block_m must be an integer from 8 to 1024, got 4"),
        (cards(M=0), "M must be an integer from 1 to 1099511627776, got 0"),
        (cards(N=True), "N must be an integer"),
        (b"\xff\xfe", "can't decode byte"),
    ],
)
def test_a_file_that_is_no_table_is_named(own_table: Path, text: str | bytes, why: str) -> None:
    own_table.parent.mkdir()
    own_table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArgumentError) as caught:
        choose("sm90", 1, 64, 64)
    message = str(caught.value)
    assert message.startswith(f"{own_table} must be a table of Triton configurations")
    assert why in message
    assert "remove it, or name another file in QKERNELS_TRITON_TABLE" in message


def test_what_cannot_be_read_or_written_is_named(own_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(table.USER_TABLE, str(own_table.parent.parent))
    with pytest.raises(ArgumentError, match="Is a directory"):
        choose("sm90", 1, 64, 64)
    with pytest.raises(ArgumentError, match="cannot be written .*: .*; name another file"):
        write(own_table.parent.parent, {})


def test_where_the_table_is_without_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(table.USER_TABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, variable, folder in [
        ("linux", "", ".config"),
        ("darwin", "", "Library/Application Support"),
        ("win32", "", "AppData/Roaming"),
        ("linux", "XDG_CONFIG_HOME", "elsewhere"),
        ("win32", "APPDATA", "elsewhere"),
    ]:
        monkeypatch.setattr(table.sys, "platform", platform)
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        monkeypatch.delenv("APPDATA", raising=False)
        if variable:
            monkeypatch.setenv(variable, str(tmp_path / folder))
        assert user_table() == tmp_path / folder / "qkernels" / "triton.json"


def test_the_shipped_table_is_sound_and_not_written_to() -> None:
    assert all(entries for entries in read().values())
    assert user_table() != table.TABLE


def columns(at: int, field: int, fields: int) -> int:
    """Layout kpack: a block is as many runs of columns as a byte has fields."""
    run = kpack.run_of(fields)
    return at // run * run * fields + field * run + at % run


@pytest.mark.parametrize("fields", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [1, 8, 16, 20, 24, 32, 48, 64, 96, 128, 160, 256])
def test_runs_are_the_longest_powers_of_two_inside_one_group(fields: int, group: int) -> None:
    run = run_bytes(group, fields, kpack.run_of(fields), 128)

    def inside(length: int) -> bool:
        return all(
            len({columns(at, field, fields) // group for at in range(first, first + length)}) == 1
            for field in range(fields)
            for first in range(0, 960, length)
        )

    assert 128 % run == 0
    assert inside(run)
    assert run == 128 or not inside(2 * run)


def test_one_group_is_one_run() -> None:
    assert run_bytes(0, 2, 32, 128) == 128
    assert shared_fields(0, 8, 16) == 8


@pytest.mark.parametrize("fields", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [1, 16, 24, 32, 48, 64, 96, 128, 192])
def test_columns_of_a_byte_lie_in_one_group_where_the_kernels_share_its_scale(fields: int, group: int) -> None:
    """What they rest on when they load a scale at every so many fields alone."""
    shared = shared_fields(group, fields, kpack.run_of(fields))

    def inside(length: int) -> bool:
        return all(
            len({columns(at, field, fields) // group for field in range(first, first + length)}) == 1
            for at in range(960)
            for first in range(0, fields, length)
        )

    assert fields % shared == 0
    assert inside(shared)
    assert shared == fields or not inside(2 * shared)


@pytest.mark.parametrize(("kernel", "tokens"), [("gemv", 1), ("gemm", 16), ("gemm", 128), ("dequantize", 1)])
def test_steps_of_every_width_are_whole_lines_of_a_power_of_two(kernel: str, tokens: int) -> None:
    for block_k in (64, 128, 256, 512, 1024):
        config = Config(kernel, tokens, 16, block_k, 0, 4, 2)
        for widths in GPU_PLANES.values():
            size, fields = config.block_bytes(widths), 8 // widths[-1]
            assert size >= 16
            assert size & (size - 1) == 0
            assert size * fields <= max(512, 16 * fields, 2 * block_k if kernel == "gemm" else block_k)
    assert Config(kernel, tokens, 16, 256, 0, 4, 2).block_bytes((4,)) == 128


def test_slices_hold_whole_tiles() -> None:
    assert tiles_in(64 << 20, 8192) == 64  # 64 rows of 8192 weights of two bytes are 1 MB
    assert tiles_in(1, 8192) == 1


def test_parts_of_k_are_whole_steps() -> None:
    config = Config("gemm", 16, 32, 256, 4, 4, 2)
    assert config.bytes_per_split(1, 4096, 2048, 128, 132) % 128 == 0
    assert config.bytes_per_split(4096, 4096, 2048, 128, 132) == 2048


@pytest.mark.parametrize("card", sorted(read()))
def test_each_number_of_tokens_has_its_kernel(card: str) -> None:
    """One token multiplies without tensor cores; two are a tile of 8, not two passes over the weight; from 513 on at the latest
    the card's own product of a dequantized weight; the tile grows in between."""
    chosen = [choose(card, M, 4096, 4096) for M in range(1, 600)]
    assert [config.kernel for config in chosen[:3]] == ["gemv", "gemm", "gemm"]
    assert {config.kernel for config in chosen[512:]} == {"dequantize"}
    tiles = [config.block_m for config in chosen if config.kernel == "gemm"]
    assert tiles == sorted(tiles)
    assert tiles[0] == 8
