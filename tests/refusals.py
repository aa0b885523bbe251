"""What each format refuses to store, of the schemes that the conformance suite goes through, and why; all else it stores.

The expectation is written down, not computed, so that a format that begins to refuse (or to take) something shows it here.
"""

from __future__ import annotations

INTEGER_SCHEMES = [
    *(f"w{bits}a16_g32{zeros}" for bits in (2, 3, 4, 8) for zeros in ("", "_asym")),
    "w4a16_g16_asym", "w4a16_channel", "w8a16_tensor", "w5a16_g32",
]  # fmt: skip
FLOATING_SCHEMES = ["w4a16_g64_fzero", "w4a16_g128_offset"]
CODEBOOK_SCHEMES = ["nf4_g64", "fp4_g32", "mxfp4_g32", "iq4nl_g32", "fp8_channel", "e5m2_g64"]
BLOCK_SCHEMES = ["fp8_block32", "w4a16_block32_asym"]
FACTORED_SCHEMES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "nvfp4_g16", "nvfp4m_g16"]
A8_CODEBOOKS = ["iq4nl_g32_a8", "mxfp4_g32_a8"]
A8_FACTORED = ["q4_k_a8", "q6_k_a8", "iq4_xs_a8"]
A8_SYMMETRIC = ["w4a8_g128", "w4a8_g32", "w8a8_channel", "w6a8_g16"]
A8_INTEGER_ZEROS = ["w4a8_g32_asym", "w8a8_channel_asym"]
A8_FLOATING = ["w4a8_g64_fzero", "w6a8_g32_offset"]
A8_SCHEMES = [*A8_SYMMETRIC, *A8_INTEGER_ZEROS, *A8_FLOATING, *A8_CODEBOOKS, *A8_FACTORED]
A8_ROUNDED = [
    "w8a8w_channel",
    "w4a8z_g32_asym",
    "w8a8o6_channel",
    "w8a8s_channel",
    "w4a8sz_g32_asym",
]  # other int8 activations
A16_SCHEMES = [*INTEGER_SCHEMES, *FLOATING_SCHEMES, *CODEBOOK_SCHEMES, *BLOCK_SCHEMES, *FACTORED_SCHEMES]
FACTORED = [*FACTORED_SCHEMES, *A8_FACTORED]
WITH_CODEBOOK = [*CODEBOOK_SCHEMES, *A8_CODEBOOKS, "fp8_block32", "iq4_xs", "iq4_xs_a8", "nvfp4_g16", "nvfp4m_g16"]
SCHEMES = [*A16_SCHEMES, *A8_SCHEMES, *A8_ROUNDED]

NO_FIELD = "it has no field for 8-bit activations"
Reasons = dict[str, list[str]]  # a part of the message -> the schemes that it is said of
_OFFSETS = [s for s in FACTORED if s[1] in "245"]
_NO_FIELDS: Reasons = {
    "zero points must be integers, ": [*FLOATING_SCHEMES, *A8_FLOATING, *_OFFSETS],
    " has a codebook": WITH_CODEBOOK,
    "scales are products of factors": FACTORED,
    "scales are those of blocks": BLOCK_SCHEMES,
    NO_FIELD: [*A8_SCHEMES, *A8_ROUNDED],
}
_PER_TENSOR: Reasons = {"it has no spelling for one scale per tensor": ["w8a16_tensor"]}
_GPTQ: Reasons = {
    **_NO_FIELDS,
    **_PER_TENSOR,
    "bits must be 2 or 3 or 4 or 8, got ": ["w5a16_g32", "w6a8_g16", "w6a8_g32_offset", "q5_k", "q6_k", "q6_k_a8"],
}
_BITS_4 = ("w4", "nf", "fp4", "mxfp4", "iq4", "nvfp4", "q4")
_NO_A8_FACTORS: Reasons = {": none are supported": A8_FACTORED}
# What compressed-tensors has formats for; their columns are in no other order.
_WRITTEN_FLOATS = ["fp8_channel", "fp8_block32", "mxfp4_g32", "nvfp4_g16"]

REFUSED: dict[str, Reasons] = {
    "native": {},
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "awq": {**_NO_FIELDS, **_PER_TENSOR, "bits must be 4, got ": [s for s in SCHEMES if not s.startswith(_BITS_4)]},
    "compressed-tensors": {
        **{reason: [s for s in refused if s not in _WRITTEN_FLOATS] for reason, refused in _NO_FIELDS.items()},
        NO_FIELD: ["w8a8o6_channel"],
        "its int8 activations are those of ": A8_SCHEMES,
        "scales of mxfp4 are float8_e8m0fnu, got float16": ["mxfp4_g32"],
        "weight_global_scale is one positive float32": ["nvfp4_g16"],
    },
    "cpu_tile_a16": {": these kernels take float32, bfloat16 and float16 ones": [*A8_SCHEMES, *A8_ROUNDED]},
    "cpu_tile_a8": {"16-bit activations: these kernels quantize them to int8": A16_SCHEMES},
    "mma_tile": {
        ": these kernels take bfloat16 and float16 ones": [*A8_SCHEMES, *A8_ROUNDED],
    },
    "mma_tile_a8": {
        "16-bit activations: these kernels quantize them to int8": A16_SCHEMES,
        "group_size 16 is neither 32 nor a multiple of 64": ["w6a8_g16"],
        "with int8 activations these kernels take symmetric weights alone": [
            *A8_INTEGER_ZEROS, *A8_FLOATING, "q4_k_a8", "w4a8z_g32_asym", "w4a8sz_g32_asym",
        ],
        "codebook 'iq4nl': only integer codes are supported": ["iq4nl_g32_a8", "iq4_xs_a8"],
        "codebook 'e2m1': only integer codes are supported": ["mxfp4_g32_a8"],
        **_NO_A8_FACTORS,
    },
    "kpack": {": these kernels take bfloat16 and float16 ones": [*A8_SCHEMES, *A8_ROUNDED]},
}  # fmt: skip
REFUSED_IN_ACT_ORDER = {"awq": "columns are in act-order, and AWQ has no group index"}


def reasons_for(fmt: str, scheme: str, ordered: bool) -> list[str]:
    """What the refusal has to say; empty: the format stores it."""
    reasons = [reason for reason, refused in REFUSED[fmt].items() if scheme in refused]
    if fmt == "compressed-tensors" and ordered and scheme in _WRITTEN_FLOATS:
        reasons.append("weight_g_idx goes with integer codes")
    return reasons + ([REFUSED_IN_ACT_ORDER[fmt]] if ordered and fmt in REFUSED_IN_ACT_ORDER else [])
