"""An HTTP endpoint that streams: python fastapi_sse.py TARGET [DRAFT]; needs pip install fastapi uvicorn

    curl -N localhost:8000/generate --json '{"prompt": "def fibonacci(n):", "max_new_tokens": 64}'

Each event has a piece of the text, the last one says how it ended. A client that goes away ends its generation before
the next step. Requests take turns; more than a few wait (see `max_live` and `queue` of `load`).
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from pard_onnx import BadInput, Failure, Pair, Stream, load


class Question(BaseModel):
    """The body of a request; more options of `Pair.stream` are a line each."""

    prompt: str | list[dict[str, Any]]  # text to continue, or messages of a chat
    max_new_tokens: int = 256
    temperature: float = 0.0


def event(**data: Any) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def events(stream: Stream) -> AsyncIterator[str]:
    """Server-sent events. Whoever leaves this generator, also because its task is cancelled, ends the stream."""
    async with stream:
        try:
            async for chunk in stream:
                yield event(text=chunk.text)
        except Failure as error:  # too late for another status
            yield event(error=str(error))
            return
    yield event(finish_reason=stream.result.finish_reason, tokens=stream.result.stats.new_tokens)


def make_app(pair: Pair) -> FastAPI:
    app = FastAPI()

    @app.post("/generate")
    async def generate(question: Question) -> StreamingResponse:
        try:  # in a thread: a long prompt takes a moment to encode
            stream = await asyncio.to_thread(pair.stream, **question.model_dump())
        except BadInput as error:
            raise HTTPException(400, str(error)) from error
        return StreamingResponse(events(stream), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    import uvicorn

    with load(*sys.argv[1:3]) as pair:
        uvicorn.run(make_app(pair), port=8000)
