"""Reasoning: the thinking that some models write before their answer, apart from the answer; and its budget.

A model thinks between two tags. The thinking begins with the reply, or the chat template has written the first tag
already. Tags that come later are text: a reply may be about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .writer import MARK, scan

NEWLINES = "\r\n"


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model marks its thinking."""

    begin: str
    end: str
    cut: str  # what ends the thinking when its budget is used up; its last part is `end`

    @property
    def tags(self) -> tuple[str, str]:
        """Texts that may be special tokens of a tokenizer."""
        return self.begin, self.end


THINKING_FORMS = (
    Thinking("<think>", "</think>", "\n</think>"),  # Qwen3, DeepSeek-R1 and its distills, QwQ, SmolLM3
    Thinking("[THINK]", "[/THINK]", "[/THINK]"),  # Mistral
)


def thinking_of(template: str, tokens: Callable[[str], bool] = lambda _: False) -> Thinking | None:
    """How a model with this chat template thinks; None if it does not. tokens: whether the tokenizer has a token."""
    return next((one for one in THINKING_FORMS if one.end in template or (tokens(one.begin) and tokens(one.end))), None)


@dataclass(frozen=True, slots=True)
class Parted:
    """A piece of a reply."""

    reasoning: str
    text: str


class ThinkingReader:
    """Parts the text of one reply, which comes in pieces. Line ends around the thinking belong to neither part."""

    def __init__(self, begin: str, end: str, begun: bool) -> None:
        """begin, end: what stands in the text for the tags. begun: whether the prompt ends in the first tag."""
        self._begin, self._end = begin, end
        self._read: Callable[[str, bool], Parted] = self._inside if begun else self._before
        self._hold = ""  # text that is not given yet
        self._lines = ""  # line ends that are no part of the thinking if it ends here
        self._started = False  # whether the part has text

    @property
    def thinking(self) -> bool:
        """Whether the reply is inside of its thinking."""
        return self._read == self._inside

    def push(self, text: str) -> Parted:
        return self._read(self._hold + text, False)

    def finish(self) -> Parted:
        """What is left at the end of the reply."""
        return self._read(self._hold, True)

    def _before(self, text: str, ended: bool) -> Parted:
        visible = text.lstrip()
        if visible.startswith(self._begin):
            self._read = self._inside
            return self._inside(visible[len(self._begin) :], ended)
        if ended or not self._begin.startswith(visible):
            self._read, self._started, self._hold = self._after, True, ""
            return Parted("", text)
        self._hold = text
        return Parted("", "")

    def _inside(self, text: str, ended: bool) -> Parted:
        found = scan(text, (self._end,))
        reasoning = self._lines + MARK.sub("", found.release)
        if ended:
            reasoning += MARK.sub("", found.hold)
        if not self._started:
            reasoning = reasoning.lstrip(NEWLINES)
        given = reasoning.rstrip(NEWLINES)
        self._started = self._started or bool(given)
        self._lines, self._hold = reasoning[len(given) :], "" if ended else found.hold
        if not found.stopped:
            return Parted(given, "")
        self._read, self._started, self._hold = self._after, False, ""
        return Parted(given, self._after(text[len(found.release) + len(self._end) :], ended).text)

    def _after(self, text: str, _: bool) -> Parted:
        if not self._started:
            text = text.lstrip(NEWLINES)
            self._started = bool(text)
        return Parted("", text)


class ReasoningBudget:
    """A `RowEdit` that ends the thinking after so many tokens: the next ones are then those of the end tag.

    It looks at the tokens alone, so drafts that go on thinking fail their verification like any other wrong draft.
    """

    def __init__(
        self, budget: int, cut: Sequence[int], reader: ThinkingReader, push: Callable[[int], str], prompt_length: int
    ) -> None:
        """cut: the ids that end the thinking. reader: of the same reply, for this object alone. push: the text that
        each token of the reply completes, with what stands for tags. prompt_length: the tokens before the reply."""
        self._budget, self._cut = budget, tuple(cut)
        self._reader, self._push = reader, push
        self._seen = prompt_length
        self._thought: list[int] = []  # the tokens of the thinking so far
        self._done = False  # whether the thinking has ended, or the reply began without

    def edit(self, row: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `RowEdit`."""
        while not self._done and self._seen < len(tokens):
            self._see(tokens[self._seen])
            self._seen += 1
        if self._done or not self._reader.thinking or len(self._thought) < self._budget:
            return row
        wanted = self._cut[self._matched()]
        value = row[wanted]
        row.fill(-np.inf)
        row[wanted] = value if np.isfinite(value) else 0.0
        return row

    def _see(self, token: int) -> None:
        inside = self._reader.thinking
        text = self._reader.push(self._push(token)).text
        if self._reader.thinking:
            if inside:
                self._thought.append(token)
        else:
            self._done = inside or bool(text)

    def _matched(self) -> int:
        """How many tokens of the cut the thinking ends with."""
        longest = min(len(self._cut) - 1, len(self._thought))
        return next((size for size in range(longest, 0, -1) if self._thought[-size:] == list(self._cut[:size])), 0)
