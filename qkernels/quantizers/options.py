"""What every quantization method is: options as one frozen value, and answers to what a run asks of it.

A run asks a method what it needs, which scales it folds, whether it orders columns, and for the codes of a weight; it
asks no method for its class. So a new method is one file, and one line in the registry (`quantizers/__init__.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError, SchemeError
from ..scheme import ACTIVATIONS, ActBitsIsAct, GroupSize, QuantScheme, ZeroKind
from ..tensor import QuantTensor
from .grid import Clip, checked_scale_dtype, stored_dtype

Self = TypeVar("Self", bound="Options")

# What a method looks at: weights alone, or also the second moments of what goes into them, which takes calibration.
Needs = Literal["weight", "moments"]

# A weight `[N, K]` and its name to what is stored.
Rounding = Callable[[Tensor, str], QuantTensor]


class ScaleSearch(Protocol):
    """Scales of input channels that are searched (AWQ): of all candidates the one with the least output error."""

    @property
    def search_tokens(self) -> int:
        """About so many calibration tokens judge each candidate."""
        ...

    @property
    def scheme(self) -> QuantScheme: ...

    def candidates(self, input_magnitude: Tensor, weight_magnitude: Tensor) -> Sequence[Tensor]:
        """The scales `[K]` to try, from mean magnitudes `[K]` of inputs and weights; the first is no scale."""
        ...

    def rounded(self, weight: Tensor, scales: Tensor) -> Tensor:
        """The weight `[N, K]` that inference would see with these scales `[K]`."""
        ...


class ScaleRule(Protocol):
    """Scales of input channels that are computed (SmoothQuant)."""

    def scales(self, largest_input: Tensor, largest_weight: Tensor) -> Tensor:
        """The scales `[K]`, from the largest magnitudes `[K]` of the inputs and of the weights."""
        ...


@dataclass(frozen=True)
class Options(ActBitsIsAct):
    """What codes look like, whichever method chooses them, and what a run must know of the method.

    A method is a frozen dataclass derived from this. It overrides `quantize`, and of the other answers those that
    differ:

    needs: "moments" where `quantize` or the scales to fold take calibration.
    integer_zeros: whether zero points may be integers (`symmetric=False`); False where a method has zeros of its own or
        none.
    orders_columns, aims, for_inputs, scale_search, scale_rule, with_scales_for, without_moments: see there.

    Args:
        bits, group_size, symmetric, act, codebook, rows, factors: see `QuantScheme`; `symmetric=False` means integer zero points.
        zeros: a zero kind by name where `symmetric` does not say enough ("float", "offset").
        scale_dtype: how scales are stored; None: the dtype of a 16-bit weight, else float16. Either way float32 for a weight
            with rows whose scales would overflow or vanish in it.
        clip: "mse" searches a narrower range per group, "none" keeps the full range.

    Raises:
        SchemeError, ArgumentError: an option is out of range or contradicts another.
    """

    needs: ClassVar[Needs] = "weight"
    integer_zeros: ClassVar[bool] = True

    bits: int = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    zeros: ZeroKind | None = None
    act: str | None = None
    codebook: str | None = None
    rows: int = 1
    factors: str | None = None
    scale_dtype: torch.dtype | None = None
    clip: Clip = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.symmetric, bool):
            raise SchemeError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.zeros is not None and (self.zeros == "none") != self.symmetric:
            raise SchemeError(f"zeros={self.zeros!r} contradicts symmetric={self.symmetric}; give only one of them")
        object.__setattr__(self, "scale_dtype", checked_scale_dtype(self.scale_dtype))  # may be given by name
        if self.clip not in get_args(Clip):
            raise ArgumentError(f'clip must be "none" or "mse", got {self.clip!r}')
        scheme = self.scheme  # raises where the fields do not make a scheme
        if ACTIVATIONS[self.act].static:
            raise SchemeError(
                f"{scheme} takes the scale of its activations from a file that has one; quantized here are those with a scale a "
                f"token, such as {replace(scheme, act='int8_wide')}"
            )

    @property
    def name(self) -> str:
        """The method's name in reports and on the command line."""
        return type(self).__name__.lower()

    @property
    def scheme(self) -> QuantScheme:
        """What the codes of this method mean."""
        zeros: ZeroKind = self.zeros or ("none" if self.symmetric else "int")
        return QuantScheme(self.bits, self.group_size, zeros, self.act, self.codebook, self.rows, self.factors)

    def with_scheme(self: Self, scheme: str | QuantScheme) -> Self:
        """The same method with another scheme."""
        parsed = QuantScheme.parse(scheme)
        return replace(
            self,
            bits=parsed.bits,
            group_size=parsed.group_size,
            symmetric=parsed.symmetric,
            zeros=parsed.zeros,
            act=parsed.act,
            codebook=parsed.codebook,
            rows=parsed.rows,
            factors=parsed.factors,
        )

    def with_scales_for(self: Self, dtype: torch.dtype) -> Self:
        """The same method with the dtype of its scales settled by that of the weight in the checkpoint, not the one it
        is computed in."""
        return replace(self, scale_dtype=stored_dtype(torch.empty(0, dtype=dtype), self.scale_dtype, self.scheme))

    def quantize(self, weight: Tensor, moments: Tensor | None = None, name: str = "weight") -> QuantTensor:
        """Quantize a weight `[N, K]`.

        Args:
            weight: floating; its input channels are already scaled where the method folds scales.
            moments: `[K, K]` second moments of its inputs, up to a factor (`InputStatistics.hessian`); a method that
                needs none does not look at them.
            name: of the weight, ".weight" included: for error messages, and for what concerns some layers only.

        Raises:
            ArgumentError: the weight or the moments have the wrong shape, dtype or values.
            CalibrationError: the moments cannot be used; a run then rounds this weight to nearest, and says so.
        """
        raise NotImplementedError(f"{type(self).__name__} has no quantize of its own")

    def without_moments(self) -> Options | None:
        """What makes codes in its place where there are no moments, or none that can be used; None: rounding to nearest."""
        return None

    def with_one_order(self: Self) -> Self:
        """The same method, which leaves columns where they are in what it makes: experts of a stack share one order."""
        return self

    @property
    def orders_columns(self) -> bool:
        """Whether groups are formed in another order than the columns', so that the result may have a `group_index`."""
        return False

    @property
    def aims(self) -> bool:
        """Whether a linear layer's output shall be that of the model as it came, errors of the layers before it made up for:
        `for_inputs` is then given `cross` wherever what goes in there is known."""
        return False

    def for_inputs(self, moments: Tensor, cross: Tensor | None = None, name: str = "weight") -> Rounding:
        """`quantize` for weights that read the same input; what hangs on the input alone is done once.

        Args:
            moments: `2/n Σ x̂ x̂ᵀ` of its inputs as they come, `[K, K]`.
            cross: `2/n Σ (x - x̂) x̂ᵀ` with those of the model as it came, `[K, K]`, for a method that `aims`.
            name: of one of the weights, for error messages.

        Raises:
            CalibrationError: as `quantize`.
        """
        return lambda weight, name: self.quantize(weight, moments, name)

    def scale_search(self) -> ScaleSearch | None:
        """The search for scales to fold into what feeds a layer, for a method that searches them."""
        return None

    def scale_rule(self) -> ScaleRule | None:
        """The rule for scales to fold into what feeds a layer, for a method that computes them."""
        return None

    @property
    def folds(self) -> bool:
        """Whether it folds scales into what feeds a layer, which `layerwise.tracing` finds."""
        return self.scale_search() is not None or self.scale_rule() is not None
