"""`Chat`: a conversation that goes on in one KV cache from turn to turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from threading import Lock
from time import perf_counter
from typing import Any, Unpack

from pard_onnx.models.checks import path_text
from pard_onnx.models.errors import BadInput, Failure, TooLong, shown

from . import snapshot
from .asynchronous import in_worker
from .engine import Engine
from .options import OptionArguments, Options
from .result import Result
from .sequence import Sequence
from .stream import Generation, Stream
from .text.control_tokens import TEXT, checked_handling
from .text.overflow import ERROR, Fitted, checked_overflow, fit, room_for_reply
from .text.prompt import Messages, copy_messages, known_ids
from .text.reply import reply_form, with_tools
from .text.template import CALLS, THINKING, Message, checked_arguments

INTERRUPTED = ("cancelled", "timeout")  # the finish reasons of a text that the model did not end
Said = str | Message | Iterable[Message]


class Chat:
    """A conversation with a model, whose KV cache is kept from turn to turn.

    `messages` may be edited between turns: objects with a role, and as content text, a list of text parts, or None.
    The next turn then computes the prompt anew from the first token that differs. KV rows that are kept come from
    decoding steps, and new rows come from the wider steps of prefill; with exact widths, both are equal.

    `template_arguments` are those of every turn; a turn's own are added to them. `special_tokens` and `overflow` are
    the options of each turn that has none of its own. `messages` stays whole where the model no longer reads all of it.

    A turn adds its messages when its stream ends: what was sent, and the answer, with its reasoning and its calls of
    tools where it has them. If the turn is cancelled or times out, the answer is what there is so far. A turn leaves
    the conversation as it was if it fails, if its stream is closed early, or if it is cancelled or times out before
    there is any answer.
    """

    def __init__(
        self,
        engine: Engine,
        messages: Iterable[Message],
        sequence: Sequence | None = None,
        template_arguments: Mapping[str, object] | None = None,
        special_tokens: str = TEXT,
        overflow: str = ERROR,
    ) -> None:
        """See `Pair.chat`. sequence: made by this engine, with the beginning of the conversation."""
        self.special_tokens = checked_handling(special_tokens)
        self.overflow = checked_overflow(overflow)
        self.template_arguments = checked_arguments(template_arguments)
        self.messages: Messages = copy_messages(messages)
        self._engine = engine
        self._sequence: Sequence | None = sequence or engine.new_sequence()
        self._lock = Lock()

    def send(self, message: Said, **options: Unpack[OptionArguments]) -> Result:
        """The assistant's reply; arguments and errors as of `stream`."""
        return self.stream(message, **options).read()

    async def asend(self, message: Said, **options: Unpack[OptionArguments]) -> Result:
        """As `send`, for asyncio: the event loop stays free. A task that is cancelled ends the turn before its next
        step, and leaves the conversation as it was."""
        stream = await in_worker(lambda: self.stream(message, **options))
        return await stream.aread()

    def stream(self, message: Said, **options: Unpack[OptionArguments]) -> Stream:
        """The reply, a chunk a round; options as of `Pair.stream`.

        message: the user's text, a message, or a list of messages, such as the results of tools:
        `{"role": "tool", "tool_call_id": call.id, "name": call.name, "content": ...}` for each call.

        Raises BadInput (TooLong: for a conversation that fills the capacity) at once; on the first chunk Failure if
        another turn of this conversation runs, Busy if too many generations run and wait (see `load`).
        """
        start = perf_counter()
        self._engine.process.require()
        own = {"special_tokens": self.special_tokens, "overflow": self.overflow}
        chosen = Options.from_keywords({**own, **options}, self._engine.model_sampling)
        if chosen.continue_final_message:
            raise BadInput(
                "continue_final_message is for Pair.generate and Pair.stream; a turn is a message of its own"
            )
        said = said_messages(message)
        sequence, text = self._open(), self._engine.text
        before = copy_messages(self.messages)
        arguments = checked_arguments(self.template_arguments) | dict(chosen.template_arguments)
        arguments = dict(with_tools(text, arguments, chosen.tool_use))
        fitted = self._fitted([*before, *said], arguments, chosen, start)
        if len(fitted.ids) >= self._engine.capacity:
            raise TooLong(
                f"the conversation would have {len(fitted.ids)} tokens, but the capacity is {self._engine.capacity} "
                f"with at least one of them new; remove earlier messages, or {self._engine.longer_context}, or give "
                'overflow="drop-oldest"'
            )
        form = reply_form(text, fitted.ids, chosen.tool_use, arguments)
        stream = self._engine.stream(sequence, fitted.ids, chosen, start, form=form).telling_dropped(fitted.dropped)
        return stream.within(lambda generation: self._turn(generation, before, said))

    def _fitted(self, messages: Messages, arguments: Mapping[str, object], options: Options, start: float) -> Fitted:
        """The ids of these messages, of which some may be left out."""
        engine = self._engine
        bounds = engine.bounds(options, start, "remove earlier messages")

        def encode(messages: Messages) -> list[int]:
            ids = engine.text.encode_chat(messages, arguments, options.special_tokens, bounds)
            return known_ids(ids, engine.text, engine.target_manifest.spec.vocabulary.size)

        room = room_for_reply(engine.capacity, options.max_new_tokens)
        return fit(messages, options.overflow, encode, engine.capacity, room, engine.longer_context)

    def _turn(self, generation: Generation, before: Messages, said: Messages) -> Generation:
        with self.busy():
            self._open()
            if self.messages != before:
                raise Failure("the conversation has changed since this stream was made; send the message again")
            result = yield from generation
            if result.text or result.tool_calls or result.finish_reason not in INTERRUPTED:
                self.messages += [*said, answer_message(result)]
            return result

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A context that keeps other turns out; Failure if a turn runs."""
        if not self._lock.acquire(blocking=False):
            raise Failure("this conversation is being answered; read that stream to its end, or close it")
        try:
            yield
        finally:
            self._lock.release()

    def _open(self) -> Sequence:
        self._engine.process.require()
        if self._sequence is None:
            raise Failure("this conversation is closed; open another with pair.chat()")
        return self._sequence

    def save(self, path: str | PathLike[str]) -> None:
        """Write messages, tokens and KV rows to one file for `Pair.restore`, completely or not at all.

        Raises BadInput if the file cannot be written, or exists and is not a saved conversation; Failure during a turn.
        """
        sequence = self._open()
        path = path_text("path", path)
        with self.busy():
            manifests = self._engine.target_manifest, self._engine.draft_manifest
            snapshot.write(path, sequence, self.messages, *manifests)

    def close(self) -> None:
        """Free the KV cache; that of a running turn when the turn ends. In a forked child it does nothing."""
        if self._engine.process.is_current:
            self._sequence = None

    def __enter__(self) -> Chat:
        self._engine.process.require()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def said_messages(message: object) -> Messages:
    """What a turn begins with: the user's text as a message, or messages as they are."""
    if isinstance(message, str) and message:
        return [{"role": "user", "content": message}]
    several = [message] if isinstance(message, Mapping) else message
    if isinstance(several, str | bytes | bytearray | memoryview) or not isinstance(several, Iterable):
        raise BadInput(f"a message is text of at least one character, not {shown(message)}; or give a list of messages")
    messages = copy_messages(several)
    if not messages:
        raise BadInput("a turn has at least one message; the list is empty")
    return messages


def answer_message(result: Result) -> dict[str, Any]:
    """The message of a reply, as it is given to the chat template in later turns."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text}
    if result.reasoning:
        message[THINKING[0]] = result.reasoning
    if result.tool_calls:
        message[CALLS] = [call.as_message() for call in result.tool_calls]
    return message
