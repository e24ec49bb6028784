"""A stand-in for the Hugging Face hub on this machine, and the fixture `online`, which conftest.py hands on."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from huggingface_hub import constants
from tiny import SHA


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as snapshot_download uses."""

    files: ClassVar[dict[str, bytes]] = {}  # of each repository that `repositories` does not have
    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []  # the paths of files whose content was sent
    commit = SHA  # which files that were fetched before are not fetched again from
    status: ClassVar[dict[str, tuple[int, str]]] = {
        "org/gated": (403, "GatedRepo"),
        "org/absent": (404, "RepoNotFound"),
        "org/down": (500, ""),
    }

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if name in self.status:
            code, error = self.status[name]
            return self.reply(code, b"{}", body, {"X-Error-Code": error})
        files = self.repositories.get(name, self.files)
        revision = re.search(r"/(?:revision|tree|resolve)/([^/]+)", path)
        if revision and revision[1] not in ("main", self.commit):
            return self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            return self.reply(200, json.dumps(entries).encode(), body)
        if "/resolve/" in path:
            file = path.rpartition("/")[2]
            if file not in files:
                return self.reply(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            if body:
                self.asked.append(f"{name}/{file}")
            etag = hashlib.sha1(files[file]).hexdigest()
            return self.reply(200, files[file], body, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit})
        siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
        info = {"id": name, "sha": self.commit, "siblings": siblings}
        return self.reply(200, json.dumps(info).encode(), body)

    def reply(self, code: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {
            "Content-Length": len(content),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            with suppress(ConnectionError):  # a client that was killed
                self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """The hub's address while it answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, empty in (("files", {}), ("repositories", {}), ("asked", [])):
        monkeypatch.setattr(Hub, name, empty)
    with serving() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield
