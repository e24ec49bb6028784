"""Text as tokens are generated: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from pard_onnx.models.checks import ReadOnly, listed, true_or_false
from pard_onnx.models.errors import BadInput, shown

StopWhen = Callable[[str, Sequence[int]], bool]  # of the text and the tokens so far: whether the text ends here
UNDECODED = "\ufffd"  # the replacement character, as which tokenizers decode an unfinished character
MOST_UNDECODED = 3  # replacement characters that the beginning of one character can decode to (byte fallback)
MOST_STOPS = 1 << 10  # strings that end a text
CONTEXT = 8  # tokens before a new one that its decoding may depend on
WINDOW = 16  # the most tokens that are decoded at once


class TokenDecoder(Protocol):
    """What `Detokenizer` needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Decodes tokens one by one, and returns whole characters only.

    A window of recent tokens is decoded together, because decoders treat the space of a first token differently, and
    a character may consist of several tokens. The window is shortened before it grows long, so a token costs O(1).
    """

    def __init__(self, decoder: TokenDecoder, prompt: Sequence[int]) -> None:
        self._decoder = decoder
        self._ids = list(prompt[-CONTEXT:])
        start = decoder.decode(self._ids)
        self._released = len(start) - unfinished(start)  # characters of the window's text that were returned already

    def push(self, token: int) -> str:
        """The text that this token completes; often empty within a character."""
        self._ids.append(token)
        text = self._decoder.decode(self._ids)
        held = unfinished(text)
        delta = text[self._released : len(text) - held]
        self._released = max(self._released, len(text) - held)
        if len(self._ids) == WINDOW:
            self._ids = self._ids[-CONTEXT:]
            self._released = max(len(self._decoder.decode(self._ids)) - held, 0)
        return delta

    def finish(self) -> str:
        """The text that was held back: the replacement characters of a character that was not completed."""
        rest = self.held()
        self._released += len(rest)
        return rest

    def held(self) -> str:
        """The text that is held back at present."""
        return self._decoder.decode(self._ids)[self._released :]


def unfinished(text: str) -> int:
    """The number of characters at the end of the text that the next token may change."""
    held = 0
    while held < min(MOST_UNDECODED, len(text)) and text[-1 - held] == UNDECODED:
        held += 1
    return held


@dataclass(frozen=True, slots=True)
class Scan:
    """A text that was searched for stop strings."""

    release: str  # the text that belongs to the output
    hold: str  # the end of the text, which may be the beginning of a stop string
    stopped: bool  # whether the text had a stop string
    stop: str | None = None  # that one


def scan(text: str, stops: Sequence[str]) -> Scan:
    """Cut the text before the first stop string in it; hold back the longest end that may become a stop string."""
    found = [(at, len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        at, _, stop = min(found)
        return Scan(text[:at], "", True, stop)
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return Scan(text[:-size], text[-size:], False)
    return Scan(text, "", False)


# Surrogates, which decoded text cannot have: of special tokens in stop strings, of tags, and of all others
FIRST_MARK, FIRST_TAG, OTHER_MARK = 0xD800, 0xDC00, "\udfff"
MARK = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Stops:
    """The stop strings of a generation, and the special tokens that part its text.

    Special tokens do not appear in text. Where a stop string has one, texts are searched in a marked form, in which
    each special token is one character, a mark. The marks of tags stay in the text for those who read it.
    """

    texts: tuple[str, ...] = ()  # all stop strings, for what is text only
    marked: tuple[str, ...] = ()  # those that have special tokens, in the marked form
    # Of all special tokens, by id; those of tags alone if `marked` is empty
    marks: Mapping[int, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)  # the marks of special tokens that stay, by their texts
    named: tuple[str, ...] = ()  # those of `marked`, as they were given

    def scan(self, text: str) -> Scan:
        """See `scan`; the text may have marks, of which those of tags alone are released."""
        if not self.texts:
            return Scan(text, "", False)
        if not self.marks:
            return scan(text, self.texts)
        places = [at for at, character in enumerate(text) if not MARK.match(character)]
        plain, marked = scan(MARK.sub("", text), self.texts), scan(text, self.marked)
        kept = len(plain.release)
        end = places[kept] if kept < len(places) else len(text)
        stop = plain.stop
        if marked.stop is not None and (stop is None or len(marked.release) < end):
            end, stop = len(marked.release), self.named[self.marked.index(marked.stop)]
        if stop is None:
            end = min(end, len(marked.release))
            return Scan(self.released(text[:end]), text[end:], False)
        return Scan(self.released(text[:end]), "", True, stop)

    def released(self, text: str) -> str:
        """The text without marks but those of tags."""
        if not self.tags:
            return MARK.sub("", text)
        kept = set(self.tags.values())
        return MARK.sub(lambda found: found[0] if found[0] in kept else "", text)


def stop_strings(stop: str | Sequence[str], special: Mapping[str, int], tags: Iterable[str] = ()) -> Stops:
    """The user's `stop`, one string or several. special: the ids of special tokens by their texts. tags: texts that
    part a reply, whose marks stay in the text where they are special tokens."""
    texts = checked_stops(stop)
    tag_marks = {tag: chr(FIRST_TAG + number) for number, tag in enumerate(tag for tag in tags if tag in special)}
    longest_first = sorted(filter(None, special), key=len, reverse=True) if texts else []
    if not longest_first:
        return Stops(texts, (), {special[tag]: mark for tag, mark in tag_marks.items()}, tag_marks)
    token = re.compile("|".join(map(re.escape, longest_first)))
    named = dict.fromkeys(found for one in texts for found in token.findall(one))
    mark_of = {found: chr(FIRST_MARK + number) for number, found in enumerate(named)} | tag_marks
    with_tokens = tuple(one for one in texts if token.search(one))
    marked = tuple(token.sub(lambda found: mark_of[found[0]], one) for one in with_tokens)
    shown = {id_: mark_of.get(one, OTHER_MARK) for one, id_ in special.items()} if marked else {}
    marks = shown | {special[tag]: mark for tag, mark in tag_marks.items()}
    return Stops(texts, marked, marks, tag_marks, with_tokens)


def checked_stops(stop: object) -> tuple[str, ...]:
    """The user's `stop`, one string or several; BadInput for what is no text, or empty."""
    several = isinstance(stop, Iterable) and not isinstance(stop, str | bytes | bytearray | Mapping)
    found = tuple(listed(stop, "stop", MOST_STOPS)) if several else (stop,)
    for one in found:
        if not isinstance(one, str) or not one:
            raise BadInput(f"a stop string must be text of at least one character, not {shown(one)}")
    return found


