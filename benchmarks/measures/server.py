"""The server beside the library, many chats at once, and how long a server takes to start.

    python benchmarks/measures/server.py --pair TARGET DRAFT [--overhead] [--chats] [--start]

--overhead: the same chats by `Pair.stream` and by HTTP, in turns, on one loaded pair. The client is a process of its
own. Decoding is greedy with a fixed draft length, so both run the same rounds, and their texts must be equal.
--chats: so many clients at a time as --clients says, each of which streams one chat after the other.
--start: from the start of a server's process to the first text of a chat.
Without any of them all three are measured. Servers of the last two are those of the table that --servers names, those
that a command of --run starts, and with --chats those that run already at an address (--url).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pard_onnx.benchmarks.display import new_table
from pard_onnx.benchmarks.peers.forms import Converter, gguf
from pard_onnx.benchmarks.peers.peer import PEERS
from pard_onnx.benchmarks.peers.servers import (
    KINDS,
    Reply,
    Server,
    ServerFiles,
    command_from_text,
    command_of,
    connected,
    has_module,
    kind_by_name,
    own_python,
    started,
    stream_chat,
)
from pard_onnx.benchmarks.trial import SHIPPED, Ratio, Work, read_prompts, speed_up
from pard_onnx.cli import Parser, exit_code, stages
from pard_onnx.models.cache_folder import made_cache_folder
from pard_onnx.models.checks import DRAFT_LENGTH, DRAFT_LIMIT, Progress, no_progress, require_whole
from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.runtime.pair import Pair, load
from pard_onnx.runtime.providers.threads import physical_cores

CLIENTS = "1,4,16"
GREEDY = {"temperature": 0.0}
START_TOKENS = 4
WARM_UP = 8  # tokens of the first chat, which is not counted
Ask = Callable[[Sequence[dict[str, str]]], Reply]


@dataclass(frozen=True, slots=True)
class Overhead:
    """The server's time for a token beside the library's, over the same chats."""

    chats: int
    tokens: int
    round_ms: float  # of the library
    library_ms: float  # a token after the first
    server_ms: float
    ratio: Ratio  # server_ms / library_ms
    whole: Ratio  # the same of whole requests: a first token that comes late makes the rest look short
    request_ms: float  # by which the first token comes later; median


@dataclass(frozen=True, slots=True)
class Load:
    """Chats of so many clients at a time with one server."""

    server: str
    clients: int
    chats: int
    tokens_per_second: float  # of all clients together
    first_p50: float  # seconds from a request to its first text
    first_p95: float
    gap_p50: float  # seconds between two events with text
    gap_p95: float
    failed: int = 0
    reason: str | None = None  # of the first chat that failed


@dataclass(frozen=True, slots=True)
class Start:
    """Cold processes of a server: seconds from the start of the process."""

    server: str
    ready: tuple[float, ...]  # to the first answer
    first: tuple[float, ...]  # to the first text of a chat


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---- overhead


def measure_overhead(
    pair: Pair, prompts: Sequence[str], draft_length: int, max_tokens: int, repeats: int, progress: Progress
) -> Overhead:
    """Library and server in turns. Raises Failure if their texts differ."""
    request = {**GREEDY, "max_tokens": max_tokens, "draft_length": draft_length}
    works: dict[str, list[Work]] = {"library": [], "server": []}
    wholes: dict[str, list[Work]] = {"library": [], "server": []}
    later: list[float] = []
    rounds: list[float] = []
    turns = [prompt for _ in range(repeats) for prompt in prompts]
    with served(pair) as server, ProcessPoolExecutor(1, get_context("spawn")) as client:

        def library(messages: Sequence[dict[str, str]]) -> Reply:
            found, seconds = stream_by_library(pair, messages, draft_length, max_tokens)
            rounds.extend(seconds)
            return found

        def by_http(messages: Sequence[dict[str, str]]) -> Reply:
            return client.submit(stream_chat, server, messages, request).result()

        asks: list[tuple[str, Ask]] = [("library", library), ("server", by_http)]
        for _, ask in asks:
            ask(message(prompts[0]))
        rounds.clear()
        for done, prompt in enumerate(turns, 1):
            replies = {}
            for name, ask in asks if done % 2 else reversed(asks):
                replies[name] = one = ask(message(prompt))
                works[name].append(Work(one.tokens - 1, one.total_seconds - one.first_seconds))
                wholes[name].append(Work(one.tokens, one.total_seconds))
            if replies["server"].text != replies["library"].text:
                raise Failure(f"prompt {prompt[:40]!r}: server and library wrote different texts; please report this")
            later.append(replies["server"].first_seconds - replies["library"].first_seconds)
            progress("overhead", done, len(turns))
    library_ms, server_ms = (1000 * milliseconds(works[name]) for name in ("library", "server"))
    ratio, whole = (speed_up(found["library"], found["server"]) for found in (works, wholes))
    tokens = sum(one.tokens for one in works["library"])
    mean_round = 1000 * sum(rounds) / max(1, len(rounds))
    return Overhead(len(turns), tokens, mean_round, library_ms, server_ms, ratio, whole, 1000 * median(later))


def milliseconds(works: Sequence[Work]) -> float:
    """Seconds a token, over all works."""
    tokens = sum(work.tokens for work in works)
    if not tokens:
        raise BadInput("every text ended with its first token; raise --max-tokens or name other prompts")
    return sum(work.seconds for work in works) / tokens


def stream_by_library(
    pair: Pair, messages: Sequence[dict[str, str]], draft_length: int, max_tokens: int
) -> tuple[Reply, list[float]]:
    """What a caller of the library sees, and the seconds of the rounds."""
    own: dict[str, Any] = {"sampling": "model"} if pair.own_sampling is not None else {}
    options = {**own, **GREEDY, "max_new_tokens": max_tokens, "draft_length": draft_length}
    start = perf_counter()
    times: list[float] = []
    rounds: list[float] = []
    with pair.stream(list(messages), **options) as stream:
        for chunk in stream:
            times.append(perf_counter())
            if chunk.round:
                rounds.append(chunk.round.draft_seconds + chunk.round.verify_seconds)
        result = stream.result
    total = perf_counter() - start
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Reply(result.text, result.stats.new_tokens, times[0] - start, total, gaps), rounds


@contextmanager
def served(pair: Pair) -> Iterator[Server]:
    """The pair behind pard-serve's application, in a thread of this process."""
    from pard_onnx.serve.app import create_app
    from pard_onnx.serve.registry import Registry
    from pard_onnx.serve.server import make_server, open_socket, url_of
    from pard_onnx.serve.settings import LOOPBACK, Settings
    from pard_onnx.serve.sources import named_source

    settings = Settings()
    source = named_source(pair.target_name, pair.draft_name, "pair")
    running: Future[Any] = Future()

    def run() -> None:
        async def serve() -> None:
            registry = Registry((source,), settings)
            registry.add(source, pair)
            server = make_server(create_app(registry, settings), settings)
            running.set_result(server)
            await server.serve(sockets=[opened])

        try:
            asyncio.run(serve())
        except BaseException as error:
            if not running.done():
                running.set_exception(error)

    with open_socket(LOOPBACK, 0) as opened:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            running.result()  # raises what kept the server from starting
            yield Server("pard", url_of(opened), "pair")
        finally:
            if not running.exception():
                running.result().should_exit = True
            thread.join()


