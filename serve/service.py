"""`Service`: what all endpoints of a server share."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from secrets import token_hex
from time import time
from typing import Any

from starlette.requests import Request

from pard_onnx.models.errors import BadInput, PardError
from pard_onnx.models.logs import logger
from pard_onnx.runtime.result import Result
from pard_onnx.runtime.sampling.settings import MOST_SEED

from .body import read_json
from .errors import SERVER, ApiError, api_error
from .fields import CHAT, Form
from .generation import Generation, Generations
from .metrics import Metrics
from .registry import OpenModel, Registry
from .response_store import ResponseStore
from .settings import Settings

LOG = logger(__name__)
FIRST_WORD = re.compile("[a-z_.]+")


class Service:
    """The models, the generations, and the counts of one server."""

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.registry, self.settings = registry, settings
        self.metrics = Metrics()
        self.generations = Generations(self.metrics)
        self.responses = ResponseStore()
        self.started = int(time())
        self.stopping = False  # whether the server ends: no generation begins any more

    @classmethod
    def of(cls, request: Request) -> Service:
        service: Service = request.app.state.service
        return service

    async def body(self, request: Request) -> Any:
        """The request's body, as JSON. Raises ApiError."""
        return await read_json(request, self.settings)

    @asynccontextmanager
    async def model(self, name: str | None) -> AsyncIterator[OpenModel]:
        """The model of this name, loaded, which stays loaded in the body. Raises ApiError, PardError."""
        model = await self.registry.take(name)
        try:
            yield model
        finally:
            model.release()

    @asynccontextmanager
    async def generation(
        self, model: OpenModel, prompt: Any, options: Mapping[str, Any], choice: int = 0, *, whole: bool = False
    ) -> AsyncIterator[Generation]:
        """A text that follows the prompt; it ends with the body.

        prompt, options: as of `Pair.stream`. choice: the index among several texts of a request, each of which has a
        seed of its own. whole: only the result is read.
        """
        if self.stopping:
            raise ApiError(503, "the server is stopping; send the request again later", SERVER, "stopping")
        own = {"max_new_tokens": model.pair.capacity, "timeout": self.settings.timeout, **options}
        if own.get("seed") is not None:
            own["seed"] = (own["seed"] + choice) % (MOST_SEED + 1)
        if self.settings.log_prompts:
            LOG.info("prompt for %r: %r", model.name, prompt)
        async with self.generations.run(model, prompt, own, whole=whole) as generation:
            yield generation
            if self.settings.log_prompts and generation.ended:
                LOG.info("text of %r: %r", model.name, generation.result.text)

    def error(self, error: BaseException, form: Form = CHAT) -> ApiError:
        """The answer to an exception, which is logged if it was not foreseen. form: that of the request's fields."""
        if not isinstance(error, ApiError | PardError):
            LOG.error("not foreseen", exc_info=error)
        answer = api_error(error, self.metrics.retry_after(self.generations.count, self.settings.max_live))
        if isinstance(error, BadInput):  # the library names its own options
            names = form.names
            for option, field in names.items():
                answer.message = answer.message.replace(option, field)
            first = FIRST_WORD.match(answer.message)
            known = first is not None and (first[0] in form.fields or first[0] in names.values())
            answer.param = first[0] if first and known else None
        return answer


def new_id(prefix: str) -> str:
    """A fresh id, as answers have it."""
    return f"{prefix}-{token_hex(12)}"


def require_text(result: Result) -> Result:
    """The result. ApiError (503) if its time was over before its first token."""
    if result.finish_reason == "timeout" and not result.stats.new_tokens:
        message = "the time was over before the first token; send the request again later, or a shorter prompt"
        raise ApiError(503, message, SERVER, "timeout", headers={"Retry-After": "1"})
    return result


def arguments_of(text: str) -> dict[str, Any] | None:
    """The arguments of a call as an object; None for text that is none, as of a call that was cut short."""
    try:
        found = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# OpenAI has no other reasons: "length" is a text that could have gone on
REASONS = {"stop": "stop", "tool_calls": "tool_calls"}


def finish_reason(result: Result) -> str:
    """Why the text ended, in OpenAI's words."""
    return REASONS.get(result.finish_reason, "length")
