"""Embeddings: a text as one vector, made of the target's hidden states after the last norm."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.errors import BadInput, Failure
from pard_onnx.models.manifest import Manifest

from .decoding.loop import TargetModel, features_of, padded_step
from .sessions.session import do_nothing
from .tuning.steps import Widths

Pooling = Literal["mean", "last"]  # of a text's tokens: the mean of their hidden states, or the last token's
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
LAST_LAYER = -1  # as TargetFeatures.layers counts them
Vector = NDArray[np.float32]


def last_layer(manifest: Manifest, name: str) -> slice:
    """The columns of a target's features that hold the last layer. BadInput if its graph does not give it."""
    if LAST_LAYER not in manifest.feature_layers:
        raise BadInput(
            f"{name}: its graph does not give the hidden states of the last layer, which embeddings are made of; "
            f"export it with pard-export --features={','.join(map(str, (*manifest.feature_layers, LAST_LAYER)))}"
        )
    first = manifest.feature_layers.index(LAST_LAYER) * manifest.spec.hidden
    return slice(first, first + manifest.spec.hidden)


class Embedder:
    """Computes the vector of one text."""

    def __init__(self, ids: Tokens[int], pooling: Pooling, columns: slice, chunk: int, widths: Widths) -> None:
        """columns: of the last layer, see `last_layer`. chunk: tokens of a step. widths: that steps may have."""
        self._ids, self._pooling, self._columns = ids, pooling, columns
        self._chunk, self._widths = chunk, widths
        self._found: NDArray[Any] = np.zeros(1)

    def run(self, target: TargetModel, between_steps: Callable[[], None] = do_nothing) -> None:
        """Read the text from its first token. between_steps: is called between two steps, when other sequences may use
        the model."""
        target.rollback(0)
        while target.length < len(self._ids):
            fed = self._ids[target.length : target.length + self._chunk]
            rows = features_of(padded_step(target, fed, 1, self._widths))[:, self._columns].astype(np.float64)
            self._found = self._found + rows.sum(0) if self._pooling == "mean" else rows[-1]
            between_steps()

    @property
    def vector(self) -> Vector:
        """The pooled hidden states, [hidden], of length 1. Failure where they are not finite."""
        length = float(np.linalg.norm(self._found))
        if not np.isfinite(length):
            raise Failure("the hidden states of the text are not finite; the model's file or its precision is at fault")
        return (self._found / (length or 1.0)).astype(np.float32)  # a mean's factor does not change the direction
