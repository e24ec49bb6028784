"""QuantizeLinear and DequantizeLinear around products of weights, for recipes with calibrated activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from pard_onnx.export.store import Matrix
from pard_onnx.quantize.calibration.magnitudes import ActivationScales

from .tape import MICROSOFT, constant

SIXTEEN_BITS = 21  # the first opset whose operators take them; before it ONNX Runtime's own do


@dataclass
class QdqPairs:
    """Pairs of QuantizeLinear and DequantizeLinear. Ranges are symmetric, so zero points are the middle level."""

    scales: ActivationScales  # of activations; the weights' scales, one a row, are stored with them
    kind: Literal["int8", "uint8", "int16"]  # the type of activations; weights are int8
    opset: int
    _inputs: dict[ir.Value, ir.Value] = field(default_factory=dict)

    @property
    def domain(self) -> str:
        return MICROSOFT if self.kind == "int16" and self.opset < SIXTEEN_BITS else ""

    def quantize_input(self, tape: ir.tape.Tape, x: ir.Value | None, name: str) -> ir.Value | None:
        """The input x of the matrix `name`, rounded; matrices that read the same x share the pair."""
        if x is None:
            return None
        if x not in self._inputs:
            self._inputs[x] = self._pair(tape, x, f"{name}.input", self.scales.inputs[name])
        return self._inputs[x]

    def quantize_output(self, tape: ir.tape.Tape, product: ir.Value, name: str) -> ir.Value:
        """The product of the matrix `name`, rounded if it has a scale; logits have none."""
        scale = self.scales.outputs.get(name)
        return product if scale is None else self._pair(tape, product, f"{name}.output", scale)

    def dequantize_weight(self, tape: ir.tape.Tape, matrix: Matrix, axis: int) -> ir.Value:
        """The stored matrix in floats; axis: of the rows."""
        zero = constant(f"zeros.int8.{matrix.rows}", np.zeros(matrix.rows, np.int8))
        inputs = [matrix.parts["weight"], matrix.parts["scale"], zero]
        return tape.op("DequantizeLinear", inputs, {"axis": axis}, domain=self.domain)

    def _pair(self, tape: ir.tape.Tape, x: ir.Value, name: str, scale: np.float32) -> ir.Value:
        zero = constant(f"zero.{self.kind}", np.array(128 if self.kind == "uint8" else 0, self.kind))
        parameters = [constant(f"{name}.scale", np.array(scale, np.float32)), zero]
        rounded = tape.op("QuantizeLinear", [x, *parameters], domain=self.domain)
        out = tape.op("DequantizeLinear", [rounded, *parameters], domain=self.domain)
        out.type = x.type
        return out
