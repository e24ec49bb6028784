"""Calls of tools in the text of a reply: what they are, and a parser for text that comes in pieces.

What is a call becomes a `ToolCall` in OpenAI's form, with its arguments as the model wrote them. What looks like a call
and is none, such as one that is cut short, stays text. White space around calls is no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .call_syntax import Cursor, NotACall, Reading
from .writer import MARK, scan


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool."""

    id: str
    name: str
    arguments: str  # a JSON object, as the model wrote it

    def as_message(self) -> dict[str, Any]:
        """The call as an item of a message's tool_calls, in OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of a call, as OpenAI's streams have it: the first one of each call has its id and name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Found:
    """What a piece of a reply's text has completed."""

    text: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


@dataclass(slots=True)
class OpenCall:
    """A call whose arguments are given as they come."""

    name: str
    start: int  # where its arguments begin in the text
    given: int  # how far they were given
    end: int | None = None  # where they end, once they were read


class CallReader:
    """Parses the text of one reply."""

    def __init__(
        self,
        begins: Mapping[str, Read],
        firsts: Mapping[str, Read],
        parameters: Mapping[str, Sequence[str]],
        make_id: Callable[[int], str],
        *,
        tags: Mapping[str, str] | None = None,
        guided: bool = False,
    ) -> None:
        """begins, firsts: see `ToolFormat`. parameters: the names of each offered tool's parameters, in order. make_id:
        a call's id from its index. tags: what stands in the text for those of the form's tags that are special tokens.
        guided: a grammar makes sure that calls are whole, so their arguments are given as they come, also those of a
        call that is cut short."""
        self.parameters = parameters
        self.cursor = Cursor()
        self.calls: list[ToolCall] = []
        self._firsts, self._make_id, self._tags, self._guided = firsts, make_id, tags or {}, guided
        self._begins = {self.tag(begin): read for begin, read in begins.items()}
        self._found = Found()
        self._kept = 0  # where the text begins that is neither text nor a call yet
        self._spaces = ""  # white space that is no text if a call follows
        self._has_text = self._after_call = False
        self._open: OpenCall | None = None
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str) -> Found:
        """What this text completes."""
        self.cursor.text += text
        return self._resume()

    def finish(self) -> Found:
        """What is left at the end of the reply."""
        self.cursor.ended = True
        return self._resume()

    # For the readers of forms

    def tag(self, text: str) -> str:
        """What stands in the text for this tag."""
        return self._tags.get(text, text)

    def literal(self, tag: str) -> Reading[None]:
        """Go past a tag."""
        yield from self.cursor.literal(self.tag(tag))

    def literal_or_end(self, tag: str) -> Reading[None]:
        """Go past a tag, which may be cut short, or left out, at the end of the text."""
        start = self.cursor.at
        try:
            yield from self.literal(tag)
        except NotACall:
            if not self.cursor.ended or not self.tag(tag).startswith(self.cursor.text[start:]):
                raise
            self.cursor.at = len(self.cursor.text)

    def goes_past(self, tag: str) -> Reading[bool]:
        """Go past a tag if it is next; whether it was."""
        start = self.cursor.at
        try:
            yield from self.literal(tag)
        except NotACall:
            self.cursor.at = start
            return False
        return True

    def parameters_of(self, name: str) -> Sequence[str]:
        """The parameters of an offered tool; NotACall for another name."""
        if name not in self.parameters:
            raise NotACall
        return self.parameters[name]

    def opens(self, name: str | None) -> None:
        """The cursor is before the arguments of a call of this tool."""
        if self._guided and name:
            at = self.cursor.at
            self._found.calls.append(ToolCallDelta(len(self.calls), self._make_id(len(self.calls)), name))
            self._open = OpenCall(name, at, at)

    def closes(self) -> None:
        """The cursor is behind the arguments of a call."""
        if self._open:
            self._open.end = self.cursor.at

    def add(self, *calls: tuple[str, str]) -> None:
        """Take these calls, names and arguments, which end where the cursor is."""
        for name, arguments in calls:
            index = len(self.calls)
            self._give()
            if not self._open:
                self._found.calls.append(ToolCallDelta(index, self._make_id(index), name))
                self._found.calls.append(ToolCallDelta(index, arguments=arguments))
            self._open = None
            self.calls.append(ToolCall(self._make_id(index), name, arguments))
        self._kept, self._spaces, self._after_call = self.cursor.at, "", True

    # Inside

    def _resume(self) -> Found:
        self._found = Found()
        next(self._reading, None)
        self._give()
        return self._found

    def _give(self) -> None:
        """Give the arguments of an open call that were read since the last time."""
        if call := self._open:
            end = self.cursor.at if call.end is None else call.end
            if end > call.given:
                self._found.calls.append(ToolCallDelta(len(self.calls), arguments=self.cursor.text[call.given : end]))
                call.given = end

    def _read(self) -> Reading[None]:
        cursor = self.cursor
        yield
        while read := (yield from self._next_call()):
            begin = self._kept
            try:
                yield from read(self)
            except NotACall:
                if self._open:  # the text ends in a call that is whole as far as it goes
                    end = self._open.end = cursor.at if self._open.end is None else self._open.end
                    call = self._open.name, cursor.text[self._open.start : end]
                    cursor.at = len(cursor.text)
                    self.add(call)
                else:
                    cursor.at = max(begin + 1, self._kept)
                    self._release(cursor.text[self._kept : cursor.at])

    def _next_call(self) -> Reading[Read | None]:
        """Go to where a call may begin, and release the text before it; None at the end of the text."""
        cursor = self.cursor
        cursor.text, cursor.at, self._kept = cursor.text[cursor.at :], 0, 0
        if self._firsts and not self._has_text:
            self._release((yield from cursor.spaces()))
            if read := self._firsts.get((yield from cursor.peek())):
                self._kept = cursor.at
                return read
        while True:
            found = scan(cursor.text[cursor.at :], tuple(self._begins))
            cursor.at += len(found.release)
            self._release(found.release)
            self._kept = cursor.at
            if found.stopped:
                return next(read for begin, read in self._begins.items() if cursor.text.startswith(begin, cursor.at))
            if cursor.ended:
                self._release(found.hold)
                if not self._after_call:
                    self._found.text += self._spaces
                return None
            yield

    def _release(self, text: str) -> None:
        """Give text, but for white space at its end."""
        text = self._spaces + MARK.sub("", text)
        if self.calls and not self._has_text:
            text = text.lstrip()
        visible = text.rstrip()
        if visible:
            self._found.text += visible
            self._has_text, self._after_call = True, False
        self._spaces = text[len(visible) :]


Read = Callable[[CallReader], Reading[None]]
