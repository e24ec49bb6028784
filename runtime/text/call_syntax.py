"""`Cursor`: reads the syntax of tool calls, JSON and Python calls, from a text that comes in pieces.

Each reading method is a generator that yields where it needs more text than there is. So the methods are written as if
the whole text was there, and how it is cut into pieces makes no difference to what they find.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Found = TypeVar("Found")
Reading = Generator[None, None, Found]

DEEPEST = 64  # levels of lists and objects in the arguments of a call
SPACES = re.compile(r"[ \t\r\n]*")
STRING_END = re.compile('["\\\\\x00-\x1f\ud800-\udfff]')  # surrogates are marks of special tokens
ESCAPE = re.compile(r'["\\/bfnrt]|u[0-9a-fA-F]{4}')
SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null", re.ASCII)
SCALAR_CHARACTERS = re.compile(r"[-+.\w]*", re.ASCII)
NAME = re.compile(r"[\w.:/-]+")
PYTHON_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
PYTHON_NAME_CHARACTERS = re.compile(r"[\w.]*")
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}


class NotACall(Exception):
    """The text is not what it could have been."""


@dataclass(frozen=True, slots=True)
class PythonCall:
    """A call in Python's syntax."""

    name: str
    positional: tuple[str, ...]  # JSON texts
    named: Mapping[str, str]  # JSON texts
    whole: str | None = None  # `name(**{...})`: the JSON object

    def arguments(self, parameters: Sequence[str]) -> str:
        """All arguments as a JSON object; positional ones are those of `parameters`. NotACall for one too many."""
        if self.whole is not None:
            return self.whole
        if len(self.positional) > len(parameters):
            raise NotACall
        named = dict(zip(parameters, self.positional, strict=False))
        if named.keys() & self.named.keys():
            raise NotACall
        return json_object(named | dict(self.named))


def json_object(members: Mapping[str, str]) -> str:
    """A JSON object of these members, whose values are JSON texts."""
    return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in members.items()) + "}"


