"""Standard output and error of the command line: any text on any terminal, and readers that go away."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import Final

# What the tables and units here are made of, where the terminal has only ASCII (LANG=C).
_PLAIN: Final = {
    "‖": "||", "→": "->", "×": "x", "…": "...", "µ": "u", "±": "+-", "·": "*", "−": "-", "–": "-", "—": "-", "≤": "<=", "≥": ">=",
    "’": "'", "“": '"', "”": '"',
}  # fmt: skip
_HANDLER: Final = "qkernels.plain"


def take_any_text() -> None:
    """From here on, printing raises no UnicodeEncodeError: what the terminal's encoding lacks (and half characters, of file names
    that are no UTF-8) is spelled in ASCII, other characters as in JSON, so that printed JSON stays JSON."""
    codecs.register_error(_HANDLER, _spelled)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # None: somebody put another object in its place
        if reconfigure is not None:
            reconfigure(errors=_HANDLER)


def drop_output() -> None:
    """Nobody reads standard output any more: what is still to be written, also while Python ends, goes nowhere."""
    with suppress(OSError, ValueError):  # a stream without a file, as in tests
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c) or _escaped(c) for c in error.object[error.start : error.end]), error.end


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