class TextReader(Protocol):
    """What `Writer` asks of who parts the text of a reply."""

    @property
    def ended(self) -> bool:
        """Whether the reply ends here."""
        ...

    def push(self, text: str) -> str:
        """The answer's text in this piece of text."""
        ...

    def finish(self) -> str:
        """The answer's text that was held back."""
        ...


AnyReader = TypeVar("AnyReader", bound=TextReader)


class Writer(Generic[AnyReader]):
    """The output of a generation: decodes its tokens, up to the first stop string, or the token that the user's
    `stop_when` ends the text with."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Stops,
        reply: AnyReader | None = None,
        stop_when: StopWhen | None = None,
    ) -> None:
        """reply: parts the text, what it gives is the output; None: all of the text is."""
        self._detokenizer = detokenizer
        self._stops = stops
        self.reply = reply
        self._stop_when = stop_when
        self._hold = ""
        self._text = ""  # so far, where `stop_when` reads it
        self.ended = False  # whether `stop_when` has ended the text
        self.stopped = False  # whether a stop string was completed, or the reply has ended
        self.stop: str | None = None  # the stop string that was completed
        self.tokens: list[int] = []
        self.parts: list[str] = []

    def write(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token, up to the token that completes a stop string."""
        pieces: list[str] = []
        for token in tokens:
            self.tokens.append(token)
            text = self._detokenizer.push(token)
            if mark := self._stops.marks.get(token):
                text += self._held_before(text + mark) + mark
            pieces.append(self._release(text))
            if self.stopped or (self._stop_when and self._ends(self._stop_when, pieces[-1])):
                break
        self.parts += pieces
        return pieces

    def finish(self, end: int | None = None) -> str:
        """The text that was held back; empty if a stop string was completed.

        end: the EOS token that ended the generation, which completes a stop string that ends in it.
        """
        rest = ""
        if not self.stopped:
            mark = "" if end is None or self.ended else self._stops.marks.get(end, "")
            rest = self._release(self._detokenizer.finish() + mark)
            hold = self._stops.released(self._hold)
            rest += self.reply.push(hold) if self.reply else hold
            self._hold = ""
        if self.reply:
            rest += self.reply.finish()
        self.parts.append(rest)
        return rest

    def _ends(self, stop_when: StopWhen, piece: str) -> bool:
        """Ask the user's function, with the text that this piece was added to. BadInput if it does not say."""
        self._text += piece
        self.ended = true_or_false("what stop_when returns", stop_when(self._text, ReadOnly(self.tokens)))
        return self.ended

    def _held_before(self, text: str) -> str:
        """The beginning of a character that a special token ends, if the token is a tag or the text stops there."""
        held = self._detokenizer.held()
        if held and text[-1] in self._stops.tags.values():
            return self._detokenizer.finish()
        return held if held and self._stops.scan(self._hold + text[:-1] + held + text[-1]).stopped else ""

    def _release(self, text: str) -> str:
        result = self._stops.scan(self._hold + text)
        self._hold, self.stopped, self.stop = result.hold, result.stopped, result.stop
        if self.reply is None:
            return result.release
        answer = self.reply.push(result.release)
        self.stopped = self.stopped or self.reply.ended
        return answer
