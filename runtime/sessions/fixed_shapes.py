"""Sessions on graphs of fixed shapes. A step runs in one graph or several, and is padded to their widths.

Padding tokens come after the real tokens: no real token attends to them, and the next step overwrites their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.manifest import Manifest, StaticGraph
from pard_onnx.runtime.providers.fit import FEATURES_INPUT, FEATURES_OUTPUT
from pard_onnx.runtime.providers.opening import open_graph
from pard_onnx.runtime.providers.table import Provider, onnxruntime
from pard_onnx.runtime.providers.threads import Threads

from .kv_cache import KvCache
from .session import (
    BoundSession,
    Features,
    Floats,
    Ids,
    Rows,
    feature_type,
    mask_tokens,
    require_drafts,
    require_feature_layers,
    require_features,
    require_kept,
    run_graph,
)

GraphCall = tuple[StaticGraph, int]  # a graph, and the number of the step's tokens that it runs


def plan_calls(graphs: Sequence[StaticGraph], tokens: int, kept: int) -> list[GraphCall]:
    """The calls of a step of so many tokens, in order; kept: the number of last tokens whose outputs are needed.

    While more tokens are left than the widest graph with outputs can run, tokens whose outputs are not needed run in
    the graph without outputs. The last tokens run in the narrowest graph that is wide enough.
    """
    with_outputs = sorted((graph for graph in graphs if graph.logits), key=lambda graph: graph.width)
    without_outputs = [graph for graph in graphs if not graph.logits]
    widest = with_outputs[-1]
    out: list[GraphCall] = []
    while tokens > widest.width:
        unkept = tokens - kept
        graph = without_outputs[0] if without_outputs and unkept > widest.width else widest
        count = min(graph.width, tokens if graph.logits else unkept)
        out.append((graph, count))
        tokens -= count
    return [*out, (next(graph for graph in with_outputs if graph.width >= tokens), tokens)]


class FixedGraph:
    """One graph of fixed shapes in its session, with all buffers bound that keep their place."""

    def __init__(
        self, path: Path, graph: StaticGraph, rows: int, outputs: dict[str, NDArray[Any]], session: Any
    ) -> None:
        """rows: of the KV cache. outputs: by name, the array that an output is written to."""
        self._value = onnxruntime().OrtValue.ortvalue_from_numpy
        self._path, self._session, self.width = path, session, graph.width
        self.binding = session.io_binding()
        self._ids: Ids = np.zeros((1, graph.width), np.int64)
        self._positions: Ids = np.zeros((1, graph.width), np.int64)
        self._inputs = {"input_ids": self._value(self._ids), "position_ids": self._value(self._positions)}
        self._features: Features | None = None  # what is fed at present; None where nothing ever was
        self.outputs: dict[str, NDArray[Any]] = {}
        self.binding.bind_ortvalue_input("attention_mask", self._value(np.ones((1, rows), np.int64)))
        for name, array in outputs.items():
            self.bind_output(name, array)

    def bind_output(self, name: str, array: NDArray[Any]) -> None:
        """Write this output to this array from now on."""
        self.outputs[name] = array
        self.binding.bind_ortvalue_output(name, self._value(array[None]))

    def unbind_output(self, name: str) -> None:
        """Write this output no longer. The KV cache must be bound again afterwards."""
        del self.outputs[name]
        self.binding.clear_binding_outputs()
        for other, array in self.outputs.items():
            self.bind_output(other, array)

    def feed_features(self, features: Features, row_type: np.dtype[Any]) -> None:
        """Add these rows to the step's first tokens, and the last of them to the others."""
        if self._features is None:
            self._features = np.zeros((1, self.width, features.shape[1]), row_type)
            self._inputs[FEATURES_INPUT] = self._value(self._features)
        self._features[0, : len(features)] = features
        self._features[0, len(features) :] = features[-1]

    def leave_out_features(self) -> None:
        """Add nothing to the next steps' tokens, as where the input is left out."""
        if self._features is not None:
            self._features[:] = 0

    def run(self, ids: Sequence[int], start: int, cache: KvCache) -> None:
        """Run a step of these tokens, whose KV rows begin at `start`."""
        self._ids[0, : len(ids)] = ids
        self._ids[0, len(ids) :] = ids[-1]
        self._positions[0] = np.arange(start, start + self.width)
        for name, value in self._inputs.items():  # bound again, since a provider other than the CPU copies when binding
            self.binding.bind_ortvalue_input(name, value)
        run_graph(self._path, cache, self._session, self.binding)


