"""Sessions that run each token in a step of its own: slow, but correct where a provider computes wide steps wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import numpy as np

from .kv_cache import KvCache
from .session import (
    AnySession,
    BeforeStep,
    DraftSession,
    Features,
    Floats,
    Ids,
    Rows,
    TargetSession,
    do_nothing,
    mask_tokens,
    require_drafts,
    require_features,
    require_kept,
)


class SingleStep(Generic[AnySession]):
    """What the target's and the draft's session share: the cache belongs to an inner session, which runs the steps."""

    def __init__(self, session: AnySession) -> None:
        self._session = session
        self.manifest = session.manifest
        self.provider = session.provider

    @property
    def cache(self) -> KvCache:
        return self._session.cache

    @property
    def length(self) -> int:
        return self._session.length

    def new_cache(self) -> KvCache:
        return self._session.new_cache()

    def attach(self, cache: KvCache, before_step: BeforeStep = do_nothing) -> None:
        self._session.attach(cache, before_step)

    def detach(self) -> None:
        self._session.detach()

    def rollback(self, length: int) -> None:
        self._session.rollback(length)


class SingleStepTarget(SingleStep[TargetSession]):
    """A target's session."""

    def step(self, ids: Sequence[int], keep: int, features: bool = False) -> Rows:
        """See `TargetSession.step`."""
        require_kept(ids, keep)
        logits, read = [], []
        for index, token in enumerate(ids):
            rows = self._session.step([token], 1, features)
            if index >= len(ids) - keep:
                logits.append(rows.logits.copy())
            if rows.features is not None:
                read.append(rows.features.copy())
        return Rows(np.concatenate(logits), np.concatenate(read) if read else None)


class SingleStepDraft(SingleStep[DraftSession]):
    """A draft's session. The masks are fed as ordinary tokens."""

    def step(self, ids: Sequence[int], draft_length: int, features: Features | None = None) -> tuple[Ids, Floats]:
        """See `DraftSession.step`."""
        require_drafts(ids, draft_length)
        if features is not None:
            require_features(ids, features)
        drafts, probabilities = [], []
        for index, token in enumerate((*ids, *mask_tokens(self.manifest, draft_length))):
            row = None if features is None else features[min(index, len(features) - 1)][None]
            draft, probability = self._session.step([token], 1, row)
            drafts.append(draft.copy())
            probabilities.append(probability.copy())
        return np.concatenate(drafts[-draft_length:]), np.concatenate(probabilities[-draft_length:])

    def logits(self, ids: Sequence[int], draft_length: int) -> Floats:
        """See `DraftSession.logits`."""
        require_drafts(ids, draft_length)
        tokens = (*ids, *mask_tokens(self.manifest, draft_length))
        rows = [self._session.logits([token], 1) for token in tokens]
        return np.concatenate(rows[-draft_length:])
