"""Sessions on graphs of dynamic shapes: one graph, model.onnx, runs steps of any width, on buffers that are bound once.

There are two classes for each role, since the two attention variants have different inputs (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pard_onnx.models.manifest import GRAPH, Manifest
from pard_onnx.runtime.providers.fit import FEATURES_INPUT, FEATURES_KEPT, FEATURES_OUTPUT
from pard_onnx.runtime.providers.opening import open_graph
from pard_onnx.runtime.providers.table import Provider, onnxruntime
from pard_onnx.runtime.providers.threads import Threads

from .session import (
    BoundSession,
    Features,
    Floats,
    Ids,
    Rows,
    feature_columns,
    feature_type,
    mask_tokens,
    require_drafts,
    require_feature_layers,
    require_features,
    require_kept,
    run_graph,
)

ALL_ROWS, AS_MANY_AS_LOGITS = 0, -1  # values of the input `hidden_states_to_keep`


class GraphSession(BoundSession):
    """What all sessions on model.onnx share."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        self._value = onnxruntime().OrtValue.ortvalue_from_numpy
        self._path = folder / GRAPH
        self._session = open_graph(self._path, manifest, provider, threads)
        self._binding = self._session.io_binding()
        self._ids: Ids = np.zeros((1, manifest.kv_rows), np.int64)
        self._ones: Ids = np.ones((1, manifest.kv_rows), np.int64)
        self._count: Ids = np.zeros(1, np.int64)
        self._count_value = self._value(self._count)
        self._widths: dict[int, Any] = {}
        super().__init__(manifest, provider, [self._binding])

    def _run(self, ids: Sequence[int], written: int, count_name: str, count: int) -> None:
        """Run the graph once, for these tokens.

        written: the number of KV rows that the step writes. count_name, count: the input that says how many outputs are
        needed, and its value.
        """
        width, end = len(ids), self._end_of_step(written)
        self._ids[0, :width] = ids
        if width not in self._widths:
            self._widths[width] = self._value(self._ids[:, :width])
        self._count[0] = count
        # Bound again although the memory is the same, since a provider other than the CPU copies when binding.
        self._binding.bind_ortvalue_input("input_ids", self._widths[width])
        self._binding.bind_ortvalue_input(count_name, self._count_value)
        self._bind_positions(width)
        run_graph(self._path, self.cache, self._session, self._binding)
        self.cache.length = end

    def _bind_positions(self, width: int) -> None:
        """Bind the inputs that give the tokens their positions: with fused attention, the length of the mask does."""
        self._binding.bind_ortvalue_input("attention_mask", self._value(self._ones[:, : self.length + width]))


class FusedTarget(GraphSession):
    """A target's session, for attention in one fused operator."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._logits: Floats = np.empty((0, manifest.spec.vocabulary.rows), np.float32)
        self._kept: dict[int, Any] = {}
        width = len(manifest.feature_layers) * manifest.spec.hidden
        self._features: Features = np.empty((0, width), feature_type(manifest))
        self._features_kept: Ids = np.zeros(1, np.int64)
        self._features_bound = False

    def step(self, ids: Sequence[int], keep: int, features: bool = False) -> Rows:
        """See `TargetSession.step`."""
        require_kept(ids, keep)
        if features:
            return self._step_with_features(ids, keep)
        if self._features_bound:
            self._unbind_features()
        self._binding.bind_ortvalue_output("logits", self._output(keep))
        self._run(ids, len(ids), "logits_to_keep", keep)
        return Rows(self._logits[:keep])

    def _step_with_features(self, ids: Sequence[int], keep: int) -> Rows:
        require_feature_layers(self.manifest)
        width = len(ids)
        if width > len(self._features):
            self._features = np.empty((width, self._features.shape[1]), self._features.dtype)
        features = self._features[:width]
        self._binding.bind_ortvalue_output(FEATURES_OUTPUT, self._value(features[None]))
        self._keep_features(ALL_ROWS)
        self._features_bound = True
        self._binding.bind_ortvalue_output("logits", self._output(keep))
        self._run(ids, width, "logits_to_keep", keep)
        return Rows(self._logits[:keep], features)

    def _keep_features(self, rows: int) -> None:
        """Set the number of rows of hidden states that the graph computes."""
        self._features_kept[0] = rows
        self._binding.bind_ortvalue_input(FEATURES_KEPT, self._value(self._features_kept))

    def _unbind_features(self) -> None:
        """Leave the output out again: nobody reads it in the next step."""
        self._binding.clear_binding_outputs()
        self.cache.bind(self._binding)
        self._keep_features(AS_MANY_AS_LOGITS)
        self._features_bound = False

    def _output(self, keep: int) -> Any:
        """The buffer's first `keep` rows as an OrtValue. The buffer grows if a step keeps more rows than before."""
        if keep > len(self._logits):
            self._logits = np.empty((keep, self._logits.shape[1]), np.float32)
            self._kept.clear()
        if keep not in self._kept:
            self._kept[keep] = self._value(self._logits[None, :keep])
        return self._kept[keep]


