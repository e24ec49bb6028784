"""`ResponseStore`: the latest responses of /v1/responses, so that a request may go on from one by its id."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
MOST_RESPONSES = 1000
MOST_BYTES = 64 << 20  # of JSON, in sum; conversations share messages, so that the memory is mostly less


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, and the conversation that it ends."""

    response: dict[str, Any]  # as it was answered
    messages: tuple[Message, ...]  # of the conversation, the response included, and its instructions left out
    size: int  # bytes of both as JSON


class ResponseStore:
    """Keeps responses in memory. Where there are too many, those leave that were not used for the longest time."""

    def __init__(self, most: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()  # by id, the latest use last
        self._items: dict[str, dict[str, Any]] = {}  # items of their outputs, by id
        self._size = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def size(self) -> int:
        """Bytes of all responses and conversations as JSON."""
        return self._size

    def add(self, stored: StoredResponse) -> None:
        self._stored[stored.response["id"]] = stored
        self._items.update((item["id"], item) for item in stored.response["output"])
        self._size += stored.size
        while len(self._stored) > self._most or self._size > self._most_bytes:
            self.remove(next(iter(self._stored)))

    def find(self, id_: str) -> StoredResponse | None:
        """The response with this id, which counts as used; None if it is not there any more."""
        if id_ in self._stored:
            self._stored.move_to_end(id_)
        return self._stored.get(id_)

    def item(self, id_: str) -> dict[str, Any] | None:
        """The output item with this id, of any response that is there."""
        return self._items.get(id_)

    def remove(self, id_: str) -> bool:
        """Forget a response; whether it was there."""
        stored = self._stored.pop(id_, None)
        if stored is None:
            return False
        self._size -= stored.size
        for item in stored.response["output"]:
            self._items.pop(item["id"], None)
        return True
