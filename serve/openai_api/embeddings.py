"""POST /v1/embeddings: texts as vectors."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pard_onnx.models.errors import BadInput, PardError
from pard_onnx.runtime.asynchronous import in_worker
from pard_onnx.runtime.embedding import Vector
from pard_onnx.serve.errors import bad_field, unsupported
from pard_onnx.serve.fields import EMBEDDINGS, read_fields
from pard_onnx.serve.registry import OpenModel
from pard_onnx.serve.service import Service
from pard_onnx.serve.sse import unless_disconnected

MOST_INPUTS = 2048  # texts of one request, as OpenAI has it


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors of a request."""

    vectors: Sequence[Vector]
    tokens: int


async def embeddings(request: Request) -> Response:
    """The vectors of the texts in `input`."""
    service = Service.of(request)
    own = read_fields(await service.body(request), EMBEDDINGS, strict=service.settings.strict).own
    given = as_texts("input", own.get("input"))
    async with service.model(own.get("model")) as model:
        try:
            found = await unless_disconnected(request, embedded(model, "input", given, own))
        except PardError as error:
            raise service.error(error, EMBEDDINGS) from error
        written = as_base64 if own.get("encoding_format") == "base64" else as_numbers
        data = [
            {"object": "embedding", "index": index, "embedding": written(vector)}
            for index, vector in enumerate(found.vectors)
        ]
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


def as_texts(name: str, value: Any) -> list[Any]:
    """The texts of a field, each a text or a list of token ids. Raises ApiError (400)."""
    wanted = f"{name}: give a text, a list of token ids, or a list of such texts"
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        return [value]
    if not isinstance(value, list) or not value:
        raise bad_field(name, wanted)
    if len(value) > MOST_INPUTS:
        raise bad_field(name, f"{name}: has {len(value)} texts; send at most {MOST_INPUTS} at a time")
    for number, one in enumerate(value):
        if not isinstance(one, str | list):
            raise bad_field(name, f"{wanted}; {name}[{number}] is none of these")
    return value


async def embedded(model: OpenModel, name: str, given: list[Any], own: Any, *, cut: bool = False) -> Embedded:
    """The vectors of these texts, one after the other. Raises ApiError, and what `Pair.embed` raises.

    name: of their field; own: all fields. cut: whether of a text that is too long the beginning is taken.
    """
    pair, pooling = model.pair, own.get("pooling", "mean")
    try:
        pair.engine.require_last_layer()
    except BadInput as error:
        raise unsupported(str(error)) from error
    size = pair.target_manifest.spec.hidden
    if own.get("dimensions", size) != size:
        raise bad_field("dimensions", f"dimensions: the vectors of this model have {size} numbers; leave it out")
    texts: list[list[int]] = []
    for number, one in enumerate(given):
        try:
            ids = await in_worker(partial(pair.text_ids, one, bounded=not cut))
        except BadInput as error:
            place = name if len(given) == 1 else f"{name}[{number}]"
            raise type(error)(f"{place}: {error}") from error
        texts.append(ids[: pair.capacity])
    engine = pair.engine
    sequence = engine.new_sequence()
    vectors = [await in_worker(partial(engine.embed, sequence, ids, pooling)) for ids in texts]
    return Embedded(vectors, sum(map(len, texts)))


def as_numbers(vector: Vector) -> list[float]:
    return [float(value) for value in vector]


def as_base64(vector: Vector) -> str:
    return b64encode(vector.astype("<f4").tobytes()).decode()
