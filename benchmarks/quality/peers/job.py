"""What every adapter is told, on its command line. It runs in the tool's own environment, which has no qkernels but for ours.

An adapter writes the tool's own checkpoint to `out`, in the format that the tool calls its own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LEFT_OUT = ("lm_head", "pooler.dense")  # layers that every tool leaves in 16 or 32 bits


@dataclass(frozen=True)
class Job:
    """`windows`: int64 `[samples, seq_len]`, the calibration tokens, the same for every tool. `order`: none, group, static."""

    model: Path
    windows: torch.Tensor
    out: Path
    method: str
    bits: int
    group_size: int
    symmetric: bool
    order: str

    def left_out(self) -> list[str]:
        """Those of `LEFT_OUT` that the model has: a head, or an encoder's pooler."""
        causal = self._architecture().endswith("ForCausalLM")
        return [name for name in LEFT_OUT if (name == "lm_head") == causal]

    def _architecture(self) -> str:
        return str(json.loads((self.model / "config.json").read_text())["architectures"][0])

    def float_model(self) -> Any:
        """The causal language model, or the encoder, in fp32."""
        import transformers

        return getattr(transformers, self._architecture()).from_pretrained(self.model, dtype=torch.float32)

    def examples(self) -> list[dict[str, torch.Tensor]]:
        """One sequence each, as transformers models take them."""
        return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in self.windows]


def read_job() -> Job:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="safetensors with one tensor, windows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--order", choices=["none", "group", "static"], default="none")
    args = parser.parse_args()
    torch.manual_seed(0)
    return Job(
        args.model, load_file(args.windows)["windows"], args.out, args.method, args.bits, args.group_size,
        not args.asymmetric, args.order,
    )  # fmt: skip
