"""Drivers of exported graphs for the parity check. They share no code with the runtime, so that each checks the other.

A driver holds the KV rows of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pard_onnx.models.manifest import GRAPH, Manifest, StaticGraph
from pard_onnx.models.precision import NO_PREPACKING
from pard_onnx.models.spec import ModelSpec

ROWS = 128  # of the KV buffers, unless more are asked for
Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
NO_ROWS: Logits = np.empty((0, 0), np.float32)


class Driver(Protocol):
    """An exported graph on one sequence."""

    length: int  # tokens in the KV rows; a smaller number makes the driver forget the tokens after it
    hidden_states: Logits  # of the last step's rows, if the graph gives them: [n, columns]

    def step(self, ids: Ids, draft_length: int = 1, features: Logits | None = None) -> Logits:
        """Append ids, and draft_length - 1 masks for a draft; logits [n, vocabulary].

        Of a target all rows that the graph gives, of a draft the last draft_length rows. features: what a draft reads
        of its target with each of the ids, [ids, columns]; None: it is left out.
        """
        ...


def drive(folder: Path, manifest: Manifest, rows: int = ROWS) -> Driver:
    """The driver of an artifact's graphs, on the CPU. rows: of the KV buffers, for graphs of dynamic shapes."""
    spec = manifest.spec
    if manifest.graphs:
        sessions = [(graph, open_session(folder / graph.file, manifest.recipe.floats)) for graph in manifest.graphs]
        caches = empty(spec, manifest.kv_dtype, manifest.kv_rows)
        return StaticDriver(sessions, spec, manifest.kv_rows, caches, floats=manifest.recipe.floats)
    session, caches = open_session(folder / GRAPH, manifest.recipe.floats), empty(spec, manifest.kv_dtype, rows)
    driver = FusedDriver if manifest.attention == "gqa" else PortableDriver
    return driver(session, spec, caches, floats=manifest.recipe.floats)


def open_session(path: Path, floats: str) -> ort.InferenceSession:
    """A session on the CPU. floats: the type of activations."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    if floats == "float16":
        options.add_session_config_entry(*NO_PREPACKING)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


Caches = dict[str, NDArray[np.generic]]


def empty(spec: ModelSpec, floats: str, rows: int) -> Caches:
    shape = (1, spec.kv_heads, rows, spec.head_dim)
    names = [f"past_key_values.{i}.{part}" for i in range(spec.layers) for part in ("key", "value")]
    return {name: np.zeros(shape, floats) for name in names}


def run(session: ort.InferenceSession, feeds: dict[str, Any], caches: Caches) -> tuple[Logits, Logits]:
    """Run the graph once and update the caches; its logits and hidden states, no rows of what it does not give."""
    names = [output.name for output in session.get_outputs() if not output.name.startswith("draft_")]
    outputs = dict(zip(names, session.run(names, feeds | caches), strict=True))
    caches.update({name: outputs[name.replace("past_key_values", "present")] for name in caches})
    logits, states = (outputs[name][0] if name in outputs else NO_ROWS for name in ("logits", "hidden_states"))
    return logits, states.astype(np.float32)


def with_features(feeds: dict[str, Any], features: Logits | None, rows: int, floats: str) -> dict[str, Any]:
    """The inputs with features of the first of `rows` rows; the others repeat the last one, as masks do."""
    if features is None:
        return feeds
    last = np.repeat(features[-1:], rows - len(features), axis=0)
    return feeds | {"target_features": np.concatenate([features, last])[None].astype(floats)}


@dataclass(slots=True)
class DynamicDriver:
    """The base of drivers of one graph of dynamic shapes."""

    session: ort.InferenceSession
    spec: ModelSpec
    caches: Caches
    length: int = 0
    floats: str = "float32"  # the type of activations
    hidden_states: Logits = field(default_factory=lambda: NO_ROWS)


class FusedDriver(DynamicDriver):
    def step(self, ids: Ids, draft_length: int = 1, features: Logits | None = None) -> Logits:
        self.length += len(ids)
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, self.length), np.int64)}
        if self.spec.pard is not None:
            feeds["draft_length"] = np.array([draft_length])
        feeds = with_features(feeds, features, len(ids), self.floats)
        logits, self.hidden_states = run(self.session, feeds, self.caches)
        return logits


def with_masks(ids: Ids, spec: ModelSpec, draft_length: int) -> Ids:
    return ids if spec.pard is None else np.append(ids, [spec.pard.mask_id] * (draft_length - 1)).astype(np.int64)


class PortableDriver(DynamicDriver):
    def step(self, ids: Ids, draft_length: int = 1, features: Logits | None = None) -> Logits:
        tokens = with_masks(ids, self.spec, draft_length)
        end = self.length + len(tokens)
        feeds = {
            "input_ids": tokens[None],
            "position_ids": np.arange(self.length, end)[None],
            "attention_mask": np.ones((1, end), np.int64),
            "logits_to_keep": np.array([draft_length if self.spec.pard else 0]),
        }
        self.length += len(ids)
        feeds = with_features(feeds, features, len(tokens), self.floats)
        logits, self.hidden_states = run(self.session, feeds, self.caches)
        return logits


@dataclass(slots=True)
class StaticDriver:
    """Graphs of fixed shapes: leading tokens go through the prefill graph, the rest through a graph with logits."""

    sessions: list[tuple[StaticGraph, ort.InferenceSession]]
    spec: ModelSpec
    rows: int
    caches: Caches = field(default_factory=dict)
    length: int = 0
    floats: str = "float32"  # the type of activations
    hidden_states: Logits = field(default_factory=lambda: NO_ROWS)

    def step(self, ids: Ids, draft_length: int = 1, features: Logits | None = None) -> Logits:
        tokens, given = with_masks(ids, self.spec, draft_length), features
        states: list[Logits] = []
        steps = [(graph, session) for graph, session in self.sessions if graph.logits]
        most = max(graph.width for graph, _ in steps)
        start, length = self.length, len(ids)
        while len(tokens) > most:
            graph, session = next(pair for pair in self.sessions if not pair[0].logits)
            part = min(graph.width, len(tokens) - most)
            states.append(self._run(graph, session, tokens[:part], given)[1])
            tokens, given = tokens[part:], None if given is None else given[min(part, len(given) - 1) :]
        graph, session = next(pair for pair in steps if pair[0].width >= len(tokens))
        rows, last = self._run(graph, session, tokens, given)
        self.hidden_states = np.concatenate([*states, last])
        self.length = start + length
        return rows[-draft_length:] if self.spec.pard else rows

    def _run(
        self, graph: StaticGraph, session: ort.InferenceSession, tokens: Ids, features: Logits | None
    ) -> tuple[Logits, Logits]:
        padding = graph.width - len(tokens)
        feeds = {
            "input_ids": np.append(tokens, [0] * padding).astype(np.int64)[None],
            "position_ids": np.arange(self.length, self.length + graph.width)[None],
            "attention_mask": np.ones((1, self.rows), np.int64),
        }
        # Of more than the part's tokens the first ones; the rows of padding repeat the last one
        features = None if features is None else features[: graph.width]
        logits, states = run(session, with_features(feeds, features, graph.width, self.floats), self.caches)
        self.length += len(tokens)
        return logits[: len(tokens)], states[: len(tokens)]
