"""`pard-serve`: an OpenAI-compatible server of exported pairs, with a chat page."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pard_onnx.cli import Parser, exit_code
from pard_onnx.generation_options import (
    add_models,
    add_providers,
    add_revisions,
    load_arguments,
    models_of,
    revision_arguments,
)
from pard_onnx.models.errors import BadInput
from pard_onnx.models.extras import needs
from pard_onnx.models.library import Library

if TYPE_CHECKING:
    from pard_onnx.serve.registry import Registry
    from pard_onnx.serve.settings import Settings
    from pard_onnx.serve.sources import Source

KEY_VARIABLE = "PARD_API_KEY"
DEMO = "demo"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
OF_LIBRARY = ""  # the value of --models without a folder


def parser() -> argparse.ArgumentParser:
    out = Parser(
        prog="pard-serve",
        description="Serve exported pairs to every client of OpenAI's API, with a chat page at /. Without a model it "
        "serves the pair that ships with this package.",
    )
    add_models(out, "plain decoding")
    folder = "serve all targets of a folder, each with its draft, by name; without DIR, those of the library"
    out.add_argument("--models", nargs="?", const=OF_LIBRARY, metavar="DIR", help=folder)
    out.add_argument("--name", help="by which requests name the model (default: its folder's)")
    address = out.add_argument_group("who may use it")
    host = "address to listen on; any other than this machine's own needs a key (default: 127.0.0.1)"
    address.add_argument("--host", default="127.0.0.1", help=host)
    address.add_argument("--port", type=int, default=8000, help="0 is any free one (default: 8000)")
    key = f"that requests must send; {KEY_VARIABLE} in the environment does not show it to other users"
    address.add_argument("--api-key", metavar="KEY", help=key)
    cors = "let pages of this origin use the server; * for all; repeatable"
    address.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=cors)
    limits = out.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, metavar="N", help="generations that may wait (default: 64)")
    limits.add_argument("--max-live", type=int, metavar="N", help="generations that run in turns (default: 4)")
    limits.add_argument("--timeout", type=float, metavar="S", help="end a generation after so many seconds")
    limits.add_argument("--grace", type=float, metavar="S", help="for running ones at the end (default: 5)")
    limits.add_argument("--max-request-bytes", type=size, metavar="SIZE", help="of a request (default: 16MiB)")
    memory = "that loaded models may take, such as 12GiB; least recently used ones leave (default: 4/5 of all memory)"
    limits.add_argument("--memory", type=size, metavar="SIZE", help=memory)
    limits.add_argument("--cache-bytes", type=size, metavar="SIZE", help="of KV rows that are kept (default: 512MiB)")
    out.add_argument("--strict", action="store_true", help="refuse unknown fields of requests")
    out.add_argument("--log-prompts", action="store_true", help="write prompts and texts to stderr")
    out.add_argument("--json", action="store_true", help="the line at the start is a JSON object")
    add_revisions(out)
    add_providers(out)
    return out


def size(text: str) -> int:
    """A number of bytes, with a unit or without: 1000000, 512MiB, 12G."""
    found = SIZE.fullmatch(text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 1000000, 512MiB or 12GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return exit_code(lambda: serve(options))


def serve(options: argparse.Namespace) -> None:
    with needs("serve"):
        import asyncio

        from pard_onnx.serve.app import create_app
        from pard_onnx.serve.registry import Registry
        from pard_onnx.serve.server import make_server, open_socket, url_of
        from pard_onnx.serve.sources import open_source
    settings = settings_of(options)
    library, source = chosen(options)
    with open_socket(settings.host, options.port) as opened:
        if source is None and library is None:
            source = demo_source()
        write_log(settings)
        pair = open_source(source, settings) if source else None

        async def run() -> None:
            registry = Registry((source,) if source else (), settings, library)
            if source and pair:
                registry.add(source, pair)
            server = make_server(create_app(registry, settings), settings)
            await announce(registry, url_of(opened), as_json=options.json)
            await server.serve(sockets=[opened])

        asyncio.run(run())


def settings_of(options: argparse.Namespace) -> Settings:
    """BadInput names the option."""
    from pard_onnx.serve.settings import Settings

    names = ("max_queue", "max_live", "timeout", "max_request_bytes", "memory", "cache_bytes")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.grace is not None:
        given["grace_seconds"] = options.grace
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    return Settings(
        host=options.host,
        api_key=key,
        cors=tuple(options.cors),
        strict=options.strict,
        log_prompts=options.log_prompts,
        load=load_arguments(options),
        **given,
    )


def chosen(options: argparse.Namespace) -> tuple[Library | None, Source | None]:
    """The folder of models, or the model, that the options name; neither for the pair that ships."""
    from pard_onnx.serve.sources import named_source, sources_of

    named = options.model is not None or options.target is not None
    if options.models is None:
        if named:
            target, draft = models_of(options)
            return None, named_source(target, draft, options.name, **revision_arguments(options))
        if options.draft is not None:
            raise BadInput(f"--draft {options.draft}: a draft of which target? name it with --target")
        return None, None
    if named or options.draft is not None or options.name is not None:
        raise BadInput("--models serves a whole folder; leave out MODEL, --target, --draft and --name, or --models")
    library = Library.of_user() if options.models == OF_LIBRARY else Library(Path(options.models))
    if not library.folder.is_dir() or not sources_of(library):
        raise BadInput(f"--models {library.folder}: there is no exported target in it; pard-models pull brings one")
    return library, None


def demo_source() -> Source:
    """The pair that ships."""
    from pard_onnx.models import demo
    from pard_onnx.serve.sources import named_source

    return replace(named_source(str(demo.EXPORTED_TARGET), str(demo.EXPORTED_DRAFT), DEMO), must_fit=True)


def write_log(settings: Settings) -> None:
    """Log lines of the server on stderr: what was not foreseen, and prompts where they are asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("pard_onnx.serve")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if settings.log_prompts else logging.WARNING)


async def announce(registry: Registry, url: str, *, as_json: bool) -> None:
    """The line that says where the server is. Programs that start it wait for this line."""
    names = [source.name for source in await registry.sources()]
    if as_json:
        print(json.dumps({"url": url, "models": names, "pid": os.getpid()}), flush=True)
    else:
        print(f"{url} serves {', '.join(names)}; the API is at {url}/v1, the page at {url}/", flush=True)


if __name__ == "__main__":
    sys.exit(main())
