"""`QuantScheme`: how a weight was quantized, as a value with one short spelling.

w4a16_g128          4-bit symmetric weights in groups of 128 along K, 16-bit activations
w4a16_g128_asym     the same with integer zero points;  _fzero: float zero points;  _offset: w = code * scale + offset
w8a16_channel       one scale per output channel;  w8a16_tensor: one scale for the whole matrix
w4a8_g128           activations quantized to int8 while the kernel runs; zeros as above
nf4_g64             codes are indices into the NF4 codebook
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from .errors import SchemeError

Self = TypeVar("Self", bound="ActBitsIsAct")
ZeroKind = Literal["none", "int", "float", "offset"]
GroupSize = int | Literal["channel", "tensor"]

# QLoRA (Dettmers et al. 2023), appendix E: quantiles of a standard normal, scaled to [-1, 1], with an exact 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' 4-bit float, by bit pattern: sign, 2 bits of exponent, 1 of mantissa, scaled so that the largest is 1.
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = (*_FP4, *(-value for value in _FP4))
CODEBOOKS: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}


@dataclass(frozen=True)
class Activation:
    """What a kernel makes of x before it multiplies: an entry of `ACTIVATIONS`.

    Args:
        spelling: what follows the "a" of a short form, digits first.
        bits: width of the values that meet the weight's codes.
        integers: whether those values are integers, which multiply integer codes and no codebook's entries.
    """

    spelling: str
    bits: int
    integers: bool = False

    def __str__(self) -> str:
        return f"{self.bits}-bit activations"


# The one table of activations: a scheme's `act` is a key of it, and layouts name the keys that their kernels take.
ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation("16", 16),  # as they come: float16 or bfloat16, on some kernels also float32
    "int8": Activation("8", 8, integers=True),  # one scale a token, max |x| / 127, made while the kernel runs
}

_ACTS = " or ".join(f'"{name}"' for name in ACTIVATIONS if name is not None)

_ZERO_SUFFIX: dict[ZeroKind, str] = {"none": "", "int": "_asym", "float": "_fzero", "offset": "_offset"}
_SHORT_FORM = re.compile(
    r"(?:w(?P<bits>\d+)a(?P<act>\d+[a-z\d]*)|(?P<codebook>[a-z]+\d*))_(?P<group>g\d+|channel|tensor)(?P<zeros>_[a-z]+)?"
)


class ActBitsIsAct:
    """For values whose field `act` was once an integer `act_bits`, None or 8: old pickles load, the old keyword says so.

    A base class, so that the signature of the value stays the one that its dataclass made.
    """

    def __new__(cls: type[Self], *fields: Any, **named: Any) -> Self:
        if "act_bits" in named:
            raise SchemeError(
                'act_bits is called act: None for 16-bit activations, "int8" for int8 ones; or give the scheme in its short form '
                "(w4a16_g128, w4a8_g128)"
            )
        return object.__new__(cls)

    def __setstate__(self, state: dict[str, Any]) -> None:
        fields = dict(state)
        if "act_bits" in fields:
            fields["act"] = None if fields.pop("act_bits") is None else "int8"
        self.__dict__.update(fields)


@dataclass(frozen=True)
class QuantScheme(ActBitsIsAct):
    """How codes turn into weights.

    Args:
        bits: width of a code, 2 to 8.
        group_size: how many neighbours along K share a scale: a positive integer, "channel" (a whole row) or "tensor".
        zeros: "none" is symmetric, code 2^(bits-1) means 0; "int" and "float" are zero points subtracted from the code
            before scaling; "offset" is added after scaling.
        act: None keeps activations in 16 (or 32) bits; "int8" quantizes them per token inside the kernel. A key of
            `ACTIVATIONS`.
        codebook: None, or the name of a table in `CODEBOOKS` that maps a code to a value in [-1, 1].

    Raises:
        SchemeError: a field is out of range, or two fields contradict each other.

    >>> from qkernels import QuantScheme
    >>> scheme = QuantScheme.parse("w4a16_g64_asym")
    >>> scheme.bits, scheme.group_size, scheme.zeros, scheme.num_groups(4096)
    (4, 64, 'int', 64)
    >>> str(QuantScheme(bits=8, group_size="channel"))
    'w8a16_channel'
    """

    bits: int = 4
    group_size: GroupSize = 128
    zeros: ZeroKind = "none"
    act: str | None = None
    codebook: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SchemeError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        if isinstance(self.group_size, bool) or not (
            self.group_size in ("channel", "tensor") or (isinstance(self.group_size, int) and self.group_size > 0)
        ):
            raise SchemeError(
                f'group_size must be a positive integer, "channel" or "tensor", got {self.group_size!r}'
                + ('; the -1 of GPTQ configs is spelled "channel" here' if self.group_size == -1 else "")
            )
        if self.zeros not in get_args(ZeroKind):
            raise SchemeError(f"zeros must be one of {', '.join(get_args(ZeroKind))}, got {self.zeros!r}")
        if not isinstance(self.act, str | None) or self.act not in ACTIVATIONS:
            raise SchemeError(f"act must be None (16-bit activations) or {_ACTS}, got {self.act!r}")
        if ACTIVATIONS[self.act].integers and self.codebook is not None:
            raise SchemeError(
                f"{self.act} activations need integer codes (no codebook), got codebook={self.codebook!r}"
            )
        if self.codebook is not None:
            if self.codebook not in CODEBOOKS:
                raise SchemeError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {self.codebook!r}")
            if len(CODEBOOKS[self.codebook]) != 2**self.bits or self.zeros != "none":
                raise SchemeError(
                    f'codebook {self.codebook!r} has {len(CODEBOOKS[self.codebook])} entries and takes zeros="none", '
                    f"got bits={self.bits}, zeros={self.zeros!r}"
                )

    @property
    def symmetric(self) -> bool:
        """Whether no zero points are stored."""
        return self.zeros == "none"

    @property
    def max_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The code that means 0 in a symmetric scheme, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    def group_length(self, in_features: int) -> int:
        """How many weights of a row of `in_features` share a scale (the last group may be shorter)."""
        return self.group_size if isinstance(self.group_size, int) else max(in_features, 1)

    def num_groups(self, in_features: int) -> int:
        """G = ceil(K / group_size), at least 1."""
        return max(1, -(-in_features // self.group_length(in_features)))

    def __str__(self) -> str:
        weights = self.codebook or f"w{self.bits}a{ACTIVATIONS[self.act].spelling}"
        group = f"g{self.group_size}" if isinstance(self.group_size, int) else self.group_size
        return f"{weights}_{group}{_ZERO_SUFFIX[self.zeros]}"

    @classmethod
    def parse(cls, text: str | QuantScheme) -> QuantScheme:
        """Read the short form (see the head of this file); a `QuantScheme` passes through.

        Raises:
            SchemeError: the text is not a scheme.
        """
        if isinstance(text, QuantScheme):
            return text
        match = _SHORT_FORM.fullmatch(text.strip().lower()) if isinstance(text, str) else None
        kinds = {suffix: kind for kind, suffix in _ZERO_SUFFIX.items()}
        acts = {None: None} | {activation.spelling: name for name, activation in ACTIVATIONS.items()}
        zeros = (match["zeros"] or "") if match else ""
        if not match or zeros not in kinds or match["act"] not in acts:
            raise SchemeError(
                f"a scheme looks like w4a16_g128, w4a16_g64_asym, w8a16_channel, w4a8_g128 or nf4_g64, got {text!r}"
            )
        spelled = match["group"]
        group: GroupSize = int(spelled[1:]) if spelled[0] == "g" else "channel" if spelled == "channel" else "tensor"
        bits = int(match["bits"]) if match["bits"] else 4
        return cls(bits, group, kinds[zeros], acts[match["act"]], match["codebook"])
