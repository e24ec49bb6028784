"""What calls, filters and tests of chat templates cost, beside what `template_budget` takes for each of them.

Tables say by name which of them can make far longer texts than they are given, or take longer than their texts are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, Macro
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from .template_budget import (
    BYTES_PER_UNIT,
    CALL,
    ITEM,
    MACRO,
    MOST_PLACES,
    OWNERS,
    PAIRS,
    SCANNED_PER_UNIT,
    TEXTS,
    TURN,
    counted,
    each,
    json_units,
    length,
    require_short_format,
    scanned,
    searched,
    shallow_units,
    sliced,
    spend,
    spend_on_all,
    spend_on_made,
    text_units,
)

LOCALS = ("_loop_vars", "_block_vars")  # keywords of jinja2's own


def spend_on_call(called: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """Pay for a call before it happens. Returns the arguments, in which generators are counted."""
    spend(CALL)
    if keywords:
        keywords = {name: value for name, value in keywords.items() if name not in LOCALS}
    if isinstance(called, LoopContext):  # of a recursive loop
        spend(MACRO)
        return (counted(TURN, args[0]), *args[1:]) if args else args
    if isinstance(called, Macro):
        if called.catch_varargs or called.catch_kwargs:
            spend_on_all([args, dict(keywords)])
        return args
    if isinstance(called, BuiltinMethodType):
        owner, name = called.__self__, called.__name__
        if isinstance(owner, OWNERS):
            return spend_on_method(owner, name, args, keywords)
    if called is dict or getattr(called, "__name__", "") == "changed":
        spend_on_all([args, dict(keywords)])
    return args


def spend_on_method(owner: Any, name: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """As `spend_on_call`, for methods of texts, numbers and lists."""
    args = tuple(list(each(arg, ITEM)) if isinstance(arg, Iterator) else arg for arg in args)
    if isinstance(owner, TEXTS):
        spend(1 + len(owner) // BYTES_PER_UNIT)
        text_method = TEXT_METHODS.get(name)
        if text_method:
            spend(text_method(owner, *args, **keywords))
        elif name not in CHEAP:
            spend_on_all(args)
    elif isinstance(owner, int) and name in ("to_bytes", "from_bytes"):
        spend(sum(arg if isinstance(arg, int) else len(arg) for arg in (*args, *keywords.values())))
    elif isinstance(owner, PAIRS):
        spend_on_all([owner, *args])
    elif name == "fromkeys" and args:
        spend_on_all(list(args[:1]))
    return args


def padded(text: Any, width: Any = 0, *_: Any) -> float:
    return 4 * width / BYTES_PER_UNIT if isinstance(width, int) else 0


def replaced(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> float:
    if not isinstance(old, TEXTS) or not isinstance(new, TEXTS):
        return 0  # the method refuses them
    found = text.count(old) if isinstance(text, str) == isinstance(old, str) else 0
    return text_units(text) + found * (text_units(new) + 1)


def joined(text: Any, items: Any = (), *_: Any) -> float:
    spend_on_all(items)
    return length(items) * shallow_units(text)


def searched_backwards(text: Any, wanted: Any = "", *_: Any, **keywords: Any) -> float:
    """The search from the end takes as long as both lengths multiplied."""
    wanted = keywords.get("sep", wanted)
    return len(text) * length(wanted) / (8 * SCANNED_PER_UNIT)


def expanded(text: Any, size: Any = 8, *_: Any, **keywords: Any) -> float:
    size = keywords.get("tabsize", size)
    return text.count("\t" if isinstance(text, str) else b"\t") * size if isinstance(size, int) else 0


def translated(text: Any, table: Any = None, *_: Any) -> float:
    longest = max(map(length, table.values()), default=1) if isinstance(table, Mapping) else 1
    return len(text) * (longest + 1)


# Methods of texts whose results may be far longer than their texts, or whose time is: units by their arguments
TEXT_METHODS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("ljust", "rjust", "center", "zfill"), padded),
    **dict.fromkeys(("rfind", "rindex", "rsplit", "rpartition"), searched_backwards),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), searched_backwards),
    "replace": replaced,
    "join": joined,
    "expandtabs": expanded,
    "translate": translated,
}
CHEAP = frozenset(
    ("startswith", "endswith", "split", "find", "upper", "lower", "removeprefix", "removesuffix", "count")
)


# Filters and tests

ALL_FILTERS: Mapping[str, Any] = FILTERS
ALL_TESTS: Mapping[str, Any] = TESTS


def as_text(value: Any) -> str:
    """The value as text, which is paid for before it is made."""
    spend_on_all(value)
    return str(value)


def with_squares(value: Any, *_: Any, **__: Any) -> float:
    """Filters that may take as long as the square of a text's length."""
    size = len(as_text(value))
    return size + size * size / 1000


