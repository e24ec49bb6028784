"""A server with the API that the page uses, whose replies are scripted.

`python tests/serve/stub_server.py` shows the page with a reply that has everything; the tests script their own replies.
"""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pard_onnx.serve.page import load_page

DEMO = """\
**Breadth-first** search visits a graph level by level, **depth-first** search follows one path to its end.

| | Breadth-first | Depth-first |
| --- | --- | --- |
| Structure | queue | stack, or recursion |
| Memory | the widest level | the longest path |
| Finds a shortest path | yes, where edges cost the same | no |

The two differ in *one line*: where the next node is taken from.

```python
from collections import deque

def search(graph, start, breadth_first=True):
    waiting, seen = deque([start]), {start}
    while waiting:
        # A queue gives breadth-first order, a stack depth-first.
        node = waiting.popleft() if breadth_first else waiting.pop()
        yield node
        for neighbour in graph[node]:
            if neighbour not in seen:
                seen.add(neighbour)
                waiting.append(neighbour)
```

- Take breadth-first search for `shortest paths`.
- Take depth-first search for cycles and topological order.
"""
REASONING = "A comparison is asked for.\n\n1. Say what each does.\n2. A table.\n3. Code that shows the difference."


Event = dict[str, Any] | bytes | float | threading.Event


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request for a chat completion gets: events, or an error.

    `events` are chunks (dicts), raw lines of the stream (bytes), seconds to wait (floats) or events to wait for.
    """

    events: tuple[Event, ...] = ()
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    error: str = ""
    cut: bool = False  # the connection is closed in the middle of the stream


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def finish(reason: str = "stop", tokens: int = 1, **pard: Any) -> dict[str, Any]:
    chunk = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "usage": {"completion_tokens": tokens}}
    return chunk | ({"pard": pard} if pard else {})


def text(content: str, size: int = 4, pause: float = 0.0) -> Reply:
    """A reply of this text in deltas of `size` characters, without the extension's fields."""
    parts = [content[at : at + size] for at in range(0, len(content), size)]
    events: list[Event] = []
    for part in parts:
        events += [delta(content=part), *([pause] if pause else [])]
    return Reply((*events, finish(tokens=len(parts))))


def speculative(content: str, reasoning: str = "", pause: float = 0.0) -> Reply:
    """A reply in rounds of one to seven tokens, of which all but the last were proposed by the draft."""
    tokens = re.findall(r"\s*\S+|\s+", content)
    events: list[Event] = [delta(reasoning_content=reasoning)] if reasoning else []
    taken = 0
    for number, matched in enumerate(itertools.cycle((3, 6, 1, 4, 0, 5, 2, 6, 6))):
        pieces = tokens[taken : taken + matched + 1]
        if not pieces:
            break
        taken += len(pieces)
        times = {
            "draft_ms": 2.1 + matched * 0.05,
            "verify_ms": 9.0 + number % 5 * 0.4,
            "proposed": 6,
            "matched": matched,
        }
        speed = {
            "tokens_per_second": 212.0 + number % 7,
            "mean_accepted": taken / (number + 1),
            "drafted": 6 * number + 6,
        }
        flags = [True] * (len(pieces) - 1) + [False]
        pard = {"accepted": flags, "pieces": pieces, "round": times, **speed}
        events += [delta(content="".join(pieces)) | {"pard": pard}, *([pause] if pause else [])]
    return Reply((*events, finish(tokens=taken)))


@dataclass(slots=True)
class Stub:
    """What the server does next, and what it was asked."""

    replies: list[Reply] = field(default_factory=list)  # taken from the front; the demo's where none is left
    requests: list[dict[str, Any]] = field(default_factory=list)
    models: tuple[str, ...] = ("demo", "qwen2.5-1.5b-int4")
    key: str = ""  # an API key that is demanded
    disconnects: int = 0
    default: Callable[[], Reply] = field(default=lambda: speculative(DEMO, REASONING))
    url: str = ""

    def next_reply(self) -> Reply:
        return self.replies.pop(0) if self.replies else self.default()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            page = load_page()
            self._send(200, page.body, page.headers)
        elif self.path == "/health":
            self._send_json(200, {"status": "ok"})
        elif self.path == "/v1/models":
            if self._allowed():
                self._send_json(200, {"object": "list", "data": [{"id": name} for name in self.stub.models]})
        else:
            self._send_error(404, "There is nothing here.")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.stub.requests.append(body)
        reply = self.stub.next_reply()
        if reply.status != 200:
            self._send_error(reply.status, reply.error, dict(reply.headers))
            return
        try:
            self._stream(reply)
        except OSError:  # the browser went away
            self.stub.disconnects += 1
            self.close_connection = True

    def _stream(self, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for data in _lines(reply):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        if reply.cut:
            self.close_connection = True  # without the last chunk, which ends a complete answer
            return
        self.wfile.write(b"0\r\n\r\n")

    def _allowed(self) -> bool:
        if not self.stub.key or self.headers.get("Authorization") == f"Bearer {self.stub.key}":
            return True
        self._send_error(401, "Send an API key.")
        return False

    def _send_error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send_json(status, {"error": {"message": message, "type": "error", "code": None}}, headers)

    def _send_json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _lines(reply: Reply) -> Iterator[bytes]:
    for event in reply.events:
        if isinstance(event, float):
            time.sleep(event)
        elif isinstance(event, threading.Event):
            event.wait(20)
        elif isinstance(event, bytes):
            yield event
        else:
            yield b"data: %s\n\n" % json.dumps(event).encode()
    if not reply.cut:
        yield b"data: [DONE]\n\n"


def start(stub: Stub, port: int = 0) -> ThreadingHTTPServer:
    """Serves in a thread until `shutdown`; the address is in `stub.url`."""
    handler = type("BoundHandler", (Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


if __name__ == "__main__":
    shown = Stub(default=lambda: speculative(DEMO, REASONING, pause=0.06))
    start(shown, 8017)
    print(shown.url)
    threading.Event().wait()
