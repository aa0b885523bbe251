"""The server of transformers (`transformers serve`) with one model that `qkernels.load` has read, whatever its format.

Its model manager loads by `from_pretrained`, which would dequantize a GGUF file and knows no HQQ; `OneModel` takes its place
while the server is built, and everything else stays as it is. Written for transformers 5.24 (`transformers/cli/serve.py`).
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ..checkpoint import load, open_checkpoint
from ..errors import ArgumentError, CheckpointError, MissingPackage
from ..optional import need_transformers
from ..texts import load_tokenizer

INSTALL: Final = (
    "pip install 'qkernels[serve]' (in a clone of the repository: pip install '.[serve]' --no-build-isolation)"
)
NEEDED: Final = ("fastapi", "uvicorn", "openai", "pydantic")
# Under continuous batching transformers reserves 60 % of a machine's memory for its cache; on a CPU that is everybody's. These
# take a few hundred MB on small models, and were faster.
CPU_CACHE: Final = {"cb_num_blocks": 128, "cb_max_batch_tokens": 512}


@dataclass(frozen=True)
class Served:
    """What is served, and what the server does not do with it, in sentences."""

    name: str
    architecture: str
    gaps: tuple[str, ...]


def there() -> bool:
    """Whether the server of transformers can start."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDED)


def need_server() -> None:
    """Raise unless the server of transformers can start.

    Raises:
        MissingPackage: names what is missing, and the command that installs it.
    """
    need_transformers("serving")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("transformers.cli.serving") is None:
        missing.append("transformers 5.20 or newer (transformers.cli.serving)")
    if missing:
        raise MissingPackage(f"serving needs {', '.join(missing)}, not installed: {INSTALL}")


def need_address(host: str, port: int) -> None:
    """Raise unless one can listen there; the server itself would say so after the weights are read.

    Raises:
        ArgumentError: names the reason: somebody listens there, or it is no address of this machine.
    """
    if not 0 < port < 2**16:
        raise ArgumentError(f"--port must be 1 to 65535, got {port}")  # resolvers take the rest of a division by 65536
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            tried.bind(address)
    except (OSError, UnicodeError) as error:
        raise ArgumentError(f"cannot listen at {host}:{port}: {error}; give another --host or --port") from None


def check(path: str | Path, name: str, continuous_batching: bool) -> Served:
    """What can be known before the weights are read: headers, tokenizer, and what the server is silent about.

    Raises:
        CheckpointError: it is no sound checkpoint, has no tokenizer, or is a model that puts out no text.
    """
    checkpoint, tokenizer = open_checkpoint(path), load_tokenizer(path)
    names = checkpoint.config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "unknown"
    if not architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise CheckpointError(f"{path} is a {architecture}; served are models that put out text (…ForCausalLM)")
    context = checkpoint.config.get("max_position_embeddings")
    gaps = []
    if not tokenizer.chat_template:
        gaps.append("no chat template: /v1/chat/completions answers with an error, /v1/completions works")
    if isinstance(context, int):
        gaps.append(f"requests beyond {context} tokens, the context of this model, are not refused")
    gaps.append("n, logprobs, echo, response_format and tool_choice are accepted and ignored")
    gaps.append("a prompt is one text, no list and no token ids; /v1/responses streams unless it is told stream=false")
    if continuous_batching:
        gaps.append("with --continuous-batching, stop is ignored and the first request's sampling holds for all")
    else:
        gaps.append("a stop string stays at the end of the answer")
        gaps.append("clients wait for one another; --continuous-batching lets them go on together")
    gaps.append("a client that leaves a request without stream=true does not stop it")
    return Served(name, architecture, tuple(gaps))


@contextmanager
def one_model(
    path: str | Path, device: torch.device, dtype: torch.dtype | None, options: dict[str, Any]
) -> Iterator[None]:
    """While this holds, a server that is built has the checkpoint at `path` as its only model, under whatever name it is given.

    Args:
        options: of `load`.
    """
    from transformers.cli.serving import model_manager

    before = model_manager.ModelManager

    class OneModel(before):  # type: ignore[valid-type, misc]
        """Loads what it is told to once, and by no name anything else."""

        def load_model_and_processor(
            self,
            model_id_and_revision: str,
            progress_callback: Callable[[dict[str, Any]], None] | None = None,
            tqdm_class: type | None = None,
            gguf_file: str | None = None,
        ) -> tuple[Any, Any]:
            key = model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}"
            if key not in self.loaded_models:
                model = load(path, device=device, dtype=dtype, **options)
                # Else the engine, which leaves this to the files, ignores a temperature that a client asks for; 0 is greedy.
                model.generation_config.do_sample = True
                self.loaded_models[key] = model_manager.TimedModel(model, -1, processor=load_tokenizer(path))
            if progress_callback is not None:
                progress_callback({"status": "ready", "model": key, "cached": True})
            held = self.loaded_models[key]
            return held.model, held.processor

    model_manager.ModelManager = OneModel
    try:
        yield
    finally:
        model_manager.ModelManager = before


def serve(
    path: str | Path,
    name: str,
    host: str,
    port: int,
    device: torch.device,
    dtype: torch.dtype | None,
    continuous_batching: bool,
    **options: Any,
) -> Any:
    """Serve until interrupted; `non_blocking=True` returns the server, for tests.

    Args:
        options: `cb_…`, `non_blocking` and `log_level` are of transformers' `Serve`, the others of `load`.
    """
    from transformers.cli.serve import Serve

    of_server = {
        key: options.pop(key) for key in list(options) if key.startswith("cb_") or key in ("non_blocking", "log_level")
    }
    if continuous_batching and device.type == "cpu":
        of_server = CPU_CACHE | of_server
    with one_model(path, device, dtype, options):
        return Serve(
            force_model=name,
            host=host,
            port=port,
            device=str(device),
            continuous_batching=continuous_batching,
            **of_server,
        )