class FixedShapesSession(BoundSession):
    """What the target's and the draft's session share."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: Provider,
        threads: Threads,
        names: dict[str, tuple[type[np.generic], tuple[int, ...]]],
    ) -> None:
        """names: of the outputs to read, with the type and the shape of a row."""
        self._graphs: dict[int, FixedGraph] = {}  # by width
        for graph in manifest.graphs:
            path = folder / graph.file
            session = open_graph(path, manifest, provider, threads)
            outputs = {n: np.empty((graph.width, *row), t) for n, (t, row) in names.items() if graph.logits}
            self._graphs[graph.width] = FixedGraph(path, graph, manifest.kv_rows, outputs, session)
        super().__init__(manifest, provider, [graph.binding for graph in self._graphs.values()])

    def _run(self, tokens: Sequence[int], kept: int, features: Features | None = None) -> dict[str, NDArray[Any]]:
        """Append the tokens; returns the rows of each output, the last `kept` ones at least, in buffers that the next
        step overwrites. features: of a draft's tokens, see `DraftSession.step`."""
        start, end = self.length, self._end_of_step(len(tokens))
        outputs: dict[str, list[NDArray[Any]]] = {}
        calls = plan_calls(self.manifest.graphs, len(tokens), kept)
        for graph, count in calls:
            fixed, first = self._graphs[graph.width], start - self.length
            if features is None:
                fixed.leave_out_features()
            else:
                rows = features[first : first + count]
                fixed.feed_features(rows if len(rows) else features[-1:], feature_type(self.manifest))
            fixed.run(tokens[first : first + count], start, self.cache)
            start += count
            for name, array in fixed.outputs.items():
                outputs.setdefault(name, []).append(array[:count] if len(calls) == 1 else array[:count].copy())
        self.cache.length = end
        return {name: rows[0] if len(rows) == 1 else np.concatenate(rows) for name, rows in outputs.items()}


class FixedShapesTarget(FixedShapesSession):
    """A target's session."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        row = (manifest.spec.vocabulary.rows,)
        super().__init__(folder, manifest, provider, threads, {"logits": (np.float32, row)})
        self._features_bound = False

    def step(self, ids: Sequence[int], keep: int, features: bool = False) -> Rows:
        """See `TargetSession.step`."""
        require_kept(ids, keep)
        if features != self._features_bound:
            require_feature_layers(self.manifest)
            self._bind_features(features)
        found = self._run(ids, keep)
        return Rows(found["logits"][-keep:], found.get(FEATURES_OUTPUT))

    def _bind_features(self, wanted: bool) -> None:
        """Read the hidden states of the next steps' tokens, which graphs without logits give too; or no longer."""
        width = len(self.manifest.feature_layers) * self.manifest.spec.hidden
        for graph in self._graphs.values():
            if wanted:
                graph.bind_output(FEATURES_OUTPUT, np.empty((graph.width, width), feature_type(self.manifest)))
            else:
                graph.unbind_output(FEATURES_OUTPUT)
        if not wanted:
            self._bind_cache()
        self._features_bound = wanted


class FixedShapesDraft(FixedShapesSession):
    """A draft's session."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        outputs = {"draft_ids": (np.int64, ()), "draft_probabilities": (np.float32, ())}
        super().__init__(folder, manifest, provider, threads, outputs)  # type: ignore[arg-type]

    def step(self, ids: Sequence[int], draft_length: int, features: Features | None = None) -> tuple[Ids, Floats]:
        """See `DraftSession.step`."""
        require_drafts(ids, draft_length)
        if features is not None:
            require_features(ids, features)
        found = self._run([*ids, *mask_tokens(self.manifest, draft_length)], draft_length, features)
        return found["draft_ids"][-draft_length:], found["draft_probabilities"][-draft_length:]

    def logits(self, ids: Sequence[int], draft_length: int) -> Floats:
        """See `DraftSession.logits`."""
        columns = self.manifest.columns
        graphs = [graph for graph in self._graphs.values() if graph.outputs]
        for graph in graphs:
            graph.bind_output("logits", np.empty((graph.width, columns), np.float32))
        found = self._run([*ids, *mask_tokens(self.manifest, draft_length)], draft_length)
        logits: Floats = found["logits"][-draft_length:].copy()
        for graph in graphs:
            graph.unbind_output("logits")
        self._bind_cache()
        return logits
