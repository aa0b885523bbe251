"""The cards that choices are tested for, by compute capability."""

from __future__ import annotations

CARDS = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}  # multiprocessors
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KB that one block may have