# ---- chats


def measure_loads(
    server: Server, prompts: Sequence[str], clients: Sequence[int], chats: int, max_tokens: int, progress: Progress
) -> list[Load]:
    """One level of clients after the other, after a warm-up."""
    stream_chat(server, message(prompts[0]), {**GREEDY, "max_tokens": WARM_UP})
    numbers = count()
    return [
        measure_load(server, prompts, number, max(chats, number), max_tokens, numbers, progress) for number in clients
    ]


def measure_load(
    server: Server,
    prompts: Sequence[str],
    clients: int,
    chats: int,
    max_tokens: int,
    numbers: Iterator[int],
    progress: Progress,
) -> Load:
    """So many chats by so many clients, each of which asks for the next one when it has read one to its end.

    numbers: of chats. Each begins with its own, so that no server finds it in its cache of prefixes.
    """
    asked = [message(f"# {number}\n{prompts[number % len(prompts)]}") for number in islice(numbers, chats)]
    replies: list[Reply] = []
    reasons: list[str] = []

    def ask(messages: list[dict[str, str]]) -> None:
        try:
            replies.append(stream_chat(server, messages, {**GREEDY, "max_tokens": max_tokens}))
        except Failure as error:
            reasons.append(str(error))
        progress(f"{server.name}, {clients}", len(replies) + len(reasons), chats)

    start = perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, asked))
    seconds = perf_counter() - start
    if not replies:
        return Load(server.name, clients, 0, 0.0, 0.0, 0.0, 0.0, 0.0, len(reasons), reasons[0])
    gaps = [gap for reply in replies for gap in reply.gaps] or [0.0]
    first = np.percentile([reply.first_seconds for reply in replies], (50, 95))
    between = np.percentile(gaps, (50, 95))
    return Load(
        server.name,
        clients,
        len(replies),
        tokens_per_second=sum(reply.tokens for reply in replies) / seconds,
        first_p50=float(first[0]),
        first_p95=float(first[1]),
        gap_p50=float(between[0]),
        gap_p95=float(between[1]),
        failed=len(reasons),
        reason=next(iter(reasons), None),
    )


