"""How much work a chat template may do: a budget that is counted where templates loop, call and make texts.

A template is a stranger's program. The sandbox keeps it from the system, not from running for hours or from taking all
memory. Each rendering has a budget. A unit is about 20 ns of Python, or two bytes of text.
Costs are taken off before the work is done, so that a template ends with `TooMuchWork` before it takes the memory.
Counting is deterministic: a template that renders on one machine renders on every other.

loops      pay for each turn what their body has of expressions, when the loop begins
macros     pay what their body has, when they are called; so do blocks
texts      pay for the bytes that they make: printing, ~, +, *, %, slices, methods of texts, filters
values     pay for all that is inside where the whole value is walked: in lists that are made, comparisons, tojson
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

UNITS = 80_000_000  # of a rendering; conversations of 1,000 messages and 100 tools take up to about five million
BYTES_PER_UNIT = 2  # of text that is made
SCANNED_PER_UNIT = 256  # characters that are compared or searched
ITEM, COPIED = 10, 4  # of a value that is looked into, and of one that is copied from a list to another
TURN, MADE = 15, 100  # of a loop, beside its body, and of a lazy filter
CALL, MACRO = 120, 500  # of calls and filters, and of macros and blocks
SMALL = 1 << 62
MOST_BITS = 4096  # of whole numbers that are calculated with
MOST_DIGITS = 5  # of a width in a format
MOST_PLACES = 308  # that numbers are rounded to

# Types, as tuples: a union is made anew wherever it is written
TEXTS, PAIRS, LISTS = (str, bytes), (list, tuple), (list, tuple, set, frozenset)
SEQUENCES, CONTAINERS = (*TEXTS, *PAIRS), (*TEXTS, *LISTS, dict)
OWNERS, WALKED = (*TEXTS, *PAIRS, dict, int, float), (*PAIRS, Mapping, int)

_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


class TooMuchWork(Exception):
    """A template did more work than a rendering may. The message is a part of a sentence."""

    def __init__(self) -> None:
        super().__init__(
            "it does more work than a chat template may; take another template, or give the prompt as text"
        )


class Budget:
    """The units that a rendering has left."""

    __slots__ = ("left",)

    def __init__(self, units: int = UNITS) -> None:
        self.left = units

    def spend(self, units: float) -> None:
        self.left -= int(min(units, UNITS + 1))
        if self.left < 0:
            raise TooMuchWork


@contextmanager
def limited(units: int = UNITS) -> Iterator[Budget]:
    """In the body, all renderings share one budget; that of an outer body, if there is one."""
    outer = _budget.get()
    if outer:
        yield outer
        return
    budget = Budget(units)
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


def spend(units: float) -> None:
    budget = _budget.get()
    if budget:
        budget.spend(units)


# What values cost


def text_units(text: str | bytes) -> int:
    """Units of making this text."""
    return len(text) // BYTES_PER_UNIT if isinstance(text, bytes) or text.isascii() else len(text) * 4 // BYTES_PER_UNIT


def spend_on_all(value: Any) -> None:
    """Pay for the value and all that is in it: what printing or comparing it walks through."""
    kind = type(value)
    if kind is str:
        spend(1 + text_units(value))
        return
    if kind is int or kind is bool or value is None:
        spend(ITEM)
        return
    waiting = [value]
    units = 0.0
    while waiting:
        item = waiting.pop()
        kind = type(item)
        units += ITEM
        if kind is list or kind is tuple:
            waiting += item
            units += ITEM * len(item)  # before they are there
        elif kind is dict:
            waiting += item
            waiting += item.values()
            units += 3 * ITEM * len(item)
        elif isinstance(item, TEXTS):
            units += shallow_units(item)
        elif isinstance(item, int):
            units += item.bit_length() >> 6
        elif isinstance(item, Mapping):
            waiting += (*item.keys(), *item.values())
        elif isinstance(item, LISTS):
            waiting += item
        if units > 10_000:
            spend(units)
            units = 0.0
    spend(units)


def json_units(value: Any, *args: Any, **options: Any) -> float:
    """Units of the value as JSON: of lines that are indented by their depth, and of separators."""
    given = [one for one in (*args, *options.values()) if one is not None and not isinstance(one, bool)]
    widths = [one if isinstance(one, int) else length(one) for item in given for one in (listed(item))]
    width = 1 + sum(max(one, 0) for one in widths)
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        spend(ITEM + depth * width / BYTES_PER_UNIT + (text_units(item) if isinstance(item, str) else 0))
        inner = (*item.keys(), *item.values()) if isinstance(item, Mapping) else listed(item, ())
        waiting += [(one, depth + 1) for one in inner]
    return 0


def listed(value: Any, otherwise: Any = None) -> Any:
    """A list or tuple as it is; `otherwise` for another value, or a list of it."""
    if isinstance(value, PAIRS):
        return value
    return [value] if otherwise is None else otherwise


def length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def spend_on_made(value: Any) -> Any:
    """Pay for a value that a call or filter returned, without what was in it before; a generator pays for its items."""
    if isinstance(value, CONTAINERS):
        spend(shallow_units(value))
    elif isinstance(value, GeneratorType):
        return each(value, MADE)
    return value


def each(items: Iterable[Any], units: int) -> Iterator[Any]:
    """The items, each of which pays so many units, and its length if it is a list."""
    budget = _budget.get() or Budget()
    for item in items:
        budget.left -= units + (COPIED * len(item) if type(item) is list else 0)
        if budget.left < 0:
            raise TooMuchWork
        yield item


# Called by compiled templates, see `CountingGenerator`


def counted(units: int, items: Any) -> Any:
    """What a loop goes through: paid at once where its length is known. units: of one turn."""
    if isinstance(items, Sized):
        spend(CALL + len(items) * (TURN + units))
        return items
    return each(items, TURN + units) if isinstance(items, Iterable) else items


def counted_each(units: int, items: Any) -> Any:
    """As `counted`, for loops that may end early."""
    return each(items, TURN + units) if isinstance(items, Iterable) else items


def body(units: int, value: Any) -> Any:
    """The beginning of a macro or block."""
    spend(units)
    return value


def printed(value: Any) -> Any:
    """A value that is written as text."""
    if type(value) is str:
        budget = _budget.get()
        if budget:
            budget.left -= 1 + text_units(value)
            if budget.left < 0:
                raise TooMuchWork
    else:
        spend_on_all(value)
    return value


def scanned(value: Any) -> Any:
    """A value that is compared."""
    kind = type(value)
    if kind is str:
        spend(1 + len(value) // SCANNED_PER_UNIT)
    elif kind is int or kind is bool or value is None:
        return value
    elif isinstance(value, WALKED):
        spend_on_all(value)
    return value


def searched(value: Any) -> Any:
    """What `in` looks through: the keys of a mapping cost nothing."""
    if isinstance(value, str):
        spend(1 + len(value) // SCANNED_PER_UNIT)
    elif isinstance(value, PAIRS):
        spend(1 + 2 * len(value))
    elif isinstance(value, GeneratorType):
        return each(value, ITEM)
    return value


def sliced(value: Any) -> Any:
    """A value of which a part is copied."""
    if isinstance(value, Sized):
        spend(shallow_units(value))
    return value


# Operators


def operate(operator: str, left: Any, right: Any, apply: Callable[[Any, Any], Any]) -> Any:
    """The result of an operator whose result may be large; paid before it is made."""
    if operator == "+" and type(left) is str is type(right):
        printed(left)
        printed(right)
        return left + right
    if type(left) is int is type(right) and operator != "**" and -SMALL < left < SMALL and -SMALL < right < SMALL:
        return apply(left, right)
    for value, other in ((left, right), (right, left)):
        if isinstance(value, SEQUENCES):
            if operator == "*" and isinstance(other, int):
                spend(max(other, 0) * (shallow_units(value) + 1 / BYTES_PER_UNIT))
            elif operator == "+":
                spend(shallow_units(value))
        elif isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise TooMuchWork
    if operator == "%" and isinstance(left, TEXTS):
        require_short_format(left, right)
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST_BITS:
        raise TooMuchWork
    return apply(left, right)


def shallow_units(value: Any) -> float:
    """Units of a copy of a text or list, without what is in the list."""
    if isinstance(value, TEXTS):
        return (1 if isinstance(value, bytes) or value.isascii() else 4) * len(value) / BYTES_PER_UNIT
    return COPIED * len(value)


WIDTH = re.compile(rf"\d{{{MOST_DIGITS + 1},}}")


def require_short_format(pattern: str | bytes, values: Any) -> None:
    """Pay for a text that a pattern formats; TooMuchWork for widths that no text needs."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    spend(text_units(text))
    if WIDTH.search(text):
        raise TooMuchWork
    if "*" in text or re.search(r"\{[^{}]*\{", text):  # widths among the values
        waiting = [values]
        while waiting:
            item = waiting.pop()
            spend(ITEM)
            if WIDTH.search(item) if isinstance(item, str) else isinstance(item, int) and item >= 10**MOST_DIGITS:
                raise TooMuchWork
            waiting += item.values() if isinstance(item, Mapping) else item if isinstance(item, PAIRS) else ()
    for _ in range(text.count("%") + text.count("{")):
        spend_on_all(values)
