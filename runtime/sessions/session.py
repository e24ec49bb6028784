"""An ONNX Runtime session on the KV cache of a conversation: buffers bound once, rolled back by numbers.

ONNX Runtime's GroupQueryAttention does not notice lengths beyond its buffers (it concatenates, or reads past the end),
so every call checks its bounds first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import Failure, TooLong
from pard_onnx.models.manifest import GRAPH, Manifest
from pard_onnx.runtime.providers.opening import open_graph
from pard_onnx.runtime.providers.table import Provider, onnxruntime
from pard_onnx.runtime.providers.threads import Threads

from .device_cache import new_cache
from .kv_cache import KvCache

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Watch = Callable[[], None]


def nothing() -> None:
    """Nobody watches."""


def require_kept(ids: Sequence[int], keep: int) -> None:
    """ValueError for a target's step that has not so many rows."""
    if not 0 < keep <= len(ids):
        raise ValueError(f"{keep} rows of a step of {len(ids)}")


def require_drafts(ids: Sequence[int], draft_length: int) -> None:
    """ValueError for a draft's step that has no tokens to go on from, or to propose."""
    if draft_length < 1:
        raise ValueError(f"a draft of {draft_length} tokens")
    if not ids:
        raise ValueError("a step needs at least one token")


class Session:
    """What all sessions share. `length` counts the tokens in the cache that is attached; not thread-safe."""

    def __init__(self, manifest: Manifest, provider: Provider, bindings: Sequence[Any]) -> None:
        """bindings: of the model's graphs, one or several; the cache is bound to each."""
        self._bindings = bindings
        self._watch: Watch = nothing
        self.manifest = manifest
        self.provider = provider
        self.cache = self.new_cache()
        self._bind_cache()

    def _bind_cache(self) -> None:
        for binding in self._bindings:
            self.cache.bind(binding)

    def new_cache(self) -> KvCache:
        """Memory for another conversation."""
        return new_cache(self.manifest, self.provider)

    def attach(self, cache: KvCache) -> None:
        """Go on in another conversation's cache; one made for this model."""
        if cache is not self.cache:
            self.cache = cache
            self._bind_cache()

    def watch(self, watch: Watch = nothing) -> None:
        """Call `watch` before every step; what it raises ends the step before it began."""
        self._watch = watch

    @property
    def length(self) -> int:
        return self.cache.length

    def rollback(self, length: int) -> None:
        """Forget the cache's rows from `length` on."""
        self.cache.rollback(length)

    def _begin(self, rows: int) -> int:
        """Before a step that writes so many rows of the cache: the length after it; TooLong where it has no room."""
        self._watch()
        end = self.length + rows
        if end > self.cache.rows:
            raise TooLong(f"{self.length} tokens and {rows} more exceed the {self.cache.rows} rows of the KV cache")
        return end


def run(path: Path, cache: KvCache, session: Any, binding: Any) -> None:
    """A call of the graph at `path`; Failure if ONNX Runtime fails in it."""
    try:
        cache.run(session, binding)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise Failure(f"{path}: ONNX Runtime failed in a step: {error}") from error


class GraphSession(Session):
    """One graph for steps of any width: model.onnx."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        self._value = onnxruntime().OrtValue.ortvalue_from_numpy
        self._path = folder / GRAPH
        self._session = open_graph(self._path, provider, threads)
        self._binding = self._session.io_binding()
        self._ids: Ids = np.zeros((1, manifest.kv_rows), np.int64)
        self._ones: Ids = np.ones((1, manifest.kv_rows), np.int64)
        self._count: Ids = np.zeros(1, np.int64)
        self._count_value = self._value(self._count)
        self._widths: dict[int, Any] = {}
        super().__init__(manifest, provider, [self._binding])

    def _run(self, ids: Sequence[int], written: int, count_name: str, count: int) -> None:
        """One call that writes the KV rows length .. length + written - 1."""
        width, end = len(ids), self._begin(written)
        self._ids[0, :width] = ids
        if width not in self._widths:
            self._widths[width] = self._value(self._ids[:, :width])
        self._count[0] = count
        # Bound again although the memory is the same: a provider off the CPU copies when binding.
        self._binding.bind_ortvalue_input("input_ids", self._widths[width])
        self._binding.bind_ortvalue_input(count_name, self._count_value)
        self._place(width)
        run(self._path, self.cache, self._session, self._binding)
        self.cache.length = end

    def _place(self, width: int) -> None:
        """Tell the graph where its tokens stand, in the way of its attention variant: by the mask's length."""
        self._binding.bind_ortvalue_input("attention_mask", self._value(self._ones[:, : self.length + width]))


class TargetSession(GraphSession):
    """The model that decides."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._logits: Floats = np.empty((0, manifest.spec.vocabulary.rows), np.float32)
        self._kept: dict[int, Any] = {}

    def step(self, ids: Sequence[int], keep: int) -> Floats:
        """Append ids to the cache; logits of the last `keep` of them, [keep, vocabulary rows].

        The array is the session's own buffer: the next step overwrites it.
        """
        require_kept(ids, keep)
        self._binding.bind_ortvalue_output("logits", self._output(keep))
        self._run(ids, len(ids), "logits_to_keep", keep)
        return self._logits[:keep]

    def _output(self, keep: int) -> Any:
        """The buffer's first `keep` rows as an OrtValue; grown to the widest step seen, then never again."""
        if keep > len(self._logits):
            self._logits = np.empty((keep, self._logits.shape[1]), np.float32)
            self._kept.clear()
        if keep not in self._kept:
            self._kept[keep] = self._value(self._logits[None, :keep])
        return self._kept[keep]


class DraftSession(GraphSession):
    """The model that proposes. Its `logits` output is not bound, so greedy decoding does not pay for it."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._outputs: dict[int, tuple[Ids, Floats, Any, Any]] = {}

    def step(self, ids: Sequence[int], draft_length: int) -> tuple[Ids, Floats]:
        """Append ids and the graph's own draft_length - 1 masks to the cache.

        Returns the draft ids and their probabilities, [draft_length] each, in buffers that the next step
        of this draft length overwrites. `length` counts the masks: who calls rolls them back.
        """
        require_drafts(ids, draft_length)
        drafts, probabilities, ids_value, probabilities_value = self._output(draft_length)
        self._binding.bind_ortvalue_output("draft_ids", ids_value)
        self._binding.bind_ortvalue_output("draft_probabilities", probabilities_value)
        self._draft(ids, draft_length)
        return drafts[0], probabilities[0]

    def logits(self, ids: Sequence[int], draft_length: int) -> Floats:
        """As `step`; what the drafts were chosen from, [draft_length, columns]: of all ids, or of those of the
        manifest's `draft_vocabulary`."""
        found = np.empty((1, draft_length, self.manifest.columns), np.float32)
        self._binding.bind_ortvalue_output("logits", self._value(found))
        self.step(ids, draft_length)
        self._binding.clear_binding_outputs()
        self.cache.bind(self._binding)
        rows: Floats = found[0]
        return rows

    def _draft(self, ids: Sequence[int], draft_length: int) -> None:
        self._run(ids, len(ids) + draft_length - 1, "draft_length", draft_length)

    def _output(self, draft_length: int) -> tuple[Ids, Floats, Any, Any]:
        if draft_length not in self._outputs:
            drafts = np.empty((1, draft_length), np.int64)
            probabilities = np.empty((1, draft_length), np.float32)
            self._outputs[draft_length] = (drafts, probabilities, self._value(drafts), self._value(probabilities))
        return self._outputs[draft_length]
