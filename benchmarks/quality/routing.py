"""Which tokens experts are calibrated with: those that the router sends, or all. Two small mixtures, trained here for a few
minutes on the demo model's calibration text; KL of the quantized model from the float one on text that neither has seen.

    python -m benchmarks.quality.routing [--seconds 240] [--directory DIR]

docs/decisions/0021 has the table.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels import GPTQ, RTN, quantize
from qkernels.layerwise.running import Routing

DEMO = Path(__file__).parents[2] / "examples" / "demo_model"
SEQ_LEN = 128
SIZES = {
    "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral, 8 experts, top 2": (
        "Mixtral", {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
    ),
    "Qwen2-MoE, 32 experts, top 4, shared": (
        "Qwen2Moe",
        {
            "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128,
            "intermediate_size": 256, "norm_topk_prob": True, "router_aux_loss_coef": 0.0,
        },
    ),
}  # fmt: skip


def tokens(name: str) -> Tensor:
    from transformers import AutoTokenizer

    text = (DEMO / name).read_text(encoding="utf-8")
    return torch.tensor(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"])


def load_float(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def trained(prefix: str, fields: dict[str, Any], seconds: float) -> Any:
    """A model after so many seconds of AdamW."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        **SIZES, **fields, output_router_logits=fields["router_aux_loss_coef"] > 0
    )
    model: Any = getattr(transformers, f"{prefix}ForCausalLM")(config)
    ids, began, step = tokens("calibration.txt"), time.monotonic(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    while (used := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = (
                2e-3 * min(1.0, (step + 1) / 30) * (0.05 + 0.95 * (1 + math.cos(math.pi * used / seconds)) / 2)
            )
        starts = torch.randint(len(ids) - SEQ_LEN, (8,))
        batch = torch.stack([ids[start : start + SEQ_LEN] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 1:
            print(f"{prefix}: step {step}, {used:.0f} s, loss {float(loss.detach()):.3f}", flush=True)
    model.config.output_router_logits = False
    return model.eval()


@torch.no_grad()
def divergence(model: Any, reference: Any, ids: Tensor) -> tuple[float, float]:
    """Nats a token of the next tokens from the reference's; and the loss of the model."""
    totals = [0.0, 0.0]
    for window in ids:
        p, q = (torch.log_softmax(m(window[None]).logits[0].float(), -1) for m in (reference, model))
        totals[0] += float((p.exp() * (p - q)).sum(-1).mean())
        totals[1] += float(torch.nn.functional.nll_loss(q[:-1], window[1:]))
    return totals[0] / len(ids), totals[1] / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--directory", type=Path, help="keep trained models here, or take them from here")
    parser.add_argument("--only", type=int, help="one of the models")
    args = parser.parse_args()
    text, held_out = tokens("calibration.txt"), tokens("eval.txt")
    held_out = held_out[: 48 * SEQ_LEN].view(48, SEQ_LEN)
    for number, (name, (prefix, fields)) in enumerate(MODELS.items()):
        if args.only not in (None, number):
            continue
        kept = None if args.directory is None else args.directory / prefix
        if kept is not None and kept.is_dir():
            model = load_float(kept)
        else:
            model = trained(prefix, fields, args.seconds)
            if kept is not None:
                model.save_pretrained(kept)
        print(f"## {name}: loss {divergence(model, model, held_out)[1]:.3f} on text that it has not seen")
        print("| bits | windows | method | KL | with few tokens |\n|---|---|---|---|---|")
        for bits in (3, 4):
            rtn = copy.deepcopy(model)
            quantize(rtn, RTN(bits, 32), include="*experts", progress=False, on_unsupported="reference")
            print(f"| {bits} | – | RTN | {divergence(rtn, model, held_out)[0]:.5f} | – |", flush=True)
            for windows in (8, 16, 64):
                given = text[: windows * SEQ_LEN].view(windows, SEQ_LEN)
                routings: tuple[Routing, ...] = ("routed", "all")
                for routing in routings:
                    made = copy.deepcopy(model)
                    report = quantize(
                        made, GPTQ(bits, 32), given, include="*experts", seq_len=SEQ_LEN, routing=routing, progress=False,
                        on_unsupported="reference",
                    )  # fmt: skip
                    rare = sum(int(m.few.split()[0]) for m in report.modules if m.few) // 2
                    print(
                        f"| {bits} | {windows} | GPTQ, {routing} | {divergence(made, model, held_out)[0]:.5f} | {rare} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
