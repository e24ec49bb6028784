"""Numbers that users give."""

from __future__ import annotations

from operator import index

from .errors import BadInput


def require_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """BadInput unless `value` is a whole number (numpy's too) from `least` to `most`."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise BadInput(f"{name} must be a whole number, not {value!r}") from None
    if most is not None and not least <= number <= most:
        raise BadInput(f"{name} must be from {least} to {most}, not {number}")
    if number < least:
        raise BadInput(f"{name} must be at least {least}, not {number}")
