"""Lookup drafting: what followed the last tokens when they occurred before, in the prompt or the output.

Free proposals for edits, quotes and retrieval (Saxena, "Prompt Lookup Decoding", 2023), checked in the same verify
step as any draft. The longest earlier occurrence of the present suffix wins, the latest of equally long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAMS = (2, 1)  # tokens that must match before an occurrence is looked at; one where two have none
OCCURRENCES = 8  # of one n-gram, the latest are compared
LONGEST = 32  # matches beyond are not told apart


@dataclass(frozen=True, slots=True)
class Match:
    """ids: what followed; length: tokens of the suffix that matched, at most LONGEST."""

    ids: tuple[int, ...]
    length: int


NO_MATCH = Match((), 0)


class Lookup:
    """An index of n-grams that grows with the conversation."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram to the places behind it

    def find(self, committed: Sequence[int], k: int) -> Match:
        """Up to k tokens that followed the longest suffix of `committed` seen before."""
        self._index(committed)
        size = len(committed)
        best, at = 0, 0
        for n in NGRAMS:
            for end in reversed(self._ends.get(tuple(committed[-n:]), ())):
                if end < size and (length := self._matching(end)) > best:
                    best, at = length, end
            if best:
                return Match(self._following(at, k), best)
        return NO_MATCH

    def _following(self, at: int, k: int) -> tuple[int, ...]:
        """k tokens from a place on; where the conversation ends they go on with the period that was found."""
        period = len(self._tokens) - at
        return tuple(self._tokens[at + i % period] for i in range(k))

    def _matching(self, end: int) -> int:
        """How many tokens before `end` are those at the conversation's end."""
        tokens, size, length = self._tokens, len(self._tokens), 0
        while length < min(end, LONGEST) and tokens[end - 1 - length] == tokens[size - 1 - length]:
            length += 1
        return length

    def _index(self, committed: Sequence[int]) -> None:
        """Take in the tokens that are new; from the start where the conversation is another one."""
        known = len(self._tokens)
        if known > len(committed) or self._tokens != list(committed[:known]):
            self._tokens, self._ends, known = [], {}, 0
        for end in range(known + 1, len(committed) + 1):
            self._tokens.append(committed[end - 1])
            for n in NGRAMS:
                if end >= n:
                    places = self._ends.setdefault(tuple(self._tokens[end - n :]), [])
                    places.append(end)
                    del places[:-OCCURRENCES]
