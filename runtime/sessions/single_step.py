"""Sessions whose every token takes a step of its own: right, though slow, where a provider computes others wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.providers.table import Provider

from .kv_cache import KvCache
from .portable import masks
from .session import Floats, Ids, Session, Watch, nothing, require_kept
from .table import Draft, Target

Model = TypeVar("Model", bound=Session)


class OneByOne(Generic[Model]):
    """A session in front of another one, as far as a pair needs it."""

    def __init__(self, session: Model) -> None:
        self._session: Model = session
        self.manifest: Manifest = session.manifest
        self.provider: Provider = session.provider

    @property
    def cache(self) -> KvCache:
        return self._session.cache

    @property
    def length(self) -> int:
        return self._session.length

    def new_cache(self) -> KvCache:
        return self._session.new_cache()

    def attach(self, cache: KvCache) -> None:
        self._session.attach(cache)

    def watch(self, watch: Watch = nothing) -> None:
        self._session.watch(watch)

    def rollback(self, length: int) -> None:
        self._session.rollback(length)


class OneByOneTarget(OneByOne[Target]):
    def step(self, ids: Sequence[int], keep: int) -> Floats:
        """See TargetSession.step."""
        require_kept(ids, keep)
        rows = [self._session.step([token], 1).copy() for token in ids]
        return np.concatenate(rows[-keep:])


class OneByOneDraft(OneByOne[Draft]):
    def step(self, ids: Sequence[int], draft_length: int) -> tuple[Ids, Floats]:
        """See DraftSession.step; the masks are given, not appended."""
        drafts, chances = [], []
        for token in (*ids, *masks(self.manifest, draft_length)):
            found, chance = self._session.step([token], 1)
            drafts.append(found.copy())
            chances.append(chance.copy())
        return np.concatenate(drafts[-draft_length:]), np.concatenate(chances[-draft_length:])
