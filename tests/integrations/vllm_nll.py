"""Run by an interpreter that has vLLM: python vllm_nll.py DIRECTORY WINDOWS.json RANKS OUT.json [by-expert]

Reads token windows, writes the log-probabilities of their next tokens. vLLM finds the plug-in through
its entry point alone: nothing here imports qkernels.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main() -> None:
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    directory, windows, ranks = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    length = max(map(len, windows)) + 1
    engine = LLM(
        directory, quantization="qkernels", enforce_eager=True, max_model_len=length, max_num_seqs=4,
        tensor_parallel_size=ranks, enable_expert_parallel="by-expert" in sys.argv,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": window} for window in windows]
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    found = [
        [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
        for output, window in zip(outputs, windows, strict=True)
    ]
    Path(sys.argv[4]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
