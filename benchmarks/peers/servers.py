"""Servers of OpenAI's API: those that can be started here, and a client that times a chat as a user sees it."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import pairwise
from pathlib import Path
from time import perf_counter, sleep
from typing import IO, Any
from urllib.parse import urlsplit

from pard_onnx.models.checks import nearest_name
from pard_onnx.models.errors import BadInput, Failure, shown
from pard_onnx.models.extras import install_command

from .process import FOLDER, kill

START = 600.0  # seconds that a server may take to load its model
SILENCE = 600.0  # seconds without an event after which a chat has failed: it may wait behind many others
GRACE = 20.0  # seconds that a server may take to end
POLL = 0.01
KEY_VARIABLE = "OPENAI_API_KEY"  # in the environment, for servers that demand a key
PORT = "{port}"  # in commands
EXTRA = "serve"  # of this package, which brings what its own server needs


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """What the servers of the table are started with."""

    target: str  # exported folders
    draft: str
    threads: int
    clients: int  # that the server has to answer at the same time
    context: int  # tokens of each client
    gguf: Path | None = None  # the same target, and an autoregressive draft, as GGUF files
    gguf_draft: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A server that can be started here."""

    name: str
    what: str  # for the help
    module: str  # that its Python must have
    install: str  # the command that installs it, or EXTRA
    arguments: Callable[[ServerFiles, int], list[str]]  # of the Python; with the port
    gguf: bool = False  # whether it reads GGUF files
    gguf_draft: bool = False  # whether it needs an autoregressive draft as well

    @property
    def install_command(self) -> str:
        return install_command("cpu", EXTRA) if self.install == EXTRA else self.install


def _pard(files: ServerFiles, port: int, *, draft: bool) -> list[str]:
    models = ["--target", files.target, *(["--draft", files.draft] if draft else [])]
    script = "from pard_onnx.entry_points import serve; serve()"  # as the installed command
    return ["-c", script, *models, "--port", str(port), "--threads", str(files.threads)]


def _llama_cpp_python(files: ServerFiles, port: int) -> list[str]:
    options = {
        "model": files.gguf,
        "port": port,
        "n_threads": files.threads,
        "n_threads_batch": files.threads,
        "n_ctx": files.context,
        "interrupt_requests": "false",  # by default a new request ends the one that runs
    }
    return ["-m", "llama_cpp.server", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _llama_server(files: ServerFiles, port: int, *, draft: bool) -> list[str]:
    request = {
        "target": str(files.gguf),
        "draft": str(files.gguf_draft) if draft else None,
        "port": port,
        "threads": files.threads,
        "clients": files.clients,
        "context": files.context,
    }
    return [str(FOLDER / "llama_server_worker.py"), json.dumps(request)]


KINDS: dict[str, ServerKind] = {
    kind.name: kind
    for kind in (
        ServerKind("pard", "pard-serve", "uvicorn", EXTRA, lambda files, port: _pard(files, port, draft=True)),
        ServerKind(
            "pard-plain",
            "pard-serve without the draft",
            "uvicorn",
            EXTRA,
            lambda files, port: _pard(files, port, draft=False),
        ),
        ServerKind(
            "llama.cpp",
            "llama.cpp's own server, by xllamacpp",
            "xllamacpp",
            "pip install xllamacpp",
            lambda files, port: _llama_server(files, port, draft=False),
            gguf=True,
        ),
        ServerKind(
            "llama.cpp-draft",
            "the same with an autoregressive draft",
            "xllamacpp",
            "pip install xllamacpp",
            lambda files, port: _llama_server(files, port, draft=True),
            gguf=True,
            gguf_draft=True,
        ),
        ServerKind(
            "llama-cpp-python",
            "llama_cpp.server",
            "sse_starlette",
            'pip install "llama-cpp-python[server]"',
            _llama_cpp_python,
            gguf=True,
        ),
    )
}


def kind_by_name(name: str) -> ServerKind:
    """The server of that name. Raises BadInput for an unknown one."""
    if name in KINDS:
        return KINDS[name]
    nearest = nearest_name(name, KINDS)
    hint = f"did you mean {nearest}? " if nearest else ""
    raise BadInput(f"there is no server {shown(name)}; {hint}known: {', '.join(KINDS)}")


def command_of(kind: ServerKind, files: ServerFiles, python: Path, port: int) -> list[str]:
    """The command that starts a server of the table. Raises BadInput if its files are missing."""
    if kind.gguf and files.gguf is None:
        raise BadInput(f"{kind.name} reads GGUF files; name the target's checkpoint, or its GGUF file: --peer-target")
    if kind.gguf_draft and files.gguf_draft is None:
        raise BadInput(f"{kind.name} needs an autoregressive draft; name its checkpoint or GGUF file: --peer-draft")
    return [str(python), *kind.arguments(files, port)]


def command_from_text(text: str, port: int) -> list[str]:
    """The words of a user's command, in which {port} stands for the port."""
    if PORT not in text:
        raise BadInput(f"the command {shown(text)} must have {PORT} where the server's port belongs")
    return [word.replace(PORT, str(port)) for word in shlex.split(text)]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers."""

    name: str
    url: str  # without /v1
    model: str  # as requests name it
    started: float = 0.0  # perf_counter() when its process was started


def connected(name: str, url: str) -> Server:
    """A server that runs already. Raises Failure if it does not answer as servers of OpenAI's API do."""
    bare = url.rstrip("/").removesuffix("/v1")
    try:
        found = _first_model(bare)
    except (OSError, HTTPException, ValueError) as error:
        raise Failure(f"{name}: {url} does not answer: {error}") from error
    return Server(name, bare, found)


@contextmanager
def started(name: str, command: Callable[[int], Sequence[str]]) -> Iterator[Server]:
    """A server in a process of its own, from its first answer on; it ends with the body.

    command: of a port. Raises BadInput if it cannot be run, Failure with its last words if it ends.
    """
    port = _free_port()
    words = list(command(port))
    with tempfile.TemporaryFile() as log:
        start = perf_counter()
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=os.name == "posix"
            )
        except OSError as error:
            raise BadInput(f"{name}: {words[0]} cannot be run: {error.strerror or error}") from error
        try:
            url = f"http://127.0.0.1:{port}"
            yield Server(name, url, _model_when_ready(name, url, process, log, start + START), start)
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _model_when_ready(name: str, url: str, process: subprocess.Popen[bytes], log: IO[bytes], end: float) -> str:
    while perf_counter() < end:
        if process.poll() is not None:
            raise Failure(f"{name}: ended with exit code {process.returncode}: {_last_line(log)}")
        with suppress(OSError, HTTPException, ValueError, Failure):
            return _first_model(url)
        sleep(POLL)
    raise Failure(f"{name}: did not answer within {START:g} s: {_last_line(log)}")


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    with suppress(OSError):
        process.stdin.close()
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    kill(process)


