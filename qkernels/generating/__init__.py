"""Text from a model: prompts, streams, and the answers of two models side by side."""

from .sampling import Answers, answer, prompt_ids, with_room
from .sidebyside import SideBySide, side_by_side

__all__ = ["Answers", "SideBySide", "answer", "prompt_ids", "side_by_side", "with_room"]
