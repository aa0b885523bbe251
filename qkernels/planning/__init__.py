"""Whether a model fits, told from headers: its weights, its cache, the device, and which quantized form to take."""

from .planner import Plan, plan
from .rows import PlanRow

__all__ = ["Plan", "PlanRow", "plan"]
