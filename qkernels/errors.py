"""Every error that qkernels raises on purpose.

All are `ValueError` subclasses, so that a caller who knows nothing of this library can still catch them. A message says
what was wrong, what was expected, what came, and the way out, with names as the user sees them.
"""

from __future__ import annotations


class QKernelsError(ValueError):
    """Base of all errors raised by qkernels.

    >>> from qkernels import QKernelsError, QuantScheme
    >>> try:
    ...     QuantScheme.parse("int4")
    ... except QKernelsError as error:
    ...     print(error)
    a scheme looks like w4a16_g128, w4a16_g64_asym, w8a16_channel, w4a8_g128, nf4_g64, mxfp4_g32 or q4_k, got 'int4'
    """


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


class MissingPackage(QKernelsError, ImportError):
    """A package that only some of the library needs is not installed; the message has the command that installs it."""


class UnsupportedProblem(QKernelsError):
    """No kernel takes this problem; the message lists every kernel with its reasons.

    >>> import torch
    >>> from qkernels import UnsupportedProblem, replace_linear
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32)).double()
    >>> try:
    ...     replace_linear(model, "w4a16_g32")  # or on_unsupported="skip"
    ... except UnsupportedProblem as error:
    ...     print(str(error).splitlines()[0])
    0: no kernel for w4a16_g32, N=32 K=64, float64, cpu
    """
