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

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import BuiltinMethodType, GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, Macro
from jinja2.tests import TESTS
from jinja2.utils import Namespace

UNITS = 80_000_000  # of a rendering; conversations of 1,000 messages and 100 tools take up to about five million
BYTES_PER_UNIT = 2  # of text that is made
SCANNED_PER_UNIT = 256  # characters that are compared or searched
ITEM, COPIED = 10, 4  # of a value that is looked into, and of one that is copied from a list to another
TURN, MADE = 15, 100  # of a loop, beside its body, and of a lazy filter
CALL, MACRO = 120, 500  # of calls and filters, and of macros and blocks
# Of an expression or statement by its kind. Calls, filters and tests pay when they happen
NODE = 2
WEIGHTS: dict[type[nodes.Node], int] = {
    **dict.fromkeys((nodes.Add, nodes.Sub, nodes.Mul, nodes.FloorDiv, nodes.Mod, nodes.Pow), 30),
    **dict.fromkeys((nodes.Getattr, nodes.Getitem, nodes.Test), 15),
    **dict.fromkeys((nodes.Output, nodes.Compare, nodes.Concat, nodes.Assign), 10),
}
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


# Calls


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
    return {name: counted_filter(name, plain) for name, plain in {**FILTERS, **own}.items()}


def counted_tests() -> dict[str, Callable[..., Any]]:
    """Jinja's tests, of which those pay that compare."""
    return {**TESTS, **{name: counted_test(TESTS[name]) for name in COMPARING}, "in": membership}


class OpaqueNamespace(Namespace):
    """The `namespace` of templates. It is written without its content, which may hold itself many times over."""

    def __repr__(self) -> str:
        return "<Namespace>"


# Compiling


def weight(node: nodes.Node) -> int:
    """Units of evaluating a node once, without the turns of loops in it."""
    if isinstance(node, nodes.TemplateData):
        return NODE + text_units(node.data)
    if isinstance(node, nodes.Macro):
        return NODE
    inner = [node.iter] if isinstance(node, nodes.For) else node.iter_child_nodes()
    return WEIGHTS.get(type(node), NODE) + sum(map(weight, inner))


Calls = dict[int, str]


def calls_of(tree: nodes.Template) -> Calls:
    """The calls that the values of nodes go through, by the nodes' ids: their beginnings. Adds what bodies cost."""
    out: Calls = {}

    def pass_to(call: str, *values: nodes.Node) -> None:
        for value in values:
            if isinstance(value, nodes.Const) and not call.startswith("body"):
                continue
            out[id(value)] = f"environment.{call}{out.get(id(value), '')}"

    def charge_body(node: Any, units: int) -> None:
        mark = nodes.Const(0, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(mark, lineno=node.lineno))
        pass_to(f"body({units}, ", mark)

    found = list(tree.find_all(nodes.Node))
    for node in found:  # literals are paid for whole, whatever else is done with them
        if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and is_made(node):
            pass_to("printed(", node)
    for node in found:
        match node:
            case nodes.For():
                turn = sum(map(weight, (*node.body, *([node.test] if node.test else ()))))
                ends_early = next(node.find_all(nodes.Break), None)
                pass_to(f"{'counted_each' if ends_early else 'counted'}({turn}, ", node.iter)
                if node.recursive:
                    charge_body(node, turn)
            case nodes.Macro() | nodes.CallBlock() | nodes.Block():
                charge_body(node, MACRO + sum(map(weight, node.body)))
            case nodes.Concat():
                pass_to("printed(", *node.nodes)
            case nodes.Compare():
                pass_to("scanned(", node.expr)
                for operand in node.ops:
                    pass_to("searched(" if operand.op in ("in", "notin") else "scanned(", operand.expr)
            case nodes.Getitem():
                if isinstance(node.arg, nodes.Slice):
                    pass_to("sliced(", node.node)
                elif not isinstance(node.arg, nodes.Const):
                    pass_to("scanned(", node.arg)
    return out


def is_made(node: nodes.Node) -> bool:
    """Whether a list, tuple or object is made of values that are not constants, and is not assigned to."""
    inner = node.find_all(nodes.Expr)
    return getattr(node, "ctx", "load") == "load" and any(not isinstance(one, nodes.Const) for one in inner)
