"""Sessions: a model's graphs opened in ONNX Runtime, run on the KV cache of the sequence that is attached.

`TargetSession` and `DraftSession` are what callers see. Which class stands behind them depends on the exported graphs
(dynamic_shapes.py, fixed_shapes.py) and on what the provider computes correctly (single_step.py).

ONNX Runtime's GroupQueryAttention does not refuse lengths beyond its buffers (it concatenates, or reads past the end),
so every step checks first that its rows fit the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import Failure, TooLong
from pard_onnx.models.manifest import Manifest
from pard_onnx.models.system_errors import is_out_of_memory, out_of_memory
from pard_onnx.runtime.providers.table import Provider, first_line

from .device_cache import new_cache
from .kv_cache import KvCache

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Features = NDArray[Any]  # hidden states of a target, in the type of its activations
BeforeStep = Callable[[], None]  # is called before each step; if it raises an error, the step is not run


def do_nothing() -> None:
    """The `BeforeStep` of a session that nobody may interrupt."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a target's step computed for the last tokens that it was fed.

    Both arrays may be the session's own buffers, which the next step overwrites.
    """

    logits: Floats  # [kept, vocabulary rows]
    # Hidden states of all tokens of the step, [tokens, width], in the type of the graph's activations; None where
    # nobody reads them
    features: Features | None = None

    def copy(self) -> Rows:
        """The same rows in memory of their own."""
        return Rows(self.logits.copy(), None if self.features is None else self.features.copy())


class Session(Protocol):
    """A session of a target or a draft, as callers see it. Not thread-safe: one step at a time."""

    manifest: Manifest
    provider: Provider

    @property
    def cache(self) -> KvCache:
        """The cache that is attached; a session begins with one of its own."""
        ...

    @property
    def length(self) -> int:
        """The number of tokens in the cache that is attached."""
        ...

    def new_cache(self) -> KvCache:
        """An empty cache for another sequence, in the memory that the provider needs."""
        ...

    def attach(self, cache: KvCache, before_step: BeforeStep = do_nothing) -> None:
        """Run the next steps on this cache, which `new_cache` made."""
        ...

    def detach(self) -> None:
        """Go back to the session's own cache, so that a sequence that has ended leaves no memory behind."""
        ...

    def rollback(self, length: int) -> None:
        """Forget the cache's rows from `length` on."""
        ...


AnySession = TypeVar("AnySession", bound=Session)


class TargetSession(Session, Protocol):
    """A target's session, as callers see it."""

    def step(self, ids: Sequence[int], keep: int, features: bool = False) -> Rows:
        """Append ids to the cache; the rows of the last `keep` of them.

        features: whether the hidden states of all ids are read, which the graph gives if the manifest has
        `feature_layers`.
        """
        ...


class DraftSession(Session, Protocol):
    """A draft's session, as callers see it."""

    def step(self, ids: Sequence[int], draft_length: int, features: Features | None = None) -> tuple[Ids, Floats]:
        """Append ids and draft_length - 1 masks to the cache.

        features: what is added to each id, [len(ids), columns] (see `feature_columns`); the masks take the last row.
        None: nothing is added, which is all that a draft without this input can do.

        Returns the draft ids and their probabilities, [draft_length] each, in buffers that the next step of this draft
        length overwrites. `length` counts the masks: the caller rolls them back.
        """
        ...

    def logits(self, ids: Sequence[int], draft_length: int) -> Floats:
        """As `step`, but returns the logits that the drafts are chosen from, [draft_length, columns]: of all ids, or of
        the ids in the manifest's `draft_vocabulary`."""
        ...


def require_kept(ids: Sequence[int], keep: int) -> None:
    """Raise ValueError if a target's step of these tokens does not have `keep` rows."""
    if not 0 < keep <= len(ids):
        raise ValueError(f"{keep} rows of a step of {len(ids)}")


def require_drafts(ids: Sequence[int], draft_length: int) -> None:
    """Raise ValueError if a draft's step has no tokens to read, or none to propose."""
    if draft_length < 1:
        raise ValueError(f"a draft of {draft_length} tokens")
    if not ids:
        raise ValueError("a step needs at least one token")


def require_features(ids: Sequence[int], features: Features) -> None:
    """Raise ValueError if a draft's step does not have one row of features for each token."""
    if len(features) != len(ids):
        raise ValueError(f"{len(features)} rows of features for a step of {len(ids)} tokens")


def require_feature_layers(manifest: Manifest) -> None:
    """Raise ValueError for a target whose graph gives no hidden states; whoever opens a pair checks that before."""
    if not manifest.feature_layers:
        raise ValueError("the target's graph gives no hidden states")


def feature_type(manifest: Manifest) -> np.dtype[Any]:
    """The type in which a graph gives hidden states, or reads them: that of its activations."""
    return np.dtype(manifest.recipe.floats)


def feature_columns(manifest: Manifest) -> int:
    """The columns of a draft's input of features: those of a token's feature, and one for a bias; 0 if it has none."""
    pard = manifest.spec.pard
    return pard.features.columns if pard and pard.features else 0


def mask_tokens(manifest: Manifest, draft_length: int) -> list[int]:
    """The masks that follow a draft's new tokens. There are K - 1: the first draft comes from the last real token."""
    pard = manifest.spec.pard
    assert pard is not None  # every draft has it
    return [pard.mask_id] * (draft_length - 1)


class BoundSession:
    """What all sessions that run graphs share: the attached cache is bound to every graph."""

    def __init__(self, manifest: Manifest, provider: Provider, bindings: Sequence[Any]) -> None:
        """bindings: the I/O bindings of the model's graphs, one or several."""
        self._bindings = bindings
        self._before_step: BeforeStep = do_nothing
        self.manifest = manifest
        self.provider = provider
        self.cache = self._own_cache = self.new_cache()
        self._bind_cache()

    def _bind_cache(self) -> None:
        for binding in self._bindings:
            self.cache.bind(binding)

    def new_cache(self) -> KvCache:
        """See `Session.new_cache`."""
        return new_cache(self.manifest, self.provider)

    def attach(self, cache: KvCache, before_step: BeforeStep = do_nothing) -> None:
        """See `Session.attach`. Costs a binding of every layer, unless the cache is attached already."""
        self._before_step = before_step
        if cache is not self.cache:
            self.cache = cache
            self._bind_cache()

    def detach(self) -> None:
        """See `Session.detach`."""
        self.attach(self._own_cache)

    @property
    def length(self) -> int:
        return self.cache.length

    def rollback(self, length: int) -> None:
        """See `Session.rollback`."""
        self.cache.rollback(length)

    def _end_of_step(self, rows: int) -> int:
        """The cache's length after a step that writes so many rows; TooLong if the cache has no room for them."""
        self._before_step()
        end = self.length + rows
        if end > self.cache.rows:
            raise TooLong(f"{self.length} tokens and {rows} more exceed the {self.cache.rows} rows of the KV cache")
        return end


def run_graph(path: Path, cache: KvCache, session: Any, binding: Any) -> None:
    """Run the graph at `path` once; Failure if ONNX Runtime fails in it."""
    try:
        cache.run(session, binding)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise Failure(f"{path}: ONNX Runtime failed in a step: {first_line(error)}") from error
