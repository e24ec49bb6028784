"""`PairScoring`: `Pair.score`, the log probabilities of texts that are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, overload

from .engine import Engine
from .sampling.logprobs import checked_top
from .scoring import Passage, Score
from .text.control_tokens import TEXT
from .text.prompt import Continuation, OneContinuation, OnePrompt, Prompt, encode_continued, naming, paired


class PairScoring(ABC):
    """The part of a pair that scores. It needs the engine alone."""

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The models and their generations."""

    @overload
    def score(
        self,
        prompt: Prompt,
        continuation: Continuation,
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> Score: ...

    @overload
    def score(
        self,
        prompt: Prompt | list[OnePrompt] | tuple[OnePrompt, ...],
        continuation: list[OneContinuation] | tuple[OneContinuation, ...],
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> list[Score]: ...

    @overload
    def score(
        self,
        prompt: list[OnePrompt] | tuple[OnePrompt, ...],
        continuation: Continuation,
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> list[Score]: ...

    def score(
        self,
        prompt: Any,
        continuation: Any,
        *,
        logprobs: int = 0,
        chat: bool = False,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
    ) -> Score | list[Score]:
        """How likely the target is to write the continuation (text or token ids) after the prompt.

        The texts are encoded together: a token across their border, such as a space and the word after it, belongs to
        the continuation. The continuation of messages, and with `chat` of a text, is the beginning of the answer.

        Either may be a list of several: of as many prompts as continuations, of continuations of one prompt, or of
        prompts before one continuation. The result is then a list. What consecutive ones have in common is computed
        once.

        logprobs: the number of most likely tokens to name for each place, 0 to 20; chat, template_arguments,
        special_tokens: of the prompt, see `Options`.
        Raises BadInput (TooLong: for more tokens than the capacity), which names the index in a list, before anything
        is computed; Busy if as many generations run and wait as the pair was loaded for.
        """
        top = checked_top("logprobs", logprobs) or 0
        keywords = {"chat": chat, "template_arguments": template_arguments, "special_tokens": special_tokens}
        pairs, several = paired(prompt, continuation)
        if not several:
            return self.engine.score(self.engine.new_sequence(), self._passage(*pairs[0], keywords), top)
        passages: list[Passage] = []
        for number, (one, other) in enumerate(pairs):
            with naming("pair", number):
                passages.append(self._passage(one, other, keywords))
        scores: list[Score] = []
        sequence = self.engine.new_sequence()
        for number, passage in enumerate(passages):
            with naming("pair", number):
                scores.append(self.engine.score(sequence, passage, top))
        return scores

    def _passage(self, prompt: Any, continuation: Any, keywords: dict[str, Any]) -> Passage:
        size = self.engine.target_manifest.spec.vocabulary.size
        ids, first = encode_continued(prompt, continuation, self.engine.text, size, **keywords)
        passage = Passage(tuple(ids), first)
        passage.require_room(self.engine.capacity, self.engine.longer_context)
        return passage