# ---- the client


@dataclass(frozen=True, slots=True)
class Reply:
    """A streamed chat as its client saw it."""

    text: str
    tokens: int
    first_seconds: float  # from the request to the first text
    total_seconds: float  # to the end of the stream
    gaps: tuple[float, ...]  # seconds between two events with text; a round of speculative decoding is one event


def stream_chat(server: Server, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Reply:
    """Ask for a chat and read it to its end. options: further fields of the request. Raises Failure."""
    body = {
        "model": server.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    connection = _connection(server.url)
    try:
        start = perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), _headers())
        answer = connection.getresponse()
        if answer.status != 200:
            raise Failure(f"{server.name}: status {answer.status}: {answer.read(500).decode(errors='replace')}")
        return _reply(server.name, iter(answer.readline, b""), start)
    except (OSError, HTTPException, ValueError) as error:
        raise Failure(f"{server.name}: the chat broke: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _reply(name: str, lines: Iterator[bytes], start: float) -> Reply:
    parts: list[str] = []
    times: list[float] = []
    tokens, done = 0, False
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        event = json.loads(data)
        if "error" in event:
            raise Failure(f"{name}: {event['error']}")
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if text := delta.get("content") or delta.get("reasoning_content"):
                times.append(perf_counter())
                parts.append(text)
    if not done or not times:
        raise Failure(f"{name}: {'the reply has no text' if done else 'the stream ended too early'}")
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    # Servers that send no usage send an event for each token
    return Reply("".join(parts), tokens or len(times), times[0] - start, perf_counter() - start, gaps)


def _first_model(url: str) -> str:
    connection = _connection(url)
    try:
        connection.request("GET", "/v1/models", headers=_headers())
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise Failure(f"{url}/v1/models: status {answer.status}: {content[:200].decode(errors='replace')}")
        model = json.loads(content)["data"][0]["id"]
        return str(model)
    except (KeyError, IndexError, TypeError) as error:
        raise Failure(f"{url}/v1/models: names no model") from error
    finally:
        connection.close()


def _connection(url: str) -> HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{shown(url)}: is no address of a server; write http://HOST:PORT")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.hostname, parts.port, timeout=SILENCE)


def _headers() -> dict[str, str]:
    return {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY_VARIABLE) or 'none'}"}


def has_module(module: str, python: Path) -> bool:
    """Whether this Python can import it."""
    probe = [str(python), "-c", "import sys, importlib.util as u; sys.exit(u.find_spec(sys.argv[1]) is None)", module]
    try:
        return subprocess.run(probe, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInput(f"{python}: is no Python that can be run: {error}") from error


def own_python() -> Path:
    return Path(sys.executable)