# ---- start


def measure_start(name: str, start: Starter, prompt: str, repeats: int, progress: Progress) -> Start:
    """Start the server so many times. The first start, which brings its files into memory, is not counted."""
    ready: list[float] = []
    first: list[float] = []
    for done in range(repeats + 1):
        with start() as server:
            answered = perf_counter()
            reply = stream_chat(server, message(prompt), {**GREEDY, "max_tokens": START_TOKENS})
            if done:
                ready.append(answered - server.started)
                first.append(answered - server.started + reply.first_seconds)
        progress(f"start of {name}", done, repeats)
    return Start(name, tuple(ready), tuple(first))


Starter = Callable[[], AbstractContextManager[Server]]


# ---- the command


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="server.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--pair", nargs=2, required=True, metavar=("TARGET", "DRAFT"), help="exported folders")
    for name in ("overhead", "chats", "start"):
        out.add_argument(f"--{name}", action="store_true", help="measure this")
    table = "; ".join(f"{kind.name}: {kind.what}" for kind in KINDS.values())
    out.add_argument("--servers", default="pard,pard-plain", metavar="NAME,NAME", help=f"of the table ({table})")
    run = "a server that this command starts, with {port} where its port belongs; repeatable"
    out.add_argument("--run", action="append", default=[], metavar="NAME=COMMAND", help=run)
    url = "a server that runs already; repeatable. OPENAI_API_KEY is its key"
    out.add_argument("--url", action="append", default=[], metavar="NAME=URL", help=url)
    peer = "what the target was exported from, or a GGUF file of it, for servers that read GGUF"
    out.add_argument("--peer-target", type=Path, metavar="CHECKPOINT", help=peer)
    out.add_argument("--peer-draft", type=Path, metavar="CHECKPOINT", help="an autoregressive draft, in the same way")
    out.add_argument("--peer-format", default="q4_0", metavar="FORMAT", help="of GGUF files (default: q4_0)")
    out.add_argument("--peer-models", type=Path, metavar="DIR", help="GGUF files (default: in the user's cache)")
    python = "the environment of a server of the table; repeatable"
    out.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help=python)
    out.add_argument("--prompts", type=Path, default=SHIPPED, metavar="F.jsonl", help="messages (default: 24 shipped)")
    out.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    out.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of a reply (default: 128)")
    out.add_argument("--clients", default=CLIENTS, metavar="N,N", help=f"at a time (default: {CLIENTS})")
    out.add_argument(
        "--chats-each", type=int, default=16, metavar="N", help="chats at each number of clients, at least"
    )
    out.add_argument("--context", type=int, default=2048, metavar="N", help="tokens of a client, for llama.cpp")
    draft = f"for --overhead; 0 for plain decoding (default: {DRAFT_LENGTH})"
    out.add_argument("--draft-length", type=int, default=DRAFT_LENGTH, metavar="K", help=draft)
    out.add_argument("--repeats", type=int, default=3, metavar="N", help="of --overhead and --start (default: 3)")
    out.add_argument("--threads", type=int, metavar="N", help="of the models (default: the physical cores)")
    out.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: report(options))


def report(options: argparse.Namespace) -> None:
    for name, least in (("max_tokens", 2), ("chats_each", 1), ("repeats", 1), ("context", 1)):
        require_whole(f"--{name.replace('_', '-')}", getattr(options, name), least)
    require_whole("--draft-length", options.draft_length, 0, DRAFT_LIMIT)
    clients = numbers_of_clients(options.clients)
    prompts = read_prompts(options.prompts, options.limit).prompts
    folder, draft = options.pair
    every = not (options.overhead or options.chats or options.start)
    console = Console(highlight=False, quiet=options.json)
    running = [named(text, "--url") for text in options.url]
    starters = starters_of(options, max(clients)) if every or options.chats or options.start else {}
    overhead: Overhead | None = None
    loads: list[Load] = []
    starts: list[Start] = []
    if every or options.overhead:
        with load(folder, draft, cache_bytes=0, threads=options.threads) as pair, stages() as tick:
            overhead = measure_overhead(pair, prompts, options.draft_length, options.max_tokens, options.repeats, tick)
        console.print(overhead_table(overhead))
    if every or options.chats:
        opened: dict[str, Starter] = dict(starters)
        opened |= {name: partial(already_running, name, url) for name, url in running}
        for start in opened.values():
            with start() as server, stages() as tick:
                loads += measure_loads(server, prompts, clients, options.chats_each, options.max_tokens, tick)
        console.print(loads_table(loads))
    if every or options.start:
        with stages() as tick:
            starts = [measure_start(name, one, prompts[0], options.repeats, tick) for name, one in starters.items()]
        console.print(starts_table(starts))
    if options.json:
        found = {"pair": options.pair, "max_tokens": options.max_tokens, "overhead": overhead and asdict(overhead)}
        print(json.dumps({**found, "chats": [asdict(one) for one in loads], "start": [asdict(one) for one in starts]}))


