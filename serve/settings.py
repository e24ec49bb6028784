"""`Settings` of a server, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from pard_onnx.models.checks import finite_number, require_whole, true_or_false
from pard_onnx.models.errors import BadInput, shown
from pard_onnx.runtime.engine import MAX_LIVE
from pard_onnx.runtime.prefixes import CACHE_BYTES

LOOPBACK, PORT = "127.0.0.1", 8000
MAX_QUEUE = 64
MAX_REQUEST_BYTES = 16 << 20
MEMORY_SHARE = 0.8
BODY_SECONDS = 10.0
GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server answers. BadInput names the value and the fix."""

    host: str = LOOPBACK  # an address or a name; one that is not loopback demands an API key
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = MAX_QUEUE  # generations of a model that may wait for a place; more are refused with 503
    max_live: int = MAX_LIVE  # generations of a model that run at the same time, in turns
    timeout: float | None = None  # seconds after which a generation ends with what it has; None for no limit
    cors: tuple[str, ...] = ()  # origins whose pages may use the server; "*" for all
    max_request_bytes: int = MAX_REQUEST_BYTES  # of a request's body
    memory: int | None = None  # bytes that loaded models may take; None for MEMORY_SHARE of this machine's memory
    cache_bytes: int = CACHE_BYTES  # as of `load`
    strict: bool = False  # whether unknown fields of requests are refused, and not ignored
    log_prompts: bool = False  # whether prompts and texts are logged
    body_seconds: float = BODY_SECONDS  # that a client may take between two pieces of a request's body
    grace_seconds: float = GRACE_SECONDS  # that running generations have to end in when the server stops
    load: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of `load`: providers and threads

    def __post_init__(self) -> None:
        for name in ("max_queue", "cache_bytes"):
            require_whole(name, getattr(self, name), 0)
        for name in ("max_live", "max_request_bytes"):
            require_whole(name, getattr(self, name), 1)
        if self.memory is not None:
            require_whole("memory", self.memory, 1)
        for name in ("strict", "log_prompts"):
            true_or_false(name, getattr(self, name))
        for name in ("body_seconds", "grace_seconds", "timeout"):
            value = getattr(self, name)
            if value is not None and finite_number(name, value) <= 0 and not (name == "grace_seconds" and value == 0):
                raise BadInput(f"{name} must be a number of seconds above 0, not {shown(value)}")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.isprintable()):
            raise BadInput("the API key must be printable ASCII characters, since HTTP headers have no others")
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            raise BadInput("the API key is empty, or begins or ends with a space; choose another one, or none")
        if not is_loopback(self.host) and self.api_key is None:
            raise BadInput(
                f"--host {self.host}: others can reach this address, so a key is needed; give --api-key or set "
                "PARD_API_KEY"
            )
        for origin in self.cors:
            if origin != "*" and ("://" not in origin or origin.endswith("/") or not origin.isprintable()):
                raise BadInput(f"--cors {shown(origin)}: an origin is written http://HOST:PORT, without a path; or *")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
