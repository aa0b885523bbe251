"""A Hub of one's own: what huggingface_hub asks of the real one, answered from folders, on loopback."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(repositories: Mapping[str, Path], asked: list[str]) -> Iterator[str]:
    """The address of a server that has these repositories, each with a main branch and a tag v1.

    Args:
        asked: is told every request, as "METHOD path range".
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            wanted = self.headers.get("Range", "")
            asked.append(f"{self.command} {path} {wanted}".rstrip())
            status, headers, body = self._found(path)
            if status == 200 and wanted.startswith("bytes="):
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                body, status = body[int(begin) : int(end) + 1 if end else None], 206
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _found(self, path: str) -> tuple[int, dict[str, str], bytes]:
            for repository, folder in repositories.items():
                if path.startswith(f"/api/models/{repository}"):
                    rest = path.removeprefix(f"/api/models/{repository}")
                    if rest.startswith("/revision/") and rest.removeprefix("/revision/") not in ("main", "v1", COMMIT):
                        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
                    if rest.startswith("/tree/"):
                        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
                        tree = [
                            {
                                "type": "file",
                                "path": str(p.relative_to(folder)),
                                "size": p.stat().st_size,
                                "oid": COMMIT,
                            }
                            for p in files
                        ]
                        return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
                    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
                    siblings = [{"rfilename": name} for name in names]
                    about = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
                    return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
                for revision in ("main", "v1", COMMIT):
                    begin = f"/{repository}/resolve/{revision}/"
                    file = folder / path.removeprefix(begin)
                    if path.startswith(begin) and file.is_file():
                        body = file.read_bytes()
                        tag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                        return 200, tag | {"Accept-Ranges": "bytes"}, body
                if path.startswith(f"/{repository}/resolve/"):
                    return 404, {"X-Error-Code": "EntryNotFound"}, b""
            if "/gated/" in path:
                return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

        def log_message(self, *_: object) -> None:
            """Nothing: tests look at `asked`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask this server instead of the real one, with a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def free_port() -> int:
    """A port of loopback that nobody listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def answers(address: str, seconds: float) -> None:
    """Wait until a server answers at this address; AssertionError if it does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(address, timeout=20):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nobody answers at {address}")
