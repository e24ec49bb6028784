"""Random weights in any shape: steps take as long as the public model's, and tokens mean nothing.

Values are uniform, with the spread that models are initialized with, so activations stay in range through any number of
layers. No two matrices are equal (see widening.py for why).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pard_onnx.models.checkpoints.tensors import BLOCK_VALUES

from .widening import NEGLIGIBLE, SEED, bfloat16

DEVIATION = 0.02  # of the values of matrices: `initializer_range` of the public models


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Tensors of these shapes. Norms are ones, biases zeros; matrices are drawn."""

    shapes: Mapping[str, tuple[int, ...]]
    deviation: float = DEVIATION

    def tensor(self, name: str) -> Iterator[NDArray[np.uint16]]:
        """Yield the tensor in blocks of rows, as the bits of bfloat16."""
        shape = self.shapes[name]
        if len(shape) == 1:
            yield bfloat16(np.full(shape, 0 if name.endswith(".bias") else 1, np.float32))
            return
        random = np.random.default_rng((SEED, crc32(name.encode())))
        rows, columns = shape
        step, half = max(1, BLOCK_VALUES // columns), np.float32(self.deviation * 3**0.5)
        for start in range(0, rows, step):
            values = random.random((min(step, rows - start), columns), np.float32)
            values -= np.float32(0.5)
            values *= 2 * half
            yield bfloat16(values)


def negligible(name: str, shape: tuple[int, ...]) -> RandomWeights:
    """A matrix that costs what any matrix does, and whose results change no sum."""
    return RandomWeights({name: shape}, float(NEGLIGIBLE))