class FusedDraft(GraphSession):
    """A draft's session, for attention in one fused operator. `step` leaves out the output `logits`, to save time."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._outputs: dict[int, tuple[Ids, Floats, Any, Any]] = {}
        self._features: Features = np.zeros((0, feature_columns(manifest)), feature_type(manifest))
        self._features_bound = False

    def step(self, ids: Sequence[int], draft_length: int, features: Features | None = None) -> tuple[Ids, Floats]:
        """See `DraftSession.step`. The graph appends the masks itself, with the last row of features."""
        require_drafts(ids, draft_length)
        if features is not None:
            require_features(ids, features)
            self._bind_features(features, draft_length)
        elif self._features_bound:
            self._leave_out_features()
        drafts, probabilities, ids_value, probabilities_value = self._output(draft_length)
        self._binding.bind_ortvalue_output("draft_ids", ids_value)
        self._binding.bind_ortvalue_output("draft_probabilities", probabilities_value)
        self._run_draft(ids, draft_length)
        return drafts[0], probabilities[0]

    def logits(self, ids: Sequence[int], draft_length: int) -> Floats:
        """See `DraftSession.logits`."""
        logits = np.empty((1, draft_length, self.manifest.columns), np.float32)
        self._binding.bind_ortvalue_output("logits", self._value(logits))
        self.step(ids, draft_length)
        self._binding.clear_binding_outputs()
        self.cache.bind(self._binding)
        rows: Floats = logits[0]
        return rows

    def _run_draft(self, ids: Sequence[int], draft_length: int) -> None:
        self._run(ids, len(ids) + draft_length - 1, "draft_length", draft_length)

    def _bind_features(self, features: Features, draft_length: int) -> None:
        """Feed these rows, and the last one again where the graph has more tokens (see `_feature_rows`)."""
        rows = self._feature_rows(len(features), draft_length)
        if rows > len(self._features):
            self._features = np.zeros((rows, self._features.shape[1]), self._features.dtype)
        self._features[: len(features)] = features
        self._features[len(features) : rows] = features[-1]
        self._binding.bind_ortvalue_input(FEATURES_INPUT, self._value(self._features[None, :rows]))
        self._features_bound = True

    def _feature_rows(self, real: int, draft_length: int) -> int:
        """The rows of features that the graph reads in a step of so many real tokens."""
        return real

    def _leave_out_features(self) -> None:
        """Feed what the graph has where the input is left out: one row of zeros, for all tokens."""
        self._features[:1] = 0
        self._binding.bind_ortvalue_input(FEATURES_INPUT, self._value(self._features[None, :1]))
        self._features_bound = False

    def _output(self, draft_length: int) -> tuple[Ids, Floats, Any, Any]:
        if draft_length not in self._outputs:
            drafts = np.empty((1, draft_length), np.int64)
            probabilities = np.empty((1, draft_length), np.float32)
            self._outputs[draft_length] = (drafts, probabilities, self._value(drafts), self._value(probabilities))
        return self._outputs[draft_length]


class PositionsSession(GraphSession):
    """A GraphSession on a graph of the portable variant, which has the input `position_ids`."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        super().__init__(folder, manifest, provider, threads)
        self._positions: Ids = np.arange(manifest.kv_rows)[None]

    def _bind_positions(self, width: int) -> None:
        super()._bind_positions(width)
        rows = self._positions[:, self.length : self.length + width]
        self._binding.bind_ortvalue_input("position_ids", self._value(rows))


class PortableTarget(PositionsSession, FusedTarget):
    """A target's session, for attention in plain operators."""


class PortableDraft(PositionsSession, FusedDraft):
    """A draft's session, for attention in plain operators. The masks are ordinary tokens of the step."""

    def _run_draft(self, ids: Sequence[int], draft_length: int) -> None:
        tokens = [*ids, *mask_tokens(self.manifest, draft_length)]
        self._run(tokens, len(tokens), "logits_to_keep", draft_length)

    def _feature_rows(self, real: int, draft_length: int) -> int:
        return real + draft_length - 1
