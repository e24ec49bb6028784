"""Self-distillation: the replies of a data set written anew by the target, since a draft learns what its target says.

The replies are kept in a file of JSON lines, one a document. A run that was interrupted at any moment goes on after the
last whole line. The seed of a reply depends on its document and turn alone, so the file is the same however often the
run was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pard_onnx.models.checks import Progress, no_progress
from pard_onnx.models.errors import BadInput, TooLong

from .documents import Document, Message
from .encoding import sample_of
from .replies import ASSISTANT
from .samples import Counts, Sample

STAGE = "replies"
TURNS = 1000  # a document's seeds
PROMPT_TOKENS = 64  # of a plain text, which the target goes on from
NOTHING: dict[str, Any] = {"messages": [], "samples": []}  # the record of a document without a reply


@dataclass(frozen=True, slots=True)
class Reply:
    """What a target wrote after a prompt."""

    ids: Sequence[int]  # without the token that ended it
    text: str
    is_whole: bool  # False: it is as long as a reply may be, and goes on


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens that end what a target writes, where one is known: a model may end by several."""

    chat: int | None  # a reply
    text: int | None  # a text


Write = Callable[[Sequence[int], int], Reply]  # of a prompt's ids, by a seed; raises TooLong


class Prompts(Protocol):
    """A model's tokenizer and chat template, as it reads prompts."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, object] | None = None
    ) -> list[int]: ...


@dataclass(slots=True)
class Distiller:
    """Writes the replies to documents, and keeps them in a file."""

    text: Prompts
    write: Write
    file: Path
    seed: int
    ends: Ends
    arguments: Mapping[str, object] = field(default_factory=dict)

    def run(self, documents: Sequence[Document], progress: Progress = no_progress) -> None:
        """Write what the file does not have yet. Raises BadInput, naming a document's place, and OSError."""
        done = self._whole_lines()
        progress(STAGE, done, len(documents))
        with self.file.open("a", encoding="utf-8", newline="\n") as file:
            for number in range(done, len(documents)):
                try:
                    record = self._record(number, documents[number])
                except TooLong:
                    record = NOTHING  # it has no room for a reply
                except BadInput as error:
                    raise type(error)(f"{documents[number].place}: {error}") from error
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                progress(STAGE, number + 1, len(documents))

    def samples(self, longest: int, counts: Counts) -> Iterator[tuple[int, Sample]]:
        """The samples of the file, each with the number of its document, cut where they are too long."""
        with self.file.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                counts.documents += 1
                used = False
                for ids, spans in json.loads(line)["samples"]:
                    sample = sample_of(ids, spans, longest)
                    counts.cut += len(ids) > longest
                    if sample.is_useful:
                        used = True
                        yield number, sample
                counts.unused += not used

    def _whole_lines(self) -> int:
        """The number of lines in the file, after a last line that is not whole was removed."""
        if not self.file.exists():
            return 0
        with self.file.open("rb+") as file:
            count = end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                count, end = count + 1, end + len(line)
            file.truncate(end)
        return count

    def _record(self, number: int, document: Document) -> dict[str, Any]:
        if document.messages:
            return self._conversation(number, document)
        if not document.text.strip():
            return NOTHING
        prompt = self.text.encode(document.text[: 64 * PROMPT_TOKENS])[:PROMPT_TOKENS]
        reply = self.write(prompt, self._seed(number, 0))
        return {"text": reply.text, "samples": [_joined(prompt, reply, self.ends.text)]}

    def _conversation(self, number: int, document: Document) -> dict[str, Any]:
        """The conversation with the target's own replies: each is written after those before it."""
        arguments = {**self.arguments, **({"tools": list(document.tools)} if document.tools else {})}
        history: list[Mapping[str, Any]] = []
        samples: list[tuple[list[int], list[tuple[int, int]]]] = []
        asked = [*document.messages]
        if asked[-1].get("role") != ASSISTANT:
            asked.append({"role": ASSISTANT, "content": ""})
        for turn, message in enumerate(asked):
            # Calls stay, since the results that follow belong to them
            if message.get("role") != ASSISTANT or message.get("tool_calls") or not history:
                history.append(message)
                continue
            prompt = self.text.encode_chat(history, arguments)
            try:
                reply = self.write(prompt, self._seed(number, turn))
            except TooLong:
                break
            ids, spans = _joined(prompt, reply, self.ends.chat)
            if samples and prompt[: len(samples[-1][0])] == samples[-1][0]:
                spans = samples.pop()[1] + spans
            samples.append((ids, spans))
            history.append({"role": ASSISTANT, "content": reply.text})
            if not reply.is_whole:
                break
        return {"messages": history, "samples": samples}

    def _seed(self, number: int, turn: int) -> int:
        return self.seed + number * TURNS + turn


def first_question(document: Document) -> Sequence[Message]:
    """The messages before the first reply that the target is to write; empty where there are none."""
    messages = document.messages
    for place, message in enumerate(messages):
        if place and message.get("role") == ASSISTANT and not message.get("tool_calls"):
            return messages[:place]
    return () if messages and messages[-1].get("role") == ASSISTANT else messages


def _joined(prompt: Sequence[int], reply: Reply, end: int | None) -> tuple[list[int], list[tuple[int, int]]]:
    ids = [*prompt, *reply.ids, *([end] if reply.is_whole and end is not None else [])]
    return ids, [(len(prompt), len(ids))]
