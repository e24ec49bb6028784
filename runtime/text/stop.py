"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pard_onnx.models.errors import BadInput


@dataclass(frozen=True, slots=True)
class Scan:
    """release: text that is certain; hold: its rest, which may yet begin a stop string; stopped: one was complete."""

    release: str
    hold: str
    stopped: bool


def scan(text: str, stops: Sequence[str]) -> Scan:
    """Cut text in front of the earliest stop string; hold back the longest end that may become one."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return Scan(text[: min(found)], "", True)
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return Scan(text[:-size], text[-size:], False)
    return Scan(text, "", False)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """What users give as `stop`, checked: one string or several, none of them empty."""
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    for one in stops:
        if not isinstance(one, str) or not one:
            raise BadInput(f"a stop string must be text of at least one character, not {one!r}")
    return stops
