"""Shared by all tests: one torch thread per worker, one seed, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Times say nothing on a busy machine; on a build server a failure must come back.
settings.register_profile("qkernels", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("qkernels")


# Of these a single test may take a minute: they begin, so that no worker is left alone with one at the end.
LONG = ("tests/cuda", "tests/tools", "tests/triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # the folder tests/gpu is a keyword too
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Draws without a generator of their own are the same in every run, in whatever order tests come. Another seed shows
    whether an inequality over random draws holds by luck: QKERNELS_TEST_SEED=1 python -m pytest tests/quantizers"""
    seed = int(os.environ.get("QKERNELS_TEST_SEED", "0"))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.fixture
def little_room() -> Iterator[None]:
    """512 MiB of address space: what allocates by what a header or config claims runs out of it here."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


WORDS = "the cat sat on a mat and looked at the moon while rain fell over the quiet little town by the sea".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def sample_text() -> str:
    """A few thousand tokens of words in a fixed, irregular order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(WORDS), (4000,), generator=generator).tolist()
    return " ".join(WORDS[i] for i in order)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A complete checkpoint directory: an untrained Llama of 2 layers (GQA, tied embeddings, bf16) with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([sample_text], trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory
