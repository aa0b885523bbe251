"""Models that are named by their id on the Hugging Face Hub, "owner/name", through huggingface_hub: its cache, its token, its
offline mode (HF_HUB_OFFLINE), its endpoint (HF_ENDPOINT).

Only data is fetched: safetensors, GGUF, JSON, and the texts that tokenizers and chat templates are made of. No pickle and no code
is asked for, whatever the repository holds.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from .errors import CheckpointError, MissingPackage
from .storage.beside import OTHER_WEIGHTS
from .storage.gguf import SUFFIX

log = logging.getLogger(__name__)

# Of the top folder alone; what else lies in a repository (onnx/, original/) is of other programs.
DATA: Final = ("*.safetensors", "*.json", "merges.txt", "vocab.txt", "*.jinja")
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(:[\w.+-]+)?")
_FIRST: Final = 2**20  # bytes of a GGUF file that are asked for first; twice as many while its header is longer
_LONGEST: Final = 2**28


@dataclass(frozen=True)
class HubId:
    """A repository, and of a repository of GGUF files which: "owner/name:FILE.gguf" or "owner/name:Q4_K_M"."""

    repository: str
    file: str | None = None

    def __str__(self) -> str:
        return self.repository if self.file is None else f"{self.repository}:{self.file}"


def hub_id(model: str | os.PathLike[str]) -> HubId | None:
    """The id on the Hub that a name is; None of what lies here, and of what is no id. Whatever exists here comes first.

    >>> from qkernels.hub import hub_id
    >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("./my-model"), hub_id("owner/name:Q4_K_M").file
    (HubId(repository='Qwen/Qwen3-0.6B', file=None), None, 'Q4_K_M')
    """
    if not isinstance(model, str) or not _ID.fullmatch(model) or Path(model).exists():
        return None
    if Path(model).parent.is_dir() or (model.endswith((SUFFIX, ".json", ".safetensors")) and ":" not in model):
        return None  # a path that was misspelled: it should not be asked of the network
    repository, _, file = model.partition(":")
    return HubId(repository, file or None)


def local_copy(model: str | os.PathLike[str], revision: str | None = None) -> str | os.PathLike[str]:
    """Where a model lies here: a path as it is, an id on the Hub as its folder (or GGUF file) in the cache, fetched if not
    there.

    Args:
        revision: a branch, tag or commit; None: the main one.

    Raises:
        CheckpointError: a revision of a path; there is no such repository or revision, it is gated, or out of reach; it holds
            no data that is read here; or several GGUF files.
        MissingPackage: huggingface_hub is not installed.
    """
    found = hub_id(model)
    if found is None:
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} is of models on the Hub (owner/name), got the path {model}")
        return model
    hub = _need_hub(found)
    with _reaching(found, revision):
        if _offline():
            ignored = {"local_files_only": True}
            folder = Path(hub.snapshot_download(found.repository, revision=revision, **ignored))
            return _in_folder(found, folder)
        names = [
            entry.rfilename for entry in hub.HfApi().model_info(found.repository, revision=revision).siblings or ()
        ]
        wanted = _wanted(found, names)
        folder = Path(hub.snapshot_download(found.repository, revision=revision, allow_patterns=wanted))
    return folder / wanted[0] if wanted[0].endswith(SUFFIX) else folder


@contextmanager
def headers_of(found: HubId, revision: str | None = None) -> Iterator[Path]:
    """A folder, or a GGUF file, that looks like the model: its JSON files, and of its weights the headers alone, in files of the
    right size that are empty behind them (holes, which take no room). Gone afterwards.

    Raises:
        CheckpointError: as `local_copy`.
    """
    hub = _need_hub(found)
    with tempfile.TemporaryDirectory(prefix="qkernels-headers-") as name:
        folder = Path(name)
        with _reaching(found, revision):
            if _offline():
                copy = local_copy(str(found), revision)
                yield Path(copy)
                return
            api = hub.HfApi()
            info = api.model_info(found.repository, revision=revision)
            revision = info.sha or revision
            wanted = _wanted(found, [entry.rfilename for entry in info.siblings or ()])
            for file in wanted:
                if file.endswith(SUFFIX):
                    _gguf_header(hub, found.repository, file, revision, folder / file)
                elif file.endswith(".safetensors"):
                    parsed = api.parse_safetensors_file_metadata(found.repository, file, revision=revision)
                    _write_header(parsed, folder / file)
                elif file.endswith(".json"):
                    fetched = Path(hub.hf_hub_download(found.repository, file, revision=revision))
                    (folder / file).write_bytes(fetched.read_bytes())
        yield folder / wanted[0] if wanted[0].endswith(SUFFIX) else folder


def _wanted(found: HubId, names: list[str]) -> list[str]:
    """The files of a repository that are read here: data of its top folder; or one GGUF file, with the other parts of it."""
    top = [name for name in names if "/" not in name]
    plain = [name for name in top if any(fnmatchcase(name, pattern) for pattern in DATA)]
    weights = [
        name
        for name in plain
        if name.endswith(".safetensors") and not any(fnmatchcase(name, other) for other in OTHER_WEIGHTS)
    ]
    ggufs = sorted(name for name in top if name.endswith(SUFFIX) and "mmproj" not in name.lower())
    if found.file is None and weights:
        return [name for name in plain if not name.endswith(".safetensors") or name in weights]
    if found.file is not None:
        ggufs = [name for name in ggufs if name == found.file or found.file.lower() in name.lower()]
    first = [name for name in ggufs if "-of-" not in name or "-00001-of-" in name]
    if len(first) == 1:
        stem = first[0].partition("-00001-of-")[0]
        return [first[0], *(name for name in ggufs if name != first[0] and name.startswith(f"{stem}-"))]
    if first:
        raise CheckpointError(
            f"{found} holds {len(first)} GGUF files; name one: {found.repository}:{first[0]}, or by its type, such as :Q4_K_M"
        )
    shown = ", ".join(top[:6]) or "nothing"
    raise CheckpointError(
        f"{found} has no safetensors{' and no GGUF file' if found.file is None else f' or GGUF file {found.file!r}'} in its top "
        f"folder (there is {shown}); pickled weights are not read"
    )


def _in_folder(found: HubId, folder: Path) -> Path:
    """The model in a folder of the cache, which nobody completes now."""
    wanted = _wanted(found, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()])
    return folder / wanted[0] if wanted[0].endswith(SUFFIX) else folder


def _write_header(parsed: Any, path: Path) -> None:
    """A safetensors file with this header, and a hole where the tensors are."""
    header: dict[str, Any] = {"__metadata__": dict(parsed.metadata)} if parsed.metadata else {}
    end = 0
    for name, tensor in parsed.tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)}
        end = max(end, tensor.data_offsets[1])
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _gguf_header(hub: Any, repository: str, file: str, revision: str | None, path: Path) -> None:
    """A GGUF file with its real beginning, and a hole behind it."""
    from .storage.gguf_header import read_header

    url, sent = hub.hf_hub_url(repository, file, revision=revision), hub.utils.build_hf_headers()
    size = hub.get_hf_file_metadata(url).size
    length = min(_FIRST, size)
    while True:
        answer = hub.utils.get_session().get(
            url, headers={**sent, "Range": f"bytes=0-{length - 1}"}, follow_redirects=True
        )
        hub.utils.hf_raise_for_status(answer)
        with path.open("wb") as out:
            out.write(answer.content[:length])
            out.truncate(size)
        try:
            read_header(path)
        except CheckpointError:
            if length == size or length >= _LONGEST:
                raise
            length = min(2 * length, size)
            continue
        return


def _need_hub(found: HubId) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackage(
            f"{found} is an id on the Hub, which needs huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _reaching(found: HubId, revision: str | None) -> Iterator[None]:
    """Errors of the Hub in our words."""
    from huggingface_hub import errors

    at = "" if revision is None else f" at {revision}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{found} is gated: ask for access on its page, and log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{found} has no revision {revision!r:.60}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no {found.repository} here and none on the Hub that you may read; a local directory that is meant must "
            "exist, a private repository a token (HF_TOKEN)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{found}{at} is not in the cache of the Hub, and cannot be fetched now"
            + (" (HF_HUB_OFFLINE is set)" if _offline() else "")
        ) from error
    except Exception as error:
        # httpx, or whatever huggingface_hub is built on in its next version: its errors have no base that is exported
        if not isinstance(error, errors.HfHubHTTPError) and not type(error).__module__.startswith(
            ("httpx", "requests")
        ):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{found}{at} cannot be fetched: {first:.200}") from error
