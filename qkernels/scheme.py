"""`QuantScheme`: how a weight was quantized, as a value with one short spelling.

w4a16_g128          4-bit symmetric weights in groups of 128 along K, 16-bit activations
w4a16_g128_asym     the same with integer zero points;  _fzero: float zero points;  _offset: w = code * scale + offset
w8a16_channel       one scale per output channel;  w8a16_tensor: one scale for the whole matrix
w4a8_g128           activations quantized to int8 while the kernel runs; zeros as above; so are w8a8w_channel and w8a8z_channel,
                    as compressed-tensors computes, and w8a8o6_channel, LLM.int8's (`ACTIVATIONS`)
w8a8s_channel       int8 activations under a scale from the file;  w8a8sz_channel: and a zero point
nf4_g64             codes are indices into a codebook (`codebooks`); so are nvfp4_g16, iq4nl_g32, fp8_channel
mxfp4_g32           4-bit floats under scales that are powers of two;  fp8_block128: one scale a block of 128 x 128
q4_k, iq4_xs        GGUF's super-blocks: scales are products of two factors (`FACTORS`)
nf4_g64_a8, q4_k_a8 with int8 activations, where the values are integers
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from .codebooks import CODEBOOK_NUMBERS, CODEBOOKS, INTEGER_STEPS, width_of
from .errors import SchemeError

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_NUMBERS",
    "CODEBOOKS",
    "CODEBOOK_NUMBERS",
    "FACTORS",
    "FACTOR_NUMBERS",
    "Activation",
    "FactorKind",
    "QuantScheme",
]

Self = TypeVar("Self", bound="ActBitsIsAct")
ZeroKind = Literal["none", "int", "float", "offset"]
GroupSize = int | Literal["channel", "tensor"]


@dataclass(frozen=True)
class Activation:
    """What a kernel makes of x before it multiplies: an entry of `ACTIVATIONS`.

    Args:
        spelling: what follows the "a" of a short form, digits first.
        bits: width of the values that meet the weight's codes.
        integers: whether those values are integers, which multiply integer codes and no codebook's entries.
        what: how they are made, in a few words; "" where a width says it all.
        lowest: the smallest of the integers.
        grouped: whether the grouped products of stacked experts have them.
        threshold: where |x| >= it in any row, the column multiplies in 16 bits; None: nowhere.
        static: whether scale and zero point are the same for all tokens, and stored with the weight (`QuantTensor.x_static`).
        zero_points: whether codes stand for themselves less a zero point.
    """

    spelling: str
    bits: int
    integers: bool = False
    what: str = ""
    lowest: int = -127
    grouped: bool = True
    threshold: float | None = None
    static: bool = False
    zero_points: bool = False

    def __str__(self) -> str:
        return f"{self.bits}-bit activations" + (f" ({self.what})" if self.what else "")


# The one table of activations: a scheme's `act` is a key of it, and layouts name the keys that their kernels take. All integers
# are made while the kernel runs, with one scale a token, or the one that the file has for all. compressed-tensors computes scale
# and quotient in the dtype of x (calculate_qparams, fake_quantize; 0.20). LLM.int8: Dettmers et al. 2022, section 3.2, as
# bitsandbytes 0.50 computes it (backends/default/ops.py, int8_vectorwise_quant): x rounded to float16, the maximum of a row
# without the entries >= 6.
ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation("16", 16),  # as they come: float16 or bfloat16, on some kernels also float32
    "int8": Activation("8", 8, integers=True),  # max |x| / 127, in fp32
    "int8_wide": Activation("8w", 8, True, "max |x| / 127.5 in the dtype of x, -128 to 127", lowest=-128),
    "int8_zero": Activation("8z", 8, True, "(max - min) / 255 and a zero point a token", -128, zero_points=True),
    "int8_outliers": Activation("8o6", 8, True, "columns with |x| >= 6 in 16 bits", threshold=6.0),
    "int8_static": Activation("8s", 8, True, "one scale from the file, -128 to 127", -128, grouped=False, static=True),
    "int8_static_zero": Activation(
        "8sz", 8, True, "one scale and zero point from the file", -128, grouped=False, static=True, zero_points=True
    ),
}
ACTIVATION_NUMBERS: dict[str | None, int] = {name: i for i, name in enumerate(ACTIVATIONS)}


@dataclass(frozen=True)
class FactorKind:
    """How the scales of a weight (and its zeros) are products of a small number a group and an outer one for many.

    Args:
        bits, group_size, zeros, codebook: what a scheme of this kind has, and no other.
        small: dtype of the small factors.
        low, high: their range, where they are integers.
        span: weights along K under one outer factor; None: all of a row.
        divides: whether the outer factor divides; 1 over it would round.
        spelling: the short form of a scheme; one of these for each of `bits`.
    """

    spelling: tuple[str, ...]
    bits: tuple[int, ...]
    group_size: int
    zeros: ZeroKind = "none"
    codebook: str | None = None
    small: Literal["uint8", "int8", "float8_e4m3fn"] = "uint8"
    low: int = 0
    high: int = 0
    span: int | None = 256
    divides: bool = False

    @property
    def small_bits(self) -> int:
        """Bits of a small factor."""
        return (self.high - self.low).bit_length() if self.high else 8

    @property
    def groups_per_outer(self) -> int | None:
        """Groups under one outer factor; None: all of a row."""
        return None if self.span is None else self.span // self.group_size

    def outer_groups(self, groups: int) -> int:
        """S: outer factors of a row of so many groups."""
        return 1 if self.groups_per_outer is None else -(-groups // self.groups_per_outer)


# The one table of factors: a scheme's `factors` is a key of it. K-quants and IQ4_XS: ggml, ggml-common.h (block_q2_K, …); their
# outer factors are float16. NVFP4: e4m3 scales under one float32 of the tensor, kept once a row, since tensors are joined; it
# divides in compressed-tensors' files and multiplies in those of ModelOpt and GGUF.
FACTORS: dict[str, FactorKind] = {
    "k2": FactorKind(("q2_k",), (2,), 16, "offset", small="uint8", high=15),
    "k3": FactorKind(("q3_k",), (3,), 16, small="int8", low=-32, high=31),
    "k45": FactorKind(("q4_k", "q5_k"), (4, 5), 32, "offset", small="uint8", high=63),
    "k6": FactorKind(("q6_k",), (6,), 16, small="int8", low=-128, high=127),
    "iq4xs": FactorKind(("iq4_xs",), (4,), 32, codebook="iq4nl", small="int8", low=-32, high=31),
    "nvfp4": FactorKind(("nvfp4_g16",), (4,), 16, codebook="e2m1", small="float8_e4m3fn", span=None, divides=True),
    "nvfp4m": FactorKind(("nvfp4m_g16",), (4,), 16, codebook="e2m1", small="float8_e4m3fn", span=None),
}
FACTOR_NUMBERS: dict[str | None, int] = {None: 0} | {name: i for i, name in enumerate(FACTORS, 1)}

_ACTS = " or ".join(f'"{name}"' for name in ACTIVATIONS if name is not None)

_ZERO_SUFFIX: dict[ZeroKind, str] = {"none": "", "int": "_asym", "float": "_fzero", "offset": "_offset"}
_SHORT_FORM = re.compile(
    r"(?:w(?P<bits>\d+)a(?P<act>\d+[a-z\d]*)|(?P<codebook>[a-z]+\d*[a-z]*\d*))_(?P<group>g\d+|block\d+|channel|tensor)"
    r"(?P<zeros>_[a-z]+)?"
)
_SPELLED = {"e2m1": "mxfp4", "e4m3": "fp8"}  # codebooks by another name than their own
_SUFFIX = re.compile(r"(?P<rest>.*)_a(?P<act>\d+[a-z\d]*)")  # activations of schemes that do not begin with w…a…


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
        act: None keeps activations in 16 (or 32) bits; "int8" and others quantize them per token inside the kernel. A key of
            `ACTIVATIONS`.
        codebook: None, or the name of a table in `CODEBOOKS` that maps a code to a value.
        rows: how many neighbours along N share a scale, too: 1, but for blocks such as FP8's 128 x 128, where it is group_size.
            Kernels see one scale a row; what writes files or makes scales goes by it.
        factors: None, or the name of an entry of `FACTORS`: scales are products, and which, the entry says.

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
    rows: int = 1
    factors: str | None = None

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
        if self.codebook is not None:
            self._check_codebook(self.codebook)
        if self.rows != 1 and (isinstance(self.rows, bool) or self.rows != self.group_size):
            raise SchemeError(
                f"rows must be 1, or group_size for square blocks, got {self.rows!r} and {self.group_size!r}"
            )
        if self.factors is not None:
            self._check_factors(self.factors)

    def _check_codebook(self, name: str) -> None:
        if name not in CODEBOOKS:
            raise SchemeError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {name!r}")
        if len(CODEBOOKS[name]) != 2**self.bits or self.zeros != "none":
            raise SchemeError(
                f'codebook {name!r} has {len(CODEBOOKS[name])} entries and takes zeros="none", '
                f"got bits={self.bits}, zeros={self.zeros!r}"
            )
        if ACTIVATIONS[self.act].integers and name not in INTEGER_STEPS:
            raise SchemeError(
                f"{self.act} activations need integer codes (no codebook, or one of integers: {', '.join(INTEGER_STEPS)}), got "
                f"codebook={name!r}"
            )

    def _check_factors(self, name: str) -> None:
        if name not in FACTORS:
            raise SchemeError(f"factors must be one of {', '.join(FACTORS)}, got {name!r}")
        kind = FACTORS[name]
        got = {"group_size": self.group_size, "zeros": self.zeros, "codebook": self.codebook, "rows": self.rows}
        want = {"group_size": kind.group_size, "zeros": kind.zeros, "codebook": kind.codebook, "rows": 1}
        if self.bits not in kind.bits or got != want:
            raise SchemeError(
                f"factors {name!r} are those of {' and '.join(kind.spelling)}: bits {' or '.join(map(str, kind.bits))}, "
                f"{', '.join(f'{field}={value!r}' for field, value in want.items())}, got bits={self.bits}, "
                f"{', '.join(f'{field}={value!r}' for field, value in got.items())}"
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
        activations = ACTIVATIONS[self.act].spelling
        if self.codebook is None and self.factors is None:
            return f"w{self.bits}a{activations}_{self._group()}{_ZERO_SUFFIX[self.zeros]}"
        if self.factors is not None:
            kind = FACTORS[self.factors]
            weights = kind.spelling[kind.bits.index(self.bits)]
        else:
            assert self.codebook is not None
            weights = f"{_SPELLED.get(self.codebook, self.codebook)}_{self._group()}"
        return weights if self.act is None else f"{weights}_a{activations}"

    def _group(self) -> str:
        if not isinstance(self.group_size, int):
            return self.group_size
        return f"block{self.group_size}" if self.rows > 1 else f"g{self.group_size}"

    @classmethod
    def parse(cls, text: str | QuantScheme) -> QuantScheme:
        """Read the short form (see the head of this file); a `QuantScheme` passes through.

        Raises:
            SchemeError: the text is not a scheme.
        """
        if isinstance(text, QuantScheme):
            return text
        spelled = text.strip().lower() if isinstance(text, str) else ""
        acts = {None: None} | {activation.spelling: name for name, activation in ACTIVATIONS.items()}
        suffix = _SUFFIX.fullmatch(spelled)
        act = suffix["act"] if suffix else None
        base = suffix["rest"] if suffix else spelled
        if act in acts and (factored := _factored(base, acts[act])) is not None:
            return cls(**factored)
        match = _SHORT_FORM.fullmatch(base)
        kinds = {suffix: kind for kind, suffix in _ZERO_SUFFIX.items()}
        zeros = (match["zeros"] or "") if match else ""
        plain = match is not None and match["act"] is not None
        if not match or zeros not in kinds or (plain and act is not None):
            match = None
        elif plain:
            act = match["act"]
        if match is None or act not in acts:
            raise SchemeError(
                f"a scheme looks like w4a16_g128, w4a16_g64_asym, w8a16_channel, w4a8_g128, nf4_g64, mxfp4_g32 or q4_k, got "
                f"{text!r}"
            )
        codebook = {short: name for name, short in _SPELLED.items()}.get(match["codebook"], match["codebook"])
        if codebook is not None and codebook not in CODEBOOKS:
            known = ", ".join(_SPELLED.get(name, name) for name in CODEBOOKS)
            raise SchemeError(f"a scheme begins with w…a…, a codebook ({known}) or a type of GGUF, got {text!r}")
        group, rows = _group_of(match["group"])
        bits = int(match["bits"]) if codebook is None else width_of(codebook)
        return cls(bits, group, kinds[zeros], acts[act], codebook, rows)


def _factored(text: str, act: str | None) -> dict[str, Any] | None:
    """The fields of a scheme with factors, where a text spells one."""
    for name, kind in FACTORS.items():
        if text in kind.spelling:
            bits = kind.bits[kind.spelling.index(text)]
            return {
                "bits": bits, "group_size": kind.group_size, "zeros": kind.zeros, "act": act, "codebook": kind.codebook,
                "factors": name,
            }  # fmt: skip
    return None


def _group_of(spelled: str) -> tuple[GroupSize, int]:
    """group_size and rows of the part of a short form that says them."""
    if spelled.startswith("block"):
        return int(spelled[5:]), int(spelled[5:])
    if spelled == "channel":
        return "channel", 1
    return ("tensor", 1) if spelled == "tensor" else (int(spelled[1:]), 1)
