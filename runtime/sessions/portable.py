"""Sessions on graphs of the portable variant (docs/architecture.md): an input says at which positions tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pard_onnx.models.manifest import Manifest
from pard_onnx.runtime.providers.table import Provider
from pard_onnx.runtime.providers.threads import Threads

from .fused import FusedDraft, FusedTarget, GraphSession
from .session import Ids, mask_tokens


class Positions(GraphSession):
    """A GraphSession whose graph takes `position_ids`."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._positions: Ids = np.arange(manifest.kv_rows)[None]

    def _place(self, width: int) -> None:
        super()._place(width)
        rows = self._positions[:, self.length : self.length + width]
        self._binding.bind_ortvalue_input("position_ids", self._value(rows))


class PortableTarget(Positions, FusedTarget):
    """The model that decides."""


class PortableDraft(Positions, FusedDraft):
    """The model that proposes. The masks are ordinary tokens of the step."""

    def _draft(self, ids: Sequence[int], draft_length: int) -> None:
        tokens = [*ids, *mask_tokens(self.manifest, draft_length)]
        self._run(tokens, len(tokens), "logits_to_keep", draft_length)
