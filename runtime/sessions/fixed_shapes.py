"""Sessions on graphs of fixed shapes: a step runs in those that hold it, padded to their widths.

Padding tokens stand behind the real ones, where no real token looks and the next step writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.manifest import Manifest, StaticGraph
from pard_onnx.runtime.providers.opening import open_graph
from pard_onnx.runtime.providers.table import Provider, onnxruntime
from pard_onnx.runtime.providers.threads import Threads

from .kv_cache import KvCache
from .session import BoundSession, Floats, Ids, Rows, mask_tokens, require_drafts, require_kept, run_graph

Piece = tuple[StaticGraph, int]  # a graph, and how many tokens of the step go through it


def pieces(graphs: Sequence[StaticGraph], tokens: int, wanted: int) -> list[Piece]:
    """The calls of a step of so many tokens, in order, of which the last `wanted` need outputs.

    While more tokens are left than the widest graph with outputs holds, those that need none go through the graph
    that has none; what is left goes through the narrowest graph that holds it.
    """
    steps = sorted((graph for graph in graphs if graph.logits), key=lambda graph: graph.width)
    fills = [graph for graph in graphs if not graph.logits]
    widest = steps[-1]
    out: list[Piece] = []
    while tokens > widest.width:
        spare = tokens - wanted
        fill = fills[0] if fills and spare > widest.width else widest
        count = min(fill.width, tokens if fill.logits else spare)
        out.append((fill, count))
        tokens -= count
    return [*out, (next(graph for graph in steps if graph.width >= tokens), tokens)]


class Fixed:
    """One graph with everything bound that never moves. outputs: names, with the arrays that they are written to."""

    def __init__(
        self, path: Path, graph: StaticGraph, rows: int, outputs: dict[str, NDArray[Any]], session: Any
    ) -> None:
        self._value = onnxruntime().OrtValue.ortvalue_from_numpy
        self._path, self._session, self.width = path, session, graph.width
        self.binding = session.io_binding()
        self._ids: Ids = np.zeros((1, graph.width), np.int64)
        self._positions: Ids = np.zeros((1, graph.width), np.int64)
        self._inputs = {"input_ids": self._value(self._ids), "position_ids": self._value(self._positions)}
        self.outputs: dict[str, NDArray[Any]] = {}
        self.binding.bind_ortvalue_input("attention_mask", self._value(np.ones((1, rows), np.int64)))
        for name, array in outputs.items():
            self.bind_output(name, array)

    def bind_output(self, name: str, array: NDArray[Any]) -> None:
        """Write it there from now on."""
        self.outputs[name] = array
        self.binding.bind_ortvalue_output(name, self._value(array[None]))

    def unbind_output(self, name: str) -> None:
        """No longer; the cache must be bound again after it."""
        del self.outputs[name]
        self.binding.clear_binding_outputs()
        for other, array in self.outputs.items():
            self.bind_output(other, array)

    def run(self, ids: Sequence[int], start: int, cache: KvCache) -> None:
        """Write the rows from `start` on."""
        self._ids[0, : len(ids)] = ids
        self._ids[0, len(ids) :] = ids[-1]
        self._positions[0] = np.arange(start, start + self.width)
        for name, value in self._inputs.items():  # again: a provider off the CPU copies when binding
            self.binding.bind_ortvalue_input(name, value)
        run_graph(self._path, cache, self._session, self.binding)


class FixedShapesSession(BoundSession):
    """What target and draft share. names: of the outputs to read, with their types and a row's shape."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: Provider,
        threads: Threads,
        names: dict[str, tuple[type[np.generic], tuple[int, ...]]],
    ) -> None:
        self._fixed: dict[int, Fixed] = {}
        for graph in manifest.graphs:
            outputs = {n: np.empty((graph.width, *row), t) for n, (t, row) in names.items() if graph.logits}
            path = folder / graph.file
            session = open_graph(path, provider, threads)
            self._fixed[graph.width] = Fixed(path, graph, manifest.kv_rows, outputs, session)
        super().__init__(manifest, provider, [fixed.binding for fixed in self._fixed.values()])

    def _run(self, tokens: Sequence[int], wanted: int) -> list[NDArray[Any]]:
        """Append the tokens; each output's last `wanted` rows, in buffers that the next step overwrites."""
        start, end = self.length, self._end_of_step(len(tokens))
        found: list[list[NDArray[Any]]] = []
        plan = pieces(self.manifest.graphs, len(tokens), wanted)
        for graph, count in plan:
            fixed = self._fixed[graph.width]
            fixed.run(tokens[start - self.length : start - self.length + count], start, self.cache)
            start += count
            rows = [array[:count] for array in fixed.outputs.values()]
            if rows:
                found.append(rows if len(plan) == 1 else [array.copy() for array in rows])
        self.cache.length = end
        parts = [column[0] if len(column) == 1 else np.concatenate(column) for column in zip(*found, strict=True)]
        return [array[len(array) - wanted :] for array in parts]


class FixedShapesTarget(FixedShapesSession):
    """The model that decides."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        row = (manifest.spec.vocabulary.rows,)
        super().__init__(folder, manifest, provider, threads, {"logits": (np.float32, row)})

    def step(self, ids: Sequence[int], keep: int) -> Rows:
        """See `TargetSession.step`."""
        require_kept(ids, keep)
        (logits,) = self._run(ids, keep)
        return Rows(logits)


class FixedShapesDraft(FixedShapesSession):
    """The model that proposes."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Provider, threads: Threads) -> None:
        outputs = {"draft_ids": (np.int64, ()), "draft_probabilities": (np.float32, ())}
        super().__init__(folder, manifest, provider, threads, outputs)  # type: ignore[arg-type]

    def step(self, ids: Sequence[int], draft_length: int) -> tuple[Ids, Floats]:
        """See `DraftSession.step`."""
        require_drafts(ids, draft_length)
        drafts, probabilities, *_ = self._run([*ids, *mask_tokens(self.manifest, draft_length)], draft_length)
        return drafts, probabilities

    def logits(self, ids: Sequence[int], draft_length: int) -> Floats:
        """See `DraftSession.logits`."""
        columns = self.manifest.columns
        graphs = [fixed for fixed in self._fixed.values() if fixed.outputs]
        for fixed in graphs:
            fixed.bind_output("logits", np.empty((fixed.width, columns), np.float32))
        found: Floats = self._run([*ids, *mask_tokens(self.manifest, draft_length)], draft_length)[-1].copy()
        for fixed in graphs:
            fixed.unbind_output("logits")
        self._bind_cache()
        return found