class Cursor:
    """A place in a text that grows. NotACall is raised as soon as the text cannot be what is read."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False  # whether all of the text is there

    @property
    def at_end(self) -> bool:
        return self.ended and self.at >= len(self.text)

    def peek(self) -> Reading[str]:
        """The next character; empty at the end of the text."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def literal(self, wanted: str) -> Reading[None]:
        """Go past this text."""
        while len(self.text) - self.at < len(wanted):
            if self.ended or not wanted.startswith(self.text[self.at :]):
                raise NotACall
            yield
        if not self.text.startswith(wanted, self.at):
            raise NotACall
        self.at += len(wanted)

    def run(self, characters: re.Pattern[str]) -> Reading[str]:
        """Go past all characters that the pattern takes; they are found whole."""
        start = self.at
        while True:
            found = characters.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[start : self.at]
            yield

    def spaces(self) -> Reading[str]:
        """Go past white space."""
        return (yield from self.run(SPACES))

    def name(self) -> Reading[str]:
        """Go past the name of a tool."""
        found = yield from self.run(NAME)
        if not found:
            raise NotACall
        return found

    # JSON

    def value(self, depth: int = DEEPEST) -> Reading[None]:
        """Go past a JSON value."""
        character = yield from self.peek()
        if character == "{":
            yield from self.members(depth)
        elif character == "[":
            yield from self.items(depth)
        elif character == '"':
            yield from self.string()
        else:
            scalar = yield from self.run(SCALAR_CHARACTERS)
            if not SCALAR.fullmatch(scalar):
                raise NotACall

    def members(self, depth: int = DEEPEST) -> Reading[None]:
        """Go past a JSON object."""
        yield from self.literal("{")
        yield from self.spaces()
        if (yield from self.peek()) == "}":
            self.at += 1
            return
        while depth:
            yield from self.key()
            yield from self.value(depth - 1)
            if not (yield from self.goes_on("}")):
                return
        raise NotACall

    def key(self) -> Reading[str]:
        """Go past the key of a member and its colon."""
        key = yield from self.string()
        yield from self.spaces()
        yield from self.literal(":")
        yield from self.spaces()
        return key

    def items(self, depth: int = DEEPEST) -> Reading[None]:
        """Go past a JSON array."""
        yield from self.literal("[")
        yield from self.spaces()
        if (yield from self.peek()) == "]":
            self.at += 1
            return
        while depth:
            yield from self.value(depth - 1)
            if not (yield from self.goes_on("]")):
                return
        raise NotACall

    def goes_on(self, closing: str) -> Reading[bool]:
        """Go past a comma, or past the closing character; whether it was the comma."""
        yield from self.spaces()
        comma = (yield from self.peek()) == ","
        yield from self.literal("," if comma else closing)
        if comma:
            yield from self.spaces()
        return comma

    def string(self) -> Reading[str]:
        """Go past a JSON string."""
        start = self.at
        yield from self.literal('"')
        while True:
            found = STRING_END.search(self.text, self.at)
            self.at = found.start() if found else len(self.text)
            character = yield from self.peek()
            if character == '"':
                self.at += 1
                text: str = json.loads(self.text[start : self.at])
                return text
            if character == "\\":
                yield from self.escape()
            elif found or not character:
                raise NotACall

    def escape(self) -> Reading[None]:
        while True:
            found = ESCAPE.match(self.text, self.at + 1)
            if found:
                self.at = found.end()
                return
            rest = self.text[self.at + 1 : self.at + 6]
            if self.ended or not re.fullmatch(r"(?:u[0-9a-fA-F]{0,3})?", rest):
                raise NotACall
            yield

    # Python

    def python_call(self, suffix: str = "") -> Reading[PythonCall]:
        """Go past `name(value, name=value)` or `name(**{...})`, whose name ends in the suffix."""
        name = yield from self.python_name()
        if not name.endswith(suffix):
            raise NotACall
        name = name.removesuffix(suffix)
        positional: list[str] = []
        named: dict[str, str] = {}
        yield from self.literal("(")
        yield from self.spaces()
        if (yield from self.peek()) == "*":
            return PythonCall(name, (), {}, (yield from self.unpacked_object()))
        while (yield from self.peek()) != ")":
            yield from self.python_argument(positional, named)
            if not (yield from self.goes_on(")")):
                return PythonCall(name, tuple(positional), named)
        self.at += 1
        return PythonCall(name, tuple(positional), named)

    def unpacked_object(self) -> Reading[str]:
        """Go past `**{...})`."""
        yield from self.literal("**")
        start = self.at
        yield from self.members()
        end = self.at
        yield from self.literal(")")
        return self.text[start:end]

    def python_argument(self, positional: list[str], named: dict[str, str]) -> Reading[None]:
        """Go past an argument of a call, and add it."""
        start = self.at
        word = yield from self.run(PYTHON_NAME_CHARACTERS)
        yield from self.spaces()
        if word.isidentifier() and (yield from self.peek()) == "=":
            self.at += 1
            yield from self.spaces()
            if word in named:
                raise NotACall
            named[word] = yield from self.python_value()
        elif named:
            raise NotACall
        else:
            self.at = start
            positional.append((yield from self.python_value()))

    def python_name(self) -> Reading[str]:
        name = yield from self.run(PYTHON_NAME_CHARACTERS)
        if not PYTHON_NAME.fullmatch(name):
            raise NotACall
        return name

    def python_value(self, depth: int = DEEPEST) -> Reading[str]:
        """Go past a literal of Python; its JSON text, in which numbers are as they were written."""
        if not depth:
            raise NotACall
        character = yield from self.peek()
        if character in ("[", "("):
            return (yield from self.python_list("]" if character == "[" else ")", depth))
        if character == "{":
            return (yield from self.python_dict(depth))
        if character in ("'", '"'):
            return json.dumps((yield from self.python_string()), ensure_ascii=False)
        word = yield from self.run(SCALAR_CHARACTERS)
        if word in PYTHON_WORDS:
            return PYTHON_WORDS[word]
        if SCALAR.fullmatch(word):
            return word
        return number_text(word)

    def python_list(self, closing: str, depth: int) -> Reading[str]:
        self.at += 1
        items: list[str] = []
        yield from self.spaces()
        while (yield from self.peek()) != closing:
            items.append((yield from self.python_value(depth - 1)))
            if not (yield from self.goes_on(closing)):
                return f"[{', '.join(items)}]"
        self.at += 1
        return f"[{', '.join(items)}]"

    def python_dict(self, depth: int) -> Reading[str]:
        self.at += 1
        members: dict[str, str] = {}
        yield from self.spaces()
        while (yield from self.peek()) != "}":
            key = yield from self.python_string()
            yield from self.spaces()
            yield from self.literal(":")
            yield from self.spaces()
            members[key] = yield from self.python_value(depth - 1)
            if not (yield from self.goes_on("}")):
                return json_object(members)
        self.at += 1
        return json_object(members)

    def python_string(self) -> Reading[str]:
        """Go past a string of Python without a prefix."""
        start = self.at
        quote = yield from self.peek()
        if quote not in ("'", '"'):
            raise NotACall
        while len(self.text) - start < 3 and self.text[start:] in (quote, quote * 2) and not self.ended:
            yield
        if self.text.startswith(quote * 3, start):
            quote *= 3
        elif self.text.startswith(quote * 2, start):
            self.at += 2
            return ""
        self.at = start + len(quote)
        stop = re.compile(rf"{quote}|\\(?s:.)|[\ud800-\udfff]" + ("" if len(quote) == 3 else "|\n"))
        while True:
            found = stop.search(self.text, self.at)
            if found and found[0] == quote:
                self.at = found.end()
                return python_text(self.text[start : self.at])
            if found and found[0][0] == "\\":
                self.at = found.end()
            elif found or self.ended:
                raise NotACall
            else:  # the last characters may be the beginning of a quote or of an escape
                self.at = max(self.at, len(self.text) - 3)
                yield


def python_text(literal: str) -> str:
    try:
        text = ast.literal_eval(literal)
        text.encode()
    except (SyntaxError, ValueError, MemoryError) as error:  # an escape that does not exist, half a surrogate pair
        raise NotACall from error
    return str(text)


def number_text(word: str) -> str:
    """The JSON text of a number of Python that JSON writes otherwise, such as 1_000 or .5."""
    if not re.fullmatch(r"-?[\d.][\w.+-]*", word, re.ASCII) or len(word) > 100:
        raise NotACall
    try:
        return json.dumps(ast.literal_eval(word), allow_nan=False)
    except (SyntaxError, ValueError, TypeError, MemoryError) as error:
        raise NotACall from error
