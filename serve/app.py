"""`create_app`: the server as a Starlette application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .anthropic_api.messages import count_tokens, messages
from .error_forms import error_response
from .errors import ApiError
from .facts import detokenize, health, list_models, metrics, show_model, show_page, tokenize
from .guard import Guard
from .metrics import Metrics
from .ollama_api import embeddings as ollama_embeddings
from .ollama_api import generation as ollama_generation
from .ollama_api import models as ollama_models
from .openai_api.chat import chat_completions
from .openai_api.completions import completions
from .openai_api.embeddings import embeddings
from .openai_api.responses import delete_response, responses, show_response
from .registry import Registry
from .service import Service
from .settings import Settings
from .sse import Disconnected

Endpoint = Callable[[Request], Awaitable[Response]]
# Path, method, endpoint
ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("/", "GET", show_page),
    ("/health", "GET", health),
    ("/metrics", "GET", metrics),
    ("/v1/models", "GET", list_models),
    ("/v1/models/{model:path}", "GET", show_model),
    ("/v1/chat/completions", "POST", chat_completions),
    ("/v1/completions", "POST", completions),
    ("/v1/responses", "POST", responses),
    ("/v1/responses/{id}", "GET", show_response),
    ("/v1/responses/{id}", "DELETE", delete_response),
    ("/v1/messages", "POST", messages),
    ("/v1/messages/count_tokens", "POST", count_tokens),
    ("/v1/embeddings", "POST", embeddings),
    ("/tokenize", "POST", tokenize),
    ("/detokenize", "POST", detokenize),
    ("/api/chat", "POST", ollama_generation.chat),
    ("/api/generate", "POST", ollama_generation.generate),
    ("/api/tags", "GET", ollama_models.tags),
    ("/api/ps", "GET", ollama_models.running),
    ("/api/show", "POST", ollama_models.show),
    ("/api/version", "GET", ollama_models.version),
    ("/api/embed", "POST", ollama_embeddings.embed),
    ("/api/embeddings", "POST", ollama_embeddings.embedding),
    *((f"/api/{verb}", "POST", ollama_models.no_management) for verb in ("pull", "push", "create", "copy")),
    ("/api/delete", "DELETE", ollama_models.no_management),
)
CLIENT_CLOSED = 499  # nobody reads it


def create_app(registry: Registry, settings: Settings) -> Starlette:
    """The application. Models are unloaded when it shuts down."""
    service = Service(registry, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.generations.cancel()
        await registry.close()

    app = Starlette(
        routes=[Route(path, answering(endpoint), methods=[method]) for path, method, endpoint in ROUTES],
        middleware=middleware_of(settings, service.metrics),
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def middleware_of(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Who may use a server, the outermost check first."""
    middleware = [Middleware(Guard, settings=settings, metrics=metrics)]
    if settings.cors:  # around the guard: pages must be able to read its refusals
        allowed: dict[str, Any] = {
            "allow_methods": ["GET", "POST", "DELETE"],
            "allow_headers": ["*"],
            "expose_headers": ["x-request-id", "request-id", "retry-after"],
        }
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(settings.cors), **allowed))
    return middleware


def answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint, whose exceptions are answers in the form of its API."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Disconnected:
            return Response(status_code=CLIENT_CLOSED)
        except Exception as error:
            return error_response(Service.of(request).error(error), request.scope)

    return answer


async def http_error(request: Request, error: Exception) -> Response:
    """What the router refuses."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is nothing at {request.url.path}; docs/serve.md lists the endpoints",
        405: f"{request.method} is not a method of {request.url.path}",
    }
    message = messages.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})), request.scope)
