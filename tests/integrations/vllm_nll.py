"""Run by an interpreter that has vLLM: python vllm_nll.py DIRECTORY WINDOWS.json OUT.json [SETTINGS as JSON]

Reads token windows, writes {"found": the log-probabilities of their next tokens, "loading": what the process of vLLM that grew
most held while files were mapped, [before, highest, after] in bytes}. Settings go to vLLM's `LLM`, but "adapter", the directory
of a LoRA; "new", so many tokens that vLLM writes after each window, whose log-probabilities are found instead; and "watch": true,
without which there is no "loading". vLLM finds the plug-in through its entry point alone: nothing
here imports qkernels.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Watch:
    """Anonymous memory of the processes below this one, as long as they have files of a directory mapped. (What is mapped counts
    as resident, too, and the system takes it back.)"""

    def __init__(self, directory: str) -> None:
        self._mapped = str(Path(directory).resolve())
        self._seen: dict[str, list[int]] = {}
        self._done = False
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._done:
            for process in below(str(os.getpid())):
                with contextlib.suppress(OSError):
                    if self._mapped in Path(f"/proc/{process}/maps").read_text():
                        status = Path(f"/proc/{process}/status").read_text()
                        (held,) = re.findall(r"RssAnon:\s+(\d+) kB", status)
                        self._seen.setdefault(process, []).append(int(held) * 1024)
            time.sleep(0.005)

    def loading(self) -> list[int]:
        """[before, highest, after] of the process that grew most. Ends the watch."""
        self._done = True
        each = [[seen[0], max(seen), seen[-1]] for seen in self._seen.values()]
        return max(each, key=lambda held: held[1] - held[0], default=[])


def below(process: str) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += [child, *below(child)]
    return found


def main() -> None:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    directory, windows = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    settings: dict[str, Any] = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    adapter, new = settings.pop("adapter", None), settings.pop("new", 0)
    length = max(map(len, windows)) + max(new, 1)
    watch = Watch(directory) if settings.pop("watch", False) else None
    engine = LLM(
        directory, quantization="qkernels", max_model_len=length, max_num_seqs=4, enable_lora=adapter is not None,
        **{"enforce_eager": True, **settings},
    )  # fmt: skip
    loading = watch.loading() if watch else []
    prompts = [{"prompt_token_ids": window} for window in windows]
    sampling = SamplingParams(
        temperature=0, max_tokens=max(new, 1), ignore_eos=True, logprobs=0, prompt_logprobs=None if new else 0
    )
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = engine.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    read = [
        (list(output.outputs[0].token_ids), output.outputs[0].logprobs)
        if new
        else (window[1:], output.prompt_logprobs[1:])
        for output, window in zip(outputs, windows, strict=True)
    ]
    found = [[entry[token].logprob for token, entry in zip(tokens, entries, strict=True)] for tokens, entries in read]
    tokens = [tokens for tokens, _ in read]
    Path(sys.argv[3]).write_text(json.dumps({"found": found, "tokens": tokens, "loading": loading}))


if __name__ == "__main__":
    main()
