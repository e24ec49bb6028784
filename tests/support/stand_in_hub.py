"""A hub on this machine, with one repository at one commit."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tiny import SHA


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as snapshot_download uses."""

    files: dict[str, bytes] = {}  # noqa: RUF012  replaced by the fixture
    commit = SHA  # which files that were fetched before are not fetched again from
    status = {"org/gated": (403, "GatedRepo"), "org/absent": (404, "RepoNotFound"), "org/down": (500, "")}  # noqa: RUF012

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        found = re.search(r"org/\w+", path)
        name = found[0] if found else ""
        if name in self.status:
            code, error = self.status[name]
            return self.reply(code, b"{}", body, {"X-Error-Code": error})
        revision = re.search(r"/(?:revision|tree|resolve)/([^/]+)", path)
        if revision and revision[1] not in ("main", self.commit):
            return self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self.reply(200, json.dumps(entries).encode(), body)
        if "/resolve/" in path:
            name = path.rpartition("/")[2]
            if name not in self.files:
                return self.reply(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha1(self.files[name]).hexdigest()
            return self.reply(200, self.files[name], body, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit})
        info = {"id": name, "sha": self.commit, "siblings": [{"rfilename": file} for file in self.files]}
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
