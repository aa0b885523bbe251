"""Every error that qkernels raises on purpose.

All are `ValueError` subclasses, so that a caller who knows nothing of this library can still catch them. A message says
what was wrong, what was expected, what came, and the way out, with names as the user sees them.
"""

from __future__ import annotations


class QKernelsError(ValueError):
    """Base of all errors raised by qkernels."""


class SchemeError(QKernelsError):
    """A quantization scheme that contradicts itself or cannot be parsed."""


class TensorError(QKernelsError):
    """The fields of a `QuantTensor` (or the buffers of a layout) do not fit each other."""


class ArgumentError(QKernelsError):
    """An argument of a public function or an op has the wrong dtype, shape, device or value."""


class CalibrationError(QKernelsError):
    """Calibration data is missing, too short, or produced statistics that cannot be used."""


class CheckpointError(QKernelsError):
    """A checkpoint on disk is incomplete, malformed, contradictory, or of an unknown kind."""


class ConversionError(QKernelsError):
    """A format or layout cannot express this `QuantTensor` without losing something."""


class UnsupportedProblem(QKernelsError):
    """No kernel takes this problem; the message lists every kernel with its reasons."""
