"""What calibration keeps of a linear layer's inputs: second moments, mean and largest magnitudes, the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError

# Second moments are symmetric: of so many strips of columns, each is multiplied with itself and those to its right alone. 0.6 of
# the time of the whole product (K 512 to 4096, one core); with 4 strips 0.65.
STRIPS = 8


class InputStatistics:
    """Sums over the tokens that went into a linear layer, accumulated batch by batch in fp32.

    The sums, not a running mean: one rounding per batch, whatever the number of batches. For K in_features this holds
    K² + 2 K floats; without `moments` 2 K, and no Hessian can be had; without
    `magnitudes` there are second moments alone.
    """

    def __init__(
        self, in_features: int, device: torch.device | str = "cpu", moments: bool = True, magnitudes: bool = True
    ) -> None:
        self.tokens = 0
        self._outer = torch.zeros(in_features, in_features, device=device) if moments else None  # its upper strips
        self._magnitude = torch.zeros(in_features, device=device) if magnitudes or not moments else None
        self._largest = torch.zeros(in_features, device=device)
        self._cross: Tensor | None = None  # K² floats more, where inputs come in pairs
        self._paired = True

    def update(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add inputs `[..., K]` of any floating dtype; `exact`: of the same tokens in the model as it came, for `cross`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += rows.shape[0]
        if exact is None:
            self._paired = False
        else:
            self._cross = torch.zeros(2 * rows.shape[1:], device=x.device) if self._cross is None else self._cross
            self._cross.addmm_((exact.detach().reshape(rows.shape).float() - rows).T, rows)
        if self._outer is not None:
            for strip in _strips(rows.shape[-1]):
                self._outer[strip, strip.start :].addmm_(rows[:, strip].T, rows[:, strip.start :])
        if self._magnitude is None:
            return
        magnitude = rows.abs()
        self._magnitude += magnitude.sum(0)
        if len(rows):
            self._largest = torch.maximum(self._largest, magnitude.amax(0))

    def hessian(self, name: str = "the layer") -> Tensor:
        """fp32 `[K, K]`: `2/n Σ x xᵀ` over n tokens, the Hessian of the squared output error in one row of the weight
        (Frantar et al. 2022, GPTQ, section 3.1).

        Raises:
            CalibrationError: no token was seen, or a NaN or infinite activation.
        """
        assert self._outer is not None
        self.check(name)
        hessian = self._outer * (2 / self.tokens)
        for strip in _strips(len(hessian)):
            hessian[strip.stop :, strip] = hessian[strip, strip.stop :].T
        return hessian

    def cross(self) -> Tensor | None:
        """fp32 `[K, K]`: `2/n Σ (x - x̂) x̂ᵀ` over n tokens, with the inputs x̂ and `exact` x; None where some came without."""
        return self._cross * (2 / self.tokens) if self._cross is not None and self._paired and self.tokens else None

    def mean_magnitude(self, name: str = "the layer") -> Tensor:
        """fp32 `[K]`: the mean of |x| over tokens.

        Raises:
            CalibrationError: as for `hessian`.
        """
        self.check(name)
        assert self._magnitude is not None
        return self._magnitude / self.tokens

    def largest_magnitude(self, name: str = "the layer") -> Tensor:
        """fp32 `[K]`: the largest |x| of any token.

        Raises:
            CalibrationError: as for `hessian`.
        """
        self.check(name)
        assert self._magnitude is not None
        return self._largest

    def check(self, name: str) -> None:
        """Raises CalibrationError where the sums cannot be used."""
        if self.tokens == 0:
            raise CalibrationError(f"calibration sent no token through {name}; give more calibration text")
        sums = self._magnitude if self._outer is None else self._outer.diagonal()
        assert sums is not None
        if not bool(torch.isfinite(sums).all()):
            raise CalibrationError(
                f"the inputs of {name} are NaN or infinite during calibration; check the model on this text in a wider dtype "
                f"(float16 activations overflow above 65504), or leave the layer out with exclude"
            )


def output_energy(weight: Tensor, moments: Tensor) -> float:
    """`tr W H Wᵀ`: what a weight `[N, K]` puts out, squared and summed, for symmetric second moments `[K, K]`. Half of the
    product says it all."""
    total = 0.0
    for strip in _strips(len(moments)):
        own, rest = weight[:, strip], weight[:, strip.stop :]
        total += float(((own @ moments[strip, strip]) * own).sum())
        total += 2 * float(((own @ moments[strip, strip.stop :]) * rest).sum())
    return total


def _strips(columns: int) -> list[slice]:
    width = -(-columns // STRIPS)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
