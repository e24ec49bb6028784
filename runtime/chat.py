"""`Chat`: a conversation that goes on in one KV cache from turn to turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, Unpack

from pard_onnx.models.errors import BadInput, Failure, TooLong

from . import snapshot
from .caches import Caches
from .messages import Messages, copied
from .options import Given, Options
from .prompt import known_ids
from .result import Result
from .stream import Run, Stream
from .text import Message

if TYPE_CHECKING:  # who makes chats
    from .pair import Pair

CUT = ("cancelled", "timeout")  # reasons that say nothing of the model


class Chat:
    """`messages` (role and content) may be edited between turns: from the first difference on, the prompt is computed
    anew. Rows that are kept come from steps of decoding, new ones from wider steps: with exact widths they are equal.

    A turn adds its two messages when its stream ends, cancelled or timed out with the text that is there. A turn that
    fails, is closed early, or is cut before it has any text leaves the conversation as it was.
    """

    def __init__(self, pair: Pair, messages: Iterable[Message], caches: Caches | None = None) -> None:
        """See `Pair.chat`. caches: that hold the beginning of the conversation, made by this pair."""
        self.messages: Messages = copied(messages)
        self._pair = pair
        self._caches: Caches | None = caches or pair.new_caches()
        self._lock = Lock()

    def send(self, text: str, **options: Unpack[Given]) -> Result:
        """The assistant's reply to the user's text; arguments and errors as of `stream`."""
        stream = self.stream(text, **options)
        with stream:
            for _ in stream:
                pass
        return stream.result

    def stream(self, text: str, **options: Unpack[Given]) -> Stream:
        """The reply to the user's text, a chunk a round; options as of `Pair.stream`.

        Raises BadInput (TooLong: for a conversation that fills the capacity) at once, Failure on the first chunk
        if another generation runs.
        """
        start = perf_counter()
        wanted = Options.of(options)
        if not isinstance(text, str) or not text:
            raise BadInput(f"a message is text of at least one character, not {text!r}")
        caches = self._open()
        before = copied(self.messages)
        question = {"role": "user", "content": text}
        encoded = self._pair.text.encode_chat([*before, question])
        ids = known_ids(encoded, self._pair.target.spec.vocabulary.size)
        if len(ids) >= self._pair.capacity:
            raise TooLong(
                f"the conversation would have {len(ids)} tokens, but the capacity is {self._pair.capacity} with at "
                "least one of them new; remove earlier messages, or export with a larger --context-length"
            )
        stream = self._pair.run(ids, wanted, start, caches)
        return stream.within(lambda run: self._turn(run, before, question))

    def _turn(self, run: Run, before: Messages, question: dict[str, Any]) -> Run:
        with self.busy():
            self._open()
            if self.messages != before:
                raise Failure("the conversation has changed since this stream was made; send the message again")
            result = yield from run
            if result.text or result.finish_reason not in CUT:
                self.messages += [question, {"role": "assistant", "content": result.text}]
            return result

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While a turn runs, or something else that no turn may disturb."""
        if not self._lock.acquire(blocking=False):
            raise Failure("this conversation is being answered; read that stream to its end, or close it")
        try:
            yield
        finally:
            self._lock.release()

    def _open(self) -> Caches:
        if self._caches is None:
            raise Failure("this conversation is closed; open another with pair.chat()")
        return self._caches

    def save(self, path: str | PathLike[str]) -> None:
        """Write messages, tokens and KV rows to one file, whole or not at all, for `Pair.restore`.

        Raises BadInput if the file cannot be written, or is there and is no saved conversation; Failure during a turn.
        """
        caches = self._open()
        with self.busy():
            snapshot.write(path, self._pair, self.messages, caches)

    def close(self) -> None:
        """Free the KV cache; a turn that runs goes on to its end first."""
        self._caches = None

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
