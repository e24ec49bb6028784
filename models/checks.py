"""What several folders share: checks of numbers and names that users give, draft lengths, progress reports."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from inspect import signature
from itertools import islice
from math import inf
from numbers import Real
from operator import index, length_hint
from typing import Any, Literal, overload

from .errors import BadInput, shown

DRAFT_LENGTH = 7  # the default of a fixed one: a verify step of K + 1 = 8 tokens then needs no padding to an even width
AUTO: Literal["auto"] = "auto"  # in place of a draft length: it is chosen each round
DRAFT_LIMIT = 32  # the longest: masks, rejected drafts and padding then fit manifest.KV_MARGIN rows of the KV buffers
LONGEST_NAME = 200  # characters that are compared with known names
LONGEST_PATH = 32767 if os.name == "nt" else 4096
MOST_ITEMS = 1 << 20  # of a list that a user gives, such as one of token ids; no vocabulary has more
BLOCK = 256  # tokens that are compared at once
LARGEST = 1e30  # of numbers: far above what has an effect, and no sum or product of such numbers overflows

Progress = Callable[[str, int, int], None]  # called with the stage's name, what is done and the total


def no_progress(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def require_whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number (numpy's too) from `least` to `most` as an int; BadInput for anything else, bool included."""
    number = whole_number(name, value)
    if most is not None and not least <= number <= most:
        raise BadInput(f"{name} must be from {least} to {most}, not {shown(number)}")
    if number < least:
        raise BadInput(f"{name} must be at least {least}, not {shown(number)}")
    return number


def whole_number(name: str, value: object) -> int:
    """A whole number (numpy's too) as an int; BadInput for anything else, bool and what exceeds LARGEST included."""
    try:
        number = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise BadInput(f"{name} must be a whole number, not {shown(value)}")
    if abs(number) > LARGEST:
        raise BadInput(f"{name} must be a whole number of at most {LARGEST:g}, not {shown(number)}")
    return number


def finite_number(name: str, value: object) -> float:
    """A real number as a float; BadInput for anything else, bool, NaN and what exceeds LARGEST included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadInput(f"{name} must be a number, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not abs(number) <= LARGEST:
        raise BadInput(f"{name} must be a finite number of at most {LARGEST:g}, not {shown(value)}")
    return number


def listed(value: object, name: str, most: int = MOST_ITEMS) -> list[Any]:
    """The items of an iterable; of an array without dimensions, which numpy cannot iterate, the array itself.

    BadInput, naming the argument, for more than `most` items: an iterator may have no end.
    """
    try:
        many = length_hint(value) > most
        items = [] if many else list(islice(value, most + 1))  # type: ignore[call-overload]
    except TypeError:
        return [value]
    if many or len(items) > most:
        raise BadInput(f"{name}: {type(value).__name__} has more than {most:,} items; give a list of fewer")
    return items


def true_or_false(name: str, value: object) -> bool:
    """A bool (numpy's too) as a bool; BadInput for anything else, whose truth may not be what the user means: "no"."""
    kind = type(value)
    if not (kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))):
        raise BadInput(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def function(name: str, value: object, *arguments: str) -> Any:
    """A function of the user's; BadInput for what cannot be called with so many arguments. arguments: what they are."""
    try:
        if not callable(value) or isinstance(value, type):
            raise TypeError
        signature(value).bind(*arguments)
    except TypeError:
        raise BadInput(f"{name} must be a function of {' and '.join(arguments)}, not {shown(value)}") from None
    except ValueError:  # some functions written in C do not tell
        pass
    return value


def path_text(name: str, value: object, wanted: str = "a path") -> str:
    """A path (text or os.PathLike) as text; BadInput for anything else."""
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise BadInput(f"{name} must be {wanted}, as text or os.PathLike, not {shown(value)}")
    if len(path) > LONGEST_PATH:
        raise BadInput(f"{name}: {shown(path)} has {len(path)} characters, more than a path may have")
    if "\0" in path:
        raise BadInput(f"{name}: {shown(path)} has a null character, which no path has")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half a surrogate pair
        raise BadInput(f"{name}: {shown(path)} is not valid Unicode") from None
    return path


def nearest_name(name: object, known: Iterable[str], least_similarity: float = 0.6) -> str | None:
    """The known name that is most similar to `name`, whatever their case; None where none is similar enough.

    least_similarity: from 0 (there is always a nearest one) to 1 (only the same letters), as difflib's `cutoff`.
    """
    by_lower_case = {key.lower(): key for key in known}
    nearest = get_close_matches(str(name)[:LONGEST_NAME].lower(), by_lower_case, n=1, cutoff=least_similarity)
    return by_lower_case[nearest[0]] if nearest else None


class ReadOnly(Sequence[int]):
    """A list of whole numbers that grows, for functions of users: they see it as it is now, and cannot change it."""

    __slots__ = ("_items",)

    def __init__(self, items: Sequence[int]) -> None:
        self._items = items

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        return self._items[place]

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self._items))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of tokens at the beginning that two sequences have in common."""
    same, end = 0, min(len(left), len(right))
    while same + BLOCK <= end and left[same : same + BLOCK] == right[same : same + BLOCK]:  # fast, for two lists
        same += BLOCK
    while same < end and left[same] == right[same]:
        same += 1
    return same
