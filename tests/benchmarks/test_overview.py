"""README's picture is that of the committed results."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from benchmarks.method import overview


def description(picture: Path) -> str:
    """The text that the PNG carries."""
    data, at = picture.read_bytes(), 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"tEXt":
            key, _, value = data[at + 8 : at + 8 + size].partition(b"\0")
            if key == b"Description":
                return value.decode()
        at += 12 + size
    return ""


def test_the_picture_is_of_the_results_that_are_here() -> None:
    """Else: python -m benchmarks.method.overview"""
    assert description(overview.ROOT / "docs" / "overview.png") == overview.digest()


def test_another_result_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "speed.json"
    other.write_text(overview.SPEED.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    before = overview.digest()
    monkeypatch.setattr(overview, "SPEED", other)
    assert overview.digest() != before


def test_every_peer_is_drawn_at_every_size() -> None:
    drawn = overview.speed_ups()
    assert set(drawn) == {*overview.PEERS, "ggml"}
    assert {name: sorted(points) for name, points in drawn.items()} == {name: [1, 4, 16, 128] for name in drawn}


def test_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert description(overview.draw(tmp_path / "a.png")) == overview.digest()