def already_running(name: str, url: str) -> AbstractContextManager[Server]:
    return nullcontext(connected(name, url))


def numbers_of_clients(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in words):
        raise BadInput(f"--clients {text!r}: numbers from 1 to 1000 are written as {CLIENTS}")
    return [int(word) for word in words]


def named(text: str, option: str) -> tuple[str, str]:
    """Split NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise BadInput(f"{option} takes NAME=VALUE, not {text!r}")
    return name, value


def starters_of(options: argparse.Namespace, clients: int) -> dict[str, Starter]:
    """What starts each server, by name. Raises BadInput before anything is started if one cannot be."""
    kinds = [kind_by_name(name.strip()) for name in options.servers.split(",") if name.strip()]
    pythons = {
        kind_by_name(name).name: Path(path) for name, path in (named(t, "--peer-python") for t in options.peer_python)
    }
    target, draft = options.peer_target, options.peer_draft
    folder, draft_folder = options.pair
    files = ServerFiles(
        target=folder,
        draft=draft_folder,
        threads=options.threads or physical_cores(),
        clients=clients,
        context=options.context,
        gguf=gguf_file(target, options) if target and any(kind.gguf for kind in kinds) else None,
        gguf_draft=gguf_file(draft, options) if draft and any(kind.gguf_draft for kind in kinds) else None,
    )
    out: dict[str, Starter] = {}
    for kind in kinds:
        python = pythons.get(kind.name, own_python())
        command_of(kind, files, python, 0)  # for its errors
        if not has_module(kind.module, python):
            raise BadInput(f"{kind.name}: {kind.module} is not installed for {python}; run: {kind.install_command}")
        out[kind.name] = partial(started, kind.name, partial(command_of, kind, files, python))
    for name, command in (named(text, "--run") for text in options.run):
        command_from_text(command, 0)
        out[name] = partial(started, name, partial(command_from_text, command))
    return out


def gguf_file(source: Path, options: argparse.Namespace) -> Path:
    """The GGUF file of a checkpoint, which is made once."""
    if source.is_file():
        return source
    if not (source / "config.json").is_file():
        raise BadInput(f"{source}: is neither a GGUF file nor a checkpoint folder")
    worker = Path(PEERS["llama.cpp"].worker)
    folder = options.peer_models or made_cache_folder() / "peers"
    return gguf(source, options.peer_format, Converter(folder, worker, own_python(), no_progress))


def overhead_table(found: Overhead) -> Table:
    title = (
        f"overhead: {found.chats} chats, {found.tokens} tokens after the first ones, rounds of {found.round_ms:.2f} ms"
    )
    caption = (
        "ms a token after the first; decode: server / library, 95 % interval; whole: of whole requests; "
        "later: the first token, median"
    )
    out = new_table(title, ("library\nms", "server\nms", "decode", "whole", "later\nms"), caption)
    ratios = (f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (found.ratio, found.whole))
    out.add_row(f"{found.library_ms:.3f}", f"{found.server_ms:.3f}", *ratios, f"{found.request_ms:.2f}")
    return out


def loads_table(rows: Sequence[Load]) -> Table:
    caption = "first: from a request to its first text; gap: between two events with text (a round is one event)"
    columns = ("server", "clients", "chats", "tok/s", "first\np50 ms", "first\np95 ms", "gap\np50 ms", "gap\np95 ms")
    out = new_table("chats at a time", columns, caption)
    for row in rows:
        times = (row.first_p50, row.first_p95, row.gap_p50, row.gap_p95)
        cells = (f"{row.tokens_per_second:.1f}", *(f"{1000 * seconds:.0f}" for seconds in times))
        chats = f"{row.chats} of {row.chats + row.failed}" if row.failed else str(row.chats)
        out.add_row(row.server, str(row.clients), chats, *cells)
    reasons = {row.server: row.reason for row in rows if row.reason}
    out.caption = "\n".join([caption, *(f"{name}: {reason[:200]}" for name, reason in reasons.items())])
    return out


def starts_table(rows: Sequence[Start]) -> Table:
    caption = "seconds from the start of the process, median, least and most; files are in memory"
    out = new_table("start", ("server", "first answer", "first text"), caption)
    for row in rows:
        cells = (f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})" for found in (row.ready, row.first))
        out.add_row(row.server, *cells)
    return out


if __name__ == "__main__":
    sys.exit(main())