def filled(_: Any, size: Any = 0, *__: Any, **keywords: Any) -> float:
    size = next((keywords[name] for name in ("linecount", "slices") if name in keywords), size)
    return size if isinstance(size, int) else 0


def indented(value: Any, width: Any = 4, *_: Any, **__: Any) -> float:
    size = len(width) if isinstance(width, str) else width
    return (as_text(value).count("\n") + 1) * size if isinstance(size, int) else 0


def wrapped_lines(value: Any, *args: Any, **keywords: Any) -> float:
    ends = [len(arg) for arg in (*args, *keywords.values()) if isinstance(arg, str)]
    return with_squares(value) + len(str(value)) * sum(ends)


def rounded(_: Any, precision: Any = 0, *__: Any) -> float:
    return math.inf if isinstance(precision, int) and abs(precision) > MOST_PLACES else 0


def formatted(pattern: Any, *args: Any, **keywords: Any) -> float:
    require_short_format(as_text(pattern), [args, keywords])
    return 0


def sorted_units(value: Any, *_: Any, **__: Any) -> float:
    return 16 * ITEM * length(value)


def joined_items(items: Any, d: Any = "", *_: Any, **__: Any) -> float:
    return length(items) * shallow_units(as_text(d))


def replaced_in(value: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> float:
    return replaced(*map(as_text, (value, old, new)))


def trimmed(value: Any, chars: Any = None, *_: Any) -> float:
    return searched_backwards(as_text(value), chars)


# Filters that cost more than a call, what they are given and the text that they return: units by their arguments
FILTER_UNITS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("striptags", "urlize", "pprint", "xmlattr"), with_squares),
    **dict.fromkeys(("sort", "dictsort", "unique", "groupby", "min", "max"), sorted_units),
    **dict.fromkeys(("batch", "slice"), filled),
    "center": padded,
    "format": formatted,
    "indent": indented,
    "join": joined_items,
    "replace": replaced_in,
    "round": rounded,
    "tojson": json_units,
    "trim": trimmed,
    "wordwrap": wrapped_lines,
}
# Filters that read a generator as it comes, and others that do not look into the values of a list
LAZY = {"attr", "default", "d", "first", "last", "length", "count", "items", "map"}
LAZY |= {"select", "reject", "selectattr", "rejectattr"}
SHALLOW = LAZY | {"abs", "batch", "list", "random", "reverse", "round", "slice", "tojson"}
COMPARING = ("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">=")


def counted_filter(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which pays before it runs. A generator is read first where the filter reads it to its end."""
    units = FILTER_UNITS.get(name)
    skipped = 1 if getattr(plain, "jinja_pass_arg", None) else 0  # the context or environment, the first argument
    whole, lazy = name not in SHALLOW, name in LAZY

    @wraps(plain)
    def run(*args: Any, **keywords: Any) -> Any:
        spend(CALL)
        if len(args) > skipped and isinstance(args[skipped], Iterator) and not lazy:
            args = (*args[:skipped], list(each(args[skipped], ITEM)), *args[skipped + 1 :])
        given = args[skipped:]
        if whole:
            for value in (*given, *keywords.values()):
                spend_on_all(value)
        elif given and not lazy:
            sliced(given[0])
        if units:
            spend(units(*given, **keywords))
        return spend_on_made(plain(*args, **keywords))

    return run


def counted_test(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def run(*args: Any) -> Any:
        for arg in args:
            scanned(arg)
        return plain(*args)

    return run


def membership(value: Any, items: Any) -> bool:
    """The test `in`."""
    scanned(value)
    return value in searched(items)


def counted_filters(own: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Jinja's filters and `own`, which pay."""
    return {name: counted_filter(name, plain) for name, plain in {**ALL_FILTERS, **own}.items()}


def counted_tests() -> dict[str, Callable[..., Any]]:
    """Jinja's tests, of which those pay that compare."""
    return {**ALL_TESTS, **{name: counted_test(ALL_TESTS[name]) for name in COMPARING}, "in": membership}


class OpaqueNamespace(Namespace):
    """The `namespace` of templates. It is written without its content, which may hold itself many times over."""

    def __repr__(self) -> str:
        return "<Namespace>"
