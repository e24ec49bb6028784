"""Sessions on graphs of the portable variant (docs/architecture.md): positions say where tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.providers.table import Provider
from pard_onnx.runtime.providers.threads import Threads

from .session import DraftSession, GraphSession, Ids, TargetSession


def masks(manifest: Manifest, draft_length: int) -> list[int]:
    """What follows a draft's new tokens: the first draft comes from the last of those."""
    pard = manifest.spec.pard
    assert pard is not None  # it is what makes a checkpoint a draft
    return [pard.mask_id] * (draft_length - 1)


class Positions(GraphSession):
    """A GraphSession whose graph takes `position_ids`."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._positions: Ids = np.arange(manifest.kv_rows)[None]

    def _place(self, width: int) -> None:
        super()._place(width)
        rows = self._positions[:, self.length : self.length + width]
        self._binding.bind_ortvalue_input("position_ids", self._value(rows))


class PortableTarget(Positions, TargetSession):
    """As TargetSession."""


class PortableDraft(Positions, DraftSession):
    """As DraftSession. The masks are ordinary tokens of the step."""

    def _draft(self, ids: Sequence[int], draft_length: int) -> None:
        tokens = [*ids, *masks(self.manifest, draft_length)]
        self._run(tokens, len(tokens), "logits_to_keep", draft_length)
