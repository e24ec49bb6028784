"""POST /api/embed and /api/embeddings: texts as vectors."""

from __future__ import annotations

from time import perf_counter_ns

from starlette.requests import Request
from starlette.responses import Response

from pard_onnx.serve.fields import EMBEDDINGS, Field, Form, an_object, anything, flag, read_fields, text
from pard_onnx.serve.openai_api.embeddings import as_numbers, as_texts, embedded
from pard_onnx.serve.service import Service
from pard_onnx.serve.sse import unless_disconnected

from .generation import json_response, kept_model
from .requests import keep_alive, name_of_model, required_model

COMMON = {
    "model": Field(name_of_model),
    "keep_alive": Field(keep_alive),
    "options": Field(an_object),
    "pooling": EMBEDDINGS.fields["pooling"],
}
EMBED = Form(
    {**COMMON, "input": Field(anything), "truncate": Field(flag), "dimensions": EMBEDDINGS.fields["dimensions"]},
    frozenset(),
    {},
)
EMBEDDING = Form({**COMMON, "prompt": Field(text)}, frozenset(), {})


async def embed(request: Request) -> Response:
    """POST /api/embed: one text or several."""
    start, service = perf_counter_ns(), Service.of(request)
    own = read_fields(await service.body(request), EMBED, strict=service.settings.strict).own
    given = as_texts("input", own.get("input"))
    async with kept_model(service, required_model(own), own.get("keep_alive")) as model:
        loaded = perf_counter_ns()
        found = await unless_disconnected(request, embedded(model, "input", given, own, cut=own.get("truncate", True)))
        seconds = {"total_duration": perf_counter_ns() - start, "load_duration": loaded - start}
        vectors = [as_numbers(vector) for vector in found.vectors]
        return json_response(
            {"model": own["model"], "embeddings": vectors, **seconds, "prompt_eval_count": found.tokens}
        )


async def embedding(request: Request) -> Response:
    """POST /api/embeddings, the older form: one text."""
    service = Service.of(request)
    own = read_fields(await service.body(request), EMBEDDING, strict=service.settings.strict).own
    async with kept_model(service, required_model(own), own.get("keep_alive")) as model:
        found = await unless_disconnected(request, embedded(model, "prompt", [own.get("prompt", "")], own, cut=True))
        return json_response({"embedding": as_numbers(found.vectors[0])})
