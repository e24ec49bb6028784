"""Endpoints that generate nothing: the page, models, tokens, health and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pard_onnx.models.errors import shown
from pard_onnx.runtime.asynchronous import in_worker

from .error_forms import speaks_anthropic
from .errors import bad_field
from .fields import DETOKENIZE, TOKENIZE, read_fields
from .metrics import CONTENT_TYPE
from .openai_api.chat import with_known_roles
from .page import load_page
from .service import Service
from .sources import Source

PAGE = load_page()
# What those who cannot read a page are told, in the words that Ollama's clients look for
RUNNING = "Ollama is running"
READERS = ("text/html", "text/*", "*/*")
PAGE_SIZE, MOST_ON_PAGE = 20, 1000  # of models, as Anthropic has it


async def show_page(request: Request) -> Response:
    """The chat page; a line of text for clients that accept no page."""
    accepted = request.headers.get("accept", "*/*")
    if not any(kind in accepted for kind in READERS):
        return Response(RUNNING, media_type="text/plain", headers={"Vary": "Accept"})
    if request.headers.get("if-none-match") == PAGE.headers["ETag"]:
        return Response(status_code=304, headers=PAGE.headers)
    return Response(PAGE.body, headers=PAGE.headers)


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    service = Service.of(request)
    return Response(service.metrics.text(service.registry.open), headers={"Content-Type": CONTENT_TYPE})


async def list_models(request: Request) -> Response:
    service = Service.of(request)
    sources = await service.registry.sources()
    if speaks_anthropic(request.scope):
        return JSONResponse(model_page(service, sources, request.query_params))
    return JSONResponse({"object": "list", "data": [described(service, source) for source in sources]})


async def show_model(request: Request) -> Response:
    service = Service.of(request)
    source = await service.registry.find(request.path_params["model"])
    describe = described_to_anthropic if speaks_anthropic(request.scope) else described
    return JSONResponse(describe(service, source))


def model_page(service: Service, sources: Sequence[Source], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the models in Anthropic's form. query: limit, and after_id or before_id, which are models' names."""
    limit, size = query.get("limit"), PAGE_SIZE
    if limit is not None:
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= MOST_ON_PAGE):
            raise bad_field("limit", f"limit must be a whole number from 1 to {MOST_ON_PAGE}, not {shown(limit)}")
        size = int(limit)
    names = [source.name for source in sources]
    start, end = 0, len(names)
    for name in ("after_id", "before_id"):
        id_ = query.get(name)
        if id_ and id_ not in names:
            raise bad_field(name, f"{name}: there is no model {shown(id_)}; give the first_id or last_id of a page")
        if id_ and name == "after_id":
            start = names.index(id_) + 1
        elif id_:
            end = names.index(id_)
    before = bool(query.get("before_id"))
    page = sources[max(start, end - size) : end] if before else sources[start : min(end, start + size)]
    return {
        "data": [described_to_anthropic(service, source) for source in page],
        "has_more": len(page) < end - start,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


def described_to_anthropic(service: Service, source: Source) -> dict[str, Any]:
    """A model in Anthropic's form."""
    found = described(service, source)
    capacity = found.get("max_model_len")
    return {
        "type": "model",
        "id": source.name,
        "display_name": source.name,
        "created_at": datetime.fromtimestamp(found["created"], UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": capacity,
        "max_tokens": capacity,
        "pard": found["pard"],
    }


def described(service: Service, source: Source) -> dict[str, Any]:
    """A model in OpenAI's form; of a loaded one, the context length under the name that vLLM has for it."""
    loaded = next((one for one in service.registry.open if one.name == source.name), None)
    out: dict[str, Any] = {
        "id": source.name,
        "object": "model",
        "created": loaded.created if loaded else service.started,
        "owned_by": "pard-onnx",
        "pard": {"loaded": loaded is not None, "draft": bool(source.drafts)},
    }
    if loaded:
        out["max_model_len"] = loaded.pair.capacity
    return out


async def tokenize(request: Request) -> Response:
    """The tokens of a text (`prompt`, as vLLM has it, or `content`, as llama.cpp has it) or of messages."""
    service = Service.of(request)
    own = read_fields(await service.body(request), TOKENIZE, strict=service.settings.strict).own
    given = [name for name in ("prompt", "content", "messages") if name in own]
    if len(given) != 1:
        raise bad_field("prompt", "give a text in prompt or content, or messages, and one of them alone")
    async with service.model(own.get("model")) as model:
        pair, value = model.pair, own[given[0]]
        if given == ["messages"]:
            messages, arguments = with_known_roles(model, value), own.get("chat_template_kwargs")
            ids = await in_worker(lambda: pair.encode(messages, template_arguments=arguments))
        else:  # llama.cpp adds no special tokens unless asked, vLLM does
            add = own.get("add_special_tokens", own.get("add_special", given == ["prompt"]))
            ids = await in_worker(lambda: pair.tokenize(value, add_special_tokens=add))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": pair.capacity})


async def detokenize(request: Request) -> Response:
    """The text of tokens, under the names of vLLM and of llama.cpp."""
    service = Service.of(request)
    own = read_fields(await service.body(request), DETOKENIZE, strict=service.settings.strict).own
    if "tokens" not in own:
        raise bad_field("tokens", "tokens: give a list of token ids")
    async with service.model(own.get("model")) as model:
        text = await in_worker(lambda: model.pair.detokenize(own["tokens"], skip_special_tokens=False))
    return JSONResponse({"prompt": text, "content": text})
