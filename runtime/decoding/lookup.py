"""Lookup drafting: if the last tokens occurred before, in the prompt or the output, propose what followed them there.

Such proposals cost no draft step and suit edits, quotes and retrieval (Saxena, "Prompt Lookup Decoding", 2023). They
are verified like any draft. Of several earlier occurrences, the one that agrees with the most tokens at the end of the
conversation is taken, and the latest of equally good ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAMS = (2, 1)  # occurrences of the last two tokens are compared; of the last one if the last two have none
OCCURRENCES = 8  # of an n-gram, only the latest ones are compared
LONGEST = 32  # tokens of a match; longer matches count as equally long


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of the conversation's last tokens."""

    ids: tuple[int, ...]  # the tokens that followed it
    length: int  # how many of the last tokens it agrees with, at most LONGEST


NO_MATCH = Match((), 0)


class Lookup:
    """An index of one conversation's n-grams, which grows with the conversation."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # by n-gram: the positions after its occurrences

    def find(self, committed: Sequence[int], k: int) -> Match:
        """The best earlier occurrence of the last tokens, with k tokens that followed it; NO_MATCH if there is none."""
        self._index(committed)
        size = len(committed)
        best, best_end = 0, 0
        for n in NGRAMS:
            for end in reversed(self._ends.get(tuple(committed[-n:]), ())):
                if end < size and (length := self._match_length(end)) > best:
                    best, best_end = length, end
            if best:
                return Match(self._following(best_end, k), best)
        return NO_MATCH

    def _following(self, first: int, k: int) -> tuple[int, ...]:
        """k tokens from position `first` on. After the conversation's last token they begin again at `first`: the text
        is taken to be periodic."""
        period = len(self._tokens) - first
        return tuple(self._tokens[first + i % period] for i in range(k))

    def _match_length(self, end: int) -> int:
        """How many tokens before position `end` are equal to those at the end of the conversation."""
        tokens, size, length = self._tokens, len(self._tokens), 0
        while length < min(end, LONGEST) and tokens[end - 1 - length] == tokens[size - 1 - length]:
            length += 1
        return length

    def _index(self, committed: Sequence[int]) -> None:
        """Add the new tokens to the index; build it anew if the conversation is another one."""
        known = len(self._tokens)
        if known > len(committed) or self._tokens != list(committed[:known]):
            self._tokens, self._ends, known = [], {}, 0
        for end in range(known + 1, len(committed) + 1):
            self._tokens.append(committed[end - 1])
            for n in NGRAMS:
                if end >= n:
                    ends = self._ends.setdefault(tuple(self._tokens[end - n :]), [])
                    ends.append(end)
                    del ends[:-OCCURRENCES]
