"""`Arguments`: what a deployment on Ray Serve is given, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pard_onnx.models.checks import finite_number, nearest_name, path_text, require_whole, true_or_false
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.models.library import OWN_DRAFT, Library
from pard_onnx.runtime.engine import MAX_LIVE
from pard_onnx.runtime.prefixes import CACHE_BYTES
from pard_onnx.serve.settings import MAX_QUEUE, MAX_REQUEST_BYTES, Settings
from pard_onnx.serve.sources import Source, named_source

KEY_VARIABLE = "PARD_API_KEY"
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def text(name: str, value: object) -> str:
    return path_text(name, value, "a text")


def whole(name: str, value: object) -> int:
    """A whole number; from a command line it comes as text."""
    return require_whole(name, int(value) if isinstance(value, str) and value.isdecimal() else value, 0)


def number(name: str, value: object) -> float:
    """A number of at least 0; from a command line it comes as text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise BadInput(f"{name} must be a number, not {shown(value)}") from None
    found = finite_number(name, value)
    if found < 0:
        raise BadInput(f"{name} must be at least 0, not {shown(found)}")
    return found


def flag(name: str, value: object) -> bool:
    return true_or_false(name, TRUTH.get(value.lower(), value) if isinstance(value, str) else value)


def names(name: str, value: object) -> tuple[str, ...]:
    """A list, or a text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise BadInput(f"{name} must be a list of texts, not {shown(value)}")
    return tuple(text(name, item) for item in items)


def argument(read: Callable[[str, object], Any], default: Any) -> Any:
    """A field of `Arguments`, and how its value is read."""
    return field(default=default, metadata={"read": read})


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The arguments of `serve run pard_onnx.serve.ray:app`. All have the names and meanings of pard-serve's options, or
    of Ray's own settings."""

    target: str | None = argument(text, None)  # as of `load`; on every node at the same path
    draft: str | None = argument(text, OWN_DRAFT)
    name: str | None = argument(text, None)  # by which requests name the model
    models: str | None = argument(text, None)  # a folder of targets, instead of one target
    provider: str = argument(text, "cpu")
    threads: int | None = argument(whole, None)  # of each step; None for num_cpus
    max_live: int = argument(whole, MAX_LIVE)  # generations of a replica that run in turns
    max_queue: int = argument(whole, MAX_QUEUE)  # requests that may wait for a replica; more get 503
    timeout: float | None = argument(number, None)  # seconds after which a generation ends
    grace: float = argument(number, 30.0)  # seconds that running texts have when a replica stops
    max_request_bytes: int = argument(whole, MAX_REQUEST_BYTES)
    memory: int | None = argument(whole, None)  # bytes that the loaded models of a replica may take
    cache_bytes: int = argument(whole, CACHE_BYTES)  # of KV cache entries that a replica keeps
    strict: bool = argument(flag, False)
    cors: tuple[str, ...] = argument(names, ())
    api_key: str | None = field(default=None, repr=False, metadata={"read": text})
    num_cpus: float = argument(number, 1.0)  # cores that Ray reserves for a replica
    num_gpus: float = argument(number, 0.0)
    min_replicas: int = argument(whole, 1)
    max_replicas: int = argument(whole, 1)
    target_ongoing_requests: float | None = argument(number, None)  # of a replica; None for max_live
    upscale_delay_s: float = argument(number, 30.0)
    downscale_delay_s: float = argument(number, 600.0)
    ingress_replicas: int = argument(whole, 1)  # that take requests and send them to models

    def __post_init__(self) -> None:
        if (self.target is None) == (self.models is None):
            raise BadInput("name what to serve: target=DIR with draft=DIR, or models=DIR, and one of them alone")
        if self.models is not None and (self.name is not None or self.draft not in (None, OWN_DRAFT)):
            raise BadInput("models serves a whole folder; leave out draft and name, or models")
        if self.min_replicas < 1:  # without a replica, nobody knows the models
            raise BadInput(f"min_replicas must be at least 1, not {self.min_replicas}")
        if self.max_replicas < self.min_replicas:
            raise BadInput(
                f"max_replicas is {self.max_replicas} and min_replicas {self.min_replicas}; allow as many at least"
            )
        if self.ingress_replicas < 1:
            raise BadInput(f"ingress_replicas must be at least 1, not {self.ingress_replicas}")
        if self.target_ongoing_requests == 0:
            raise BadInput("target_ongoing_requests must be above 0; it is how many requests a replica shall have")
        self.settings()

    @classmethod
    def read(cls, given: Mapping[str, object], environment: Mapping[str, str]) -> Arguments:
        """Arguments by name, as Ray gives them. environment: has the API key, if no argument has it. BadInput names an
        unknown argument, and the nearest known one."""
        known = {one.name: one.metadata["read"] for one in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                nearest = nearest_name(name, known)
                hint = f"do you mean {nearest}?" if nearest else f"known ones: {', '.join(known)}"
                raise BadInput(f"{shown(name)}: there is no such argument; {hint}")
            if value is not None:
                values[name] = known[name](name, value)
        if key := environment.get(KEY_VARIABLE):
            values.setdefault("api_key", key)
        return cls(**values)

    def settings(self) -> Settings:
        """Those of the application in each replica. The queue is Ray's, so each request that comes has a place."""
        threads = self.threads if self.threads is not None else max(1, int(self.num_cpus))
        return Settings(
            api_key=self.api_key,
            cors=self.cors,
            max_live=self.max_live,
            max_queue=self.most_ongoing,
            timeout=self.timeout,
            max_request_bytes=self.max_request_bytes,
            memory=self.memory,
            cache_bytes=self.cache_bytes,
            strict=self.strict,
            load={"provider": self.provider, "threads": threads},
        )

    @property
    def most_ongoing(self) -> int:
        """Requests that a replica has at the same time, those included that generate nothing. The others wait in Ray's
        router, so that they can go to a replica that is started meanwhile."""
        return 2 * self.max_live

    def source(self) -> Source | None:
        """The model that is always there; None for a folder of models."""
        return None if self.target is None else named_source(self.target, self.draft, self.name)

    def library(self) -> Library | None:
        return None if self.models is None else Library(Path(self.models))
