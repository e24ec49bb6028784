"""Sessions on graphs whose attention is one fused operator: one graph for steps of any width, buffers bound once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pard_onnx.models.manifest import GRAPH, Manifest
from pard_onnx.runtime.providers.opening import open_graph
from pard_onnx.runtime.providers.table import Provider, onnxruntime
from pard_onnx.runtime.providers.threads import Threads

from .session import BoundSession, Floats, Ids, Rows, require_drafts, require_kept, run_graph


class GraphSession(BoundSession):
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
        width, end = len(ids), self._end_of_step(written)
        self._ids[0, :width] = ids
        if width not in self._widths:
            self._widths[width] = self._value(self._ids[:, :width])
        self._count[0] = count
        # Bound again although the memory is the same: a provider off the CPU copies when binding.
        self._binding.bind_ortvalue_input("input_ids", self._widths[width])
        self._binding.bind_ortvalue_input(count_name, self._count_value)
        self._place(width)
        run_graph(self._path, self.cache, self._session, self._binding)
        self.cache.length = end

    def _place(self, width: int) -> None:
        """Tell the graph where its tokens stand, in the way of its attention variant: by the mask's length."""
        self._binding.bind_ortvalue_input("attention_mask", self._value(self._ones[:, : self.length + width]))


class FusedTarget(GraphSession):
    """The model that decides."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._logits: Floats = np.empty((0, manifest.spec.vocabulary.rows), np.float32)
        self._kept: dict[int, Any] = {}

    def step(self, ids: Sequence[int], keep: int) -> Rows:
        """See `TargetSession.step`."""
        require_kept(ids, keep)
        self._binding.bind_ortvalue_output("logits", self._output(keep))
        self._run(ids, len(ids), "logits_to_keep", keep)
        return Rows(self._logits[:keep])

    def _output(self, keep: int) -> Any:
        """The buffer's first `keep` rows as an OrtValue; grown to the widest step seen, then never again."""
        if keep > len(self._logits):
            self._logits = np.empty((keep, self._logits.shape[1]), np.float32)
            self._kept.clear()
        if keep not in self._kept:
            self._kept[keep] = self._value(self._logits[None, :keep])
        return self._kept[keep]


class FusedDraft(GraphSession):
    """The model that proposes. Its `logits` output is not bound, so greedy decoding does not pay for it."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._outputs: dict[int, tuple[Ids, Floats, Any, Any]] = {}

    def step(self, ids: Sequence[int], draft_length: int) -> tuple[Ids, Floats]:
        """See `DraftSession.step`. The graph appends the masks itself."""
        require_drafts(ids, draft_length)
        drafts, probabilities, ids_value, probabilities_value = self._output(draft_length)
        self._binding.bind_ortvalue_output("draft_ids", ids_value)
        self._binding.bind_ortvalue_output("draft_probabilities", probabilities_value)
        self._draft(ids, draft_length)
        return drafts[0], probabilities[0]

    def logits(self, ids: Sequence[int], draft_length: int) -> Floats:
        """See `DraftSession.logits`."""
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
