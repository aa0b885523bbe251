"""Train the demo's small Llama, or its small mixture of experts, from scratch on the CPU.

Reads train.txt and eval.txt of corpus.py. Everything goes into one folder: the tokenizer, the
tokens, the newest checkpoint, the log, and in `model/` the model in bfloat16 as `transformers`
loads it. The same command continues a run that was stopped, at its newest checkpoint and with the
same batches that an unbroken run would have seen.

Examples:
    python train.py --text work --out work/run
    python train.py --text work --out work/run --bf16 --compile    # CPUs with AVX512-BF16 or AMX
    python train.py --text work --out work/try --steps 50 --batch 4
    python train.py --text work --out work/moe --mixture           # a Qwen3-MoE instead of a Llama
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from corpus import DOCUMENT_BREAK
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END = "<|endoftext|>"  # between documents; also what a generation starts from and stops at
POSITIONS = 1024
# Multiples of 256, so that the LM head is quantizable like every other linear. A quarter of the mixture's
# 8 MB would go into 2048 rows.
LLAMA_VOCABULARY = 2048
MIXTURE_VOCABULARY = 1024


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: 256 bytes, one special token and the merges that fill the vocabulary."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text.split(DOCUMENT_BREAK), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents as one array of token ids, each one followed by the end token."""
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*row, tokenizer.eos_token_id], np.uint16) for row in rows])


def llama_config(special: dict[str, int]) -> LlamaConfig:
    """8.4 M parameters; the usual group sizes divide the width of every linear, a multiple of 256."""
    return LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        **special,
    )


def mixture_config(special: dict[str, int]) -> Qwen3MoeConfig:
    """3.9 M parameters, 80 % of them in 2 x 8 experts, of which a token meets 2 a layer; every width is a multiple of 256."""
    return Qwen3MoeConfig(
        vocab_size=MIXTURE_VOCABULARY,
        hidden_size=256,
        intermediate_size=256,  # of a dense MLP, which no layer has
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        **special,
    )


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else Qwen3MoeForCausalLM(config)
    # Two writes per layer add up in the residual stream; starting them smaller by the square root
    # of their number keeps its variance independent of the depth (Radford et al. 2019, GPT-2).
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter /= math.sqrt(2 * config.num_hidden_layers)
    return model


def batch_at(tokens: np.ndarray, step: int, batch: int, length: int, seed: int) -> Tensor:
    """int64 [batch, length + 1]: the windows of one step, a pure function of the step.

    An epoch visits every window once in random order; its first window starts at a random offset,
    so that the windows of two epochs do not cut the text at the same places.
    """
    per_epoch = (len(tokens) - 1) // length - 1
    steps = per_epoch // batch
    rng = np.random.default_rng([seed, step // steps])
    offset = rng.integers(length)
    chosen = rng.permutation(per_epoch)[step % steps * batch :][:batch]
    at = offset + chosen[:, None] * length + np.arange(length + 1)
    return torch.from_numpy(tokens[at].astype(np.int64))


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: np.ndarray, length: int = 256) -> float:
    """exp of the mean negative log likelihood over consecutive windows without overlap, in fp32.

    A window of `length` tokens predicts its last length - 1 tokens; a short rest is dropped.
    """
    windows = tokens[: len(tokens) // length * length].astype(np.int64).reshape(-1, length)
    total = 0.0
    model.eval()
    for rows in torch.from_numpy(windows).split(32):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        total += nll.item()
    model.train()
    return math.exp(total / (windows.shape[0] * (length - 1)))


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, since a decayed norm weight would just be rescaled."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # a mixture stacks its experts' in three dimensions
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it under the class name that every version of `transformers` knows.

    Version 5 writes "TokenizersBackend", which version 4 cannot load; both load this one.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for how_it_was_loaded in ("is_local", "local_files_only"):
        settings.pop(how_it_was_loaded, None)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """Write a bfloat16 copy of the model, and the tokenizer; returns the copy."""
    rounded = type(model)(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return rounded


def save_checkpoint(file: Path, state: dict[str, object]) -> None:
    """Write beside the old checkpoint, then rename: a kill at any moment leaves one that loads."""
    fresh = file.with_suffix(".tmp")
    torch.save(state, fresh)
    fresh.replace(file)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with train.txt, eval.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--mixture", action="store_true", help="a Qwen3-MoE of 8 experts instead of a Llama")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default: 4000)")
    parser.add_argument("--batch", type=int, default=16, help="windows per step (default: 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens per window (default: 256)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate (default: 2e-3)")
    parser.add_argument("--warmup", type=int, default=100, help="warm-up steps (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast in the forward pass")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs g++)")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: 250)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, stored_tokens = args.out / "checkpoint.pt", args.out / "tokens.npy"

    text = (args.text / "train.txt").read_text("utf-8")
    if stored_tokens.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer")
        tokens = np.load(stored_tokens)
    else:
        tokenizer = train_tokenizer(text, MIXTURE_VOCABULARY if args.mixture else LLAMA_VOCABULARY)
        save_tokenizer(tokenizer, args.out / "tokenizer")
        tokens = encode(tokenizer, text.split(DOCUMENT_BREAK))
        np.save(stored_tokens, tokens)
    evaluation = encode(tokenizer, [(args.text / "eval.txt").read_text("utf-8")])[:-1]
    ratio = len(text.encode()) / len(tokens)
    print(f"{len(tokens):,} tokens of {ratio:.2f} bytes; {len(evaluation):,} for evaluation")

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build_model(mixture_config(special) if args.mixture else llama_config(special), args.seed)
    optimizer = make_optimizer(model)
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {start}")

    # A mixture is also asked to use its experts evenly (Fedus et al. 2021, Switch Transformers, section 2.2).
    routing = {"output_router_logits": True} if args.mixture else {}

    def losses_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        """The mean negative log likelihood, and what is to be minimized."""
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            out = model(input_ids=rows[:, :-1], use_cache=False, **routing)
        nll = nn.functional.cross_entropy(out.logits.float().flatten(0, 1), rows[:, 1:].flatten())
        return nll.detach(), nll + model.config.router_aux_loss_coef * out.aux_loss if args.mixture else nll

    forward = torch.compile(losses_of) if args.compile else losses_of
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=5)
    mean_loss = math.nan
    clock = time.monotonic()
    for step in progress:
        rate = learning_rate(step, args.steps, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batch_at(tokens, step, args.batch, args.length, args.seed)
        nll, loss = forward(rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = nll.item()
        mean_loss = value if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * value
        progress.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{rate:.1e}", refresh=False)

        done = step + 1
        if done % args.save_every and done != args.steps:
            continue
        seconds += time.monotonic() - clock
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint, {**state, "step": done, "seconds": seconds})
        rounded = save_model(model, tokenizer, args.out / "model")
        row = {
            "step": done,
            "tokens": done * args.batch * args.length,
            "seconds": round(seconds),
            "loss": round(mean_loss, 4),
            "perplexity": round(perplexity(rounded.float(), evaluation), 3),
        }
        with (args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        tqdm.write(json.dumps(row))
        clock = time.monotonic()


if __name__ == "__main__":
    main()
