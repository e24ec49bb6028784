"""How far stored weights are from the checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pard_onnx.models.precision import Format

from .pack import Float, Packed, unpack


@dataclass(slots=True)
class Error:
    """Sums over weights; `relative` is the root mean square error over the weights' own.

    output, output_squared: the same of the products with calibration inputs, where there were any.
    """

    squared: float = 0.0
    weight_squared: float = 0.0
    output: float = 0.0
    output_squared: float = 0.0

    @classmethod
    def of(cls, weight: Float, packed: Packed, fmt: Format) -> Error:
        if fmt.kind == "float32":
            return cls(0.0, _square(weight))
        return cls.between(weight, unpack(packed, fmt))

    @classmethod
    def between(cls, weight: Float, rounded: Float) -> Error:
        return cls(_square(rounded - weight), _square(weight))

    def add_outputs(self, weight: Float, rounded: Float, gram: Float) -> None:
        """Of rows [n, in] and what they were rounded to; gram: X X^T of the inputs [in, in]."""
        off: Float = rounded - weight
        self.output += _inner((off @ gram).astype(np.float32, copy=False), off)
        self.output_squared += _inner((weight @ gram).astype(np.float32, copy=False), weight)

    def add(self, other: Error) -> None:
        self.squared += other.squared
        self.weight_squared += other.weight_squared
        self.output += other.output
        self.output_squared += other.output_squared

    @property
    def relative(self) -> float:
        return float(np.sqrt(self.squared / self.weight_squared)) if self.weight_squared else 0.0

    @property
    def relative_output(self) -> float | None:
        """None: nothing was multiplied."""
        return float(np.sqrt(max(0.0, self.output) / self.output_squared)) if self.output_squared else None


def _square(array: Float) -> float:
    return _inner(array, array)


def _inner(one: Float, other: Float) -> float:
    return float(np.dot(one.reshape(-1), other.reshape(-1)))
