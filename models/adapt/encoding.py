"""`Encoder`: documents to samples, by the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pard_onnx.models.errors import BadInput

from .documents import Document
from .replies import MarkedText, marked_texts
from .samples import Counts, Sample

Offsets = Sequence[tuple[int, int]]


class ModelText(Protocol):
    """A model's tokenizer and chat template."""

    def offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], Offsets]:
        """The ids of a text, and the characters that each of them stands for."""
        ...

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, object] | None = None) -> str:
        """The text that the chat template writes; BadInput where it refuses the messages."""
        ...


@dataclass(slots=True)
class Encoder:
    """Makes samples of documents, and counts."""

    text: ModelText
    mask_id: int
    rows: int  # ids that the draft has rows for
    eos_ids: Sequence[int]
    longest: int  # tokens of a sample
    arguments: Mapping[str, object] = field(default_factory=dict)  # further variables of the chat template
    counts: Counts = field(default_factory=Counts)

    def samples(self, documents: Iterable[Document]) -> Iterator[tuple[int, Sample]]:
        """The samples of the documents, each with the number of its document. Raises BadInput, naming the place."""
        for number, document in enumerate(documents):
            self.counts.documents += 1
            found = [sample for sample in self.samples_of(document) if sample.is_useful]
            self.counts.unused += not found
            yield from ((number, sample) for sample in found)

    def samples_of(self, document: Document) -> Iterator[Sample]:
        """A conversation gives a sample for each text that the template writes of it, which is cut where it is too
        long; a text gives as many as it is long."""
        try:
            if document.messages:
                arguments = {**self.arguments, **({"tools": list(document.tools)} if document.tools else {})}
                found = marked_texts(
                    document.messages,
                    lambda messages, prompt: self.text.render(messages, {**arguments, "add_generation_prompt": prompt}),
                )
                yield from (self._cut(self._conversation(one)) for one in found)
            else:
                yield from self._windows(document.text)
        except BadInput as error:
            raise type(error)(f"{document.place}: {error}") from error

    def _conversation(self, marked: MarkedText) -> Sample:
        ids, offsets = self.text.offsets(marked.text, add_special_tokens=False)
        replies = np.zeros(len(ids), np.bool_)
        for begin, end in marked.replies:
            within = [place for place, (first, last) in enumerate(offsets) if first < end and last > begin]
            if not marked.by_tags:
                # A reply ends with EOS, and no model writes what the template writes after it
                ends = [place for place in within if ids[place] in self.eos_ids]
                within = [place for place in within if place <= ends[-1]] if ends else within
            replies[within] = True
        return Sample(self._checked(ids), replies)

    def _windows(self, text: str) -> Iterator[Sample]:
        ids = self._checked(self.text.offsets(text, add_special_tokens=True)[0])
        for begin in range(0, len(ids), self.longest):
            window = ids[begin : begin + self.longest]
            yield Sample(window, np.ones(len(window), np.bool_))

    def _cut(self, sample: Sample) -> Sample:
        self.counts.cut += len(sample.ids) > self.longest
        return Sample(sample.ids[: self.longest], sample.replies[: self.longest])

    def _checked(self, ids: Sequence[int]) -> Any:
        out = np.array(ids, np.int64)
        if len(out) and out.max() >= self.rows:
            raise BadInput(
                f"it has the token {out.max()}, and the draft has ids 0 to {self.rows - 1}; leave that text out"
            )
        if (out == self.mask_id).any():
            raise BadInput(f"it has the token {self.mask_id}, which is the mask; leave it out or name another mask")
        return out


def sample_of(ids: Sequence[int], replies: Sequence[tuple[int, int]], longest: int) -> Sample:
    """The sample of ids whose replies are known: of each its first token, and the one after its last."""
    within = np.zeros(len(ids), np.bool_)
    for begin, end in replies:
        within[begin:end] = True
    return Sample(np.array(ids, np.int64)[:longest], within[:longest])
