"""How far stored weights are from the checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pard_onnx.models.precision import Format

from .pack import Float, Packed, unpack


@dataclass(slots=True)
class Error:
    """Sums over weights; `relative` is the root mean square error over the weights' own."""

    squared: float = 0.0
    weight_squared: float = 0.0

    @classmethod
    def of(cls, weight: Float, packed: Packed, fmt: Format) -> Error:
        if fmt.kind == "float32":
            return cls(0.0, _square(weight))
        difference = unpack(packed, fmt)
        difference -= weight
        return cls(_square(difference), _square(weight))

    def add(self, other: Error) -> None:
        self.squared += other.squared
        self.weight_squared += other.weight_squared

    @property
    def relative(self) -> float:
        return float(np.sqrt(self.squared / self.weight_squared)) if self.weight_squared else 0.0


def _square(array: Float) -> float:
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))
