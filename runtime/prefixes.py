"""`PrefixCache`: the sequences of requests that have ended, from whose common beginnings new requests start."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from threading import RLock

from pard_onnx.models.checks import common_prefix
from pard_onnx.models.errors import BadArtifact, Failure

from .sequence import Sequence

# 512 MiB hold 3,800 tokens of Qwen2.5-7B with its draft, or 9,500 of Qwen2.5-1.5B: a few conversations with their
# system prompt, in a sixteenth of a small machine's 8 GB.
CACHE_BYTES = 512 << 20
MOST_KEPT = 64  # sequences: each has two buffers a layer, of which a process may have some ten thousands
COPY_SHARE = 16  # copying a row takes less than this part of the time in which it is computed, on every machine seen


@dataclass(frozen=True, slots=True)
class Match:
    """A kept sequence, and how many of its first rows a request can use."""

    sequence: Sequence
    length: int


class PrefixCache:
    """Ended sequences, least recently used first, within a number of bytes.

    A request takes a sequence and keeps it until it ends, so a sequence is used by one request at a time. It is the
    kept one itself where little of it is lost, otherwise a copy of the common rows.
    """

    def __init__(
        self,
        budget: int,
        chunk: int,
        new_sequence: Callable[[], Sequence],
        spare: Sequence | None = None,
        *,
        exact: bool = True,
    ) -> None:
        """budget: bytes of KV rows; 0 keeps nothing. chunk: tokens in a step of prefill. new_sequence: makes an empty
        one. spare: one whose memory exists in any case, which is used first.

        exact: whether prefill chunks and the steps of decoding leave the same rows, bit for bit. Where they do not, a
        request starts from whole prefill chunks alone, which it would compute in the same steps itself.
        """
        self.budget = budget
        self._chunk, self._new_sequence, self._exact = chunk, new_sequence, exact
        self._kept: list[Sequence] = []  # the most recently used last
        self._spare = self._lasting = spare
        self._lock = RLock()  # reentrant: garbage collection may end a request while its thread is in here

    @property
    def kept(self) -> tuple[Sequence, ...]:
        """The kept sequences, least recently used first."""
        return tuple(self._kept)

    @property
    def bytes(self) -> int:
        """The memory of the kept sequences' KV rows."""
        return sum(one.bytes for one in list(self._kept))

    def take(self, ids: Tokens[int]) -> Sequence:
        """A sequence of these tokens, with the rows of as many of the first ones as a kept sequence has."""
        ids = list(ids)
        match = self._claim(ids)
        if match is None:
            sequence = self._empty()
        elif self._goes_on(match):
            sequence = match.sequence
            sequence.truncate(match.length)
        else:
            try:
                sequence = match.sequence.fork(self._empty, match.length)
            finally:
                self._add(match.sequence)
        base = sequence.continue_with(ids)
        sequence.chunked = sequence.chunked // self._chunk * self._chunk
        if base == sequence.chunked:  # the loop computes whole chunks while more tokens than a chunk are left
            sequence.chunked = base + max(0, len(ids) - base - 1) // self._chunk * self._chunk
        return sequence

    def keep(self, sequence: Sequence, *, failed: bool = False) -> None:
        """A request has ended: its sequence is kept for others, or its memory is used again or freed.

        failed: nobody knows what its last step has written.
        """
        length = sequence.target.length
        sequence.chunked = min(sequence.chunked, length // self._chunk * self._chunk)
        if failed or not length or sequence.bytes > self.budget:  # for one too large no others are dropped
            self._retire(sequence)
            return
        self._add(sequence)

    def close(self) -> None:
        """Forget all sequences, those of `spare` too."""
        self._kept.clear()
        self._spare = self._lasting = None

    def _claim(self, ids: list[int]) -> Match | None:
        """The kept sequence with the longest usable prefix, which is not kept any more; None if none has one."""
        with self._lock:
            found = max((self._match(one, ids) for one in self._kept), key=length_of, default=None)
            if found is None or not found.length:
                return None
            self._kept = [one for one in self._kept if one is not found.sequence]
            return found

    def _match(self, one: Sequence, ids: list[int]) -> Match:
        """How many rows of a kept sequence the request can use. At least one row is left to compute."""
        most = min(one.target.length, len(ids) - 1)
        common = common_prefix(one.tokens[:most], ids[:most])
        if not self._exact:
            common = min(common, one.chunked) // self._chunk * self._chunk
        return Match(one, common)

    def _goes_on(self, match: Match) -> bool:
        """Whether the kept sequence itself is taken, so that its rows after the prefix are lost: where computing them
        again would take less time than copying the prefix, and where rows cannot be copied."""
        lost = match.sequence.target.length - match.length
        return not match.sequence.can_be_copied or lost * COPY_SHARE <= match.length

    def _add(self, sequence: Sequence) -> None:
        """Keep the sequence as the most recently used one, without those that it makes useless."""
        computed = sequence.tokens[: sequence.target.length]
        with self._lock:
            kept: list[Sequence] = []
            retired: list[Sequence] = []
            for one in self._kept:
                length = one.target.length
                covered = one.chunked <= sequence.chunked and one.tokens[:length] == computed[:length]
                (retired if covered else kept).append(one)
            kept.append(sequence)
            total = sum(one.bytes for one in kept)
            while kept and (total > self.budget or len(kept) > MOST_KEPT):
                retired.append(kept.pop(0))
                total -= retired[-1].bytes
            self._kept = kept
        for one in retired:
            self._retire(one)

    def _retire(self, sequence: Sequence) -> None:
        """Keep the memory of one sequence for the next request, and free the others'."""
        sequence.truncate(0)
        if sequence is self._lasting or self._spare is None:
            self._spare = sequence

    def _empty(self) -> Sequence:
        """A sequence without tokens. Where there is no memory for one, that of all kept sequences is freed first."""
        spare, self._spare = self._spare, None
        if spare is not None:
            return spare
        try:
            return self._new_sequence()
        except (BadArtifact, Failure):
            if not self._kept:
                raise
        self._kept.clear()
        return self._empty()


def length_of(match: Match) -> int:
    return match.length
