"""Round a checkpoint layer by layer with calibration text; each layer's input comes from the rounded layers before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor, require_finite
from pard_onnx.quantize.algorithms.column_scales import awq_scale, fold_scales, smooth_scale
from pard_onnx.quantize.algorithms.grid import Round
from pard_onnx.quantize.packing.pack import (
    Float,
    PackedRows,
    RoundingError,
    format_for_width,
    map_in_order,
    unpack,
)
from pard_onnx.quantize.packing.prepared import HEAD, Formats, Spool
from pard_onnx.quantize.recipes import NamedRecipe

from .layers import GROUPS, Layers
from .text import CalibrationRow

BLOCK_ROWS = 512  # of a matrix, which are rounded together
SAMPLED_ROWS = 256  # of a matrix, whose output errors are measured
Progress = Callable[[int], None]  # layers done


class RowBlocks(Protocol):
    """A matrix [n, in] that returns blocks of its rows. An array has this protocol."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice) -> Float: ...


@dataclass(frozen=True, slots=True)
class CheckpointMatrix:
    """A matrix of the checkpoint, whose rows are read from disk when they are needed."""

    checkpoint: Checkpoint
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.tensors[self.name].shape

    def __getitem__(self, rows: slice) -> Float:
        weight = read_tensor(self.checkpoint.tensors[self.name], rows)
        require_finite(self.name, weight)
        return weight


@dataclass(frozen=True, slots=True)
class RoundingPass:
    """Rounds every matrix of the layers and the LM head."""

    checkpoint: Checkpoint
    named: NamedRecipe
    formats: Formats  # of the recipe, without prepared matrices
    spool: Spool  # receives the packed matrices

    def run(self, rows: Sequence[CalibrationRow], progress: Progress) -> None:
        """Fill the spool, with the calibration text `rows`."""
        with torch.inference_mode():
            layers = Layers(self.checkpoint, rows)
            for index in range(self.checkpoint.spec.layers):
                self._layer(layers, index)
                progress(index + 1)
            self._head(layers.head_gram() if self.named.needs_gram else layers.head_squares())

    def _layer(self, layers: Layers, index: int) -> None:
        """Round a layer's matrices. With Gram matrices the next layer's inputs come from the rounded ones."""
        prefix, spec, gram = f"model.layers.{index}", self.checkpoint.spec, self.named.needs_gram
        with layers.loaded(index) as layer:
            inputs = layers.grams(layer) if gram else layers.advance_with_squares(layer)
            if self.named.awq:
                fold_scales(layer, prefix, spec, awq_scale(self.formats.recipe.matrices), inputs, self.spool)
            elif self.named.smooth:
                fold_scales(layer, prefix, spec, smooth_scale, inputs, self.spool)
            for group in GROUPS:
                own = inputs.pop(group)
                round_rows = self._round_rows(own)
                for name in group:
                    weight = layer.get_parameter(f"{name}.weight").data.numpy()
                    self._matrix(f"{prefix}.{name}", weight, round_rows, own, in_place=gram)
            if gram:
                layers.advance(layer)

    def _head(self, inputs: Tensor) -> None:
        name = self.formats.stored(HEAD)
        self._matrix(name, CheckpointMatrix(self.checkpoint, f"{name}.weight"), self._round_rows(inputs), inputs)

    def _round_rows(self, inputs: Tensor) -> Round:
        """The algorithm's function for matrices whose inputs have this X X^T, or these sums of squares."""
        algorithm = self.named.algorithm
        if algorithm.from_gram:
            return algorithm.from_gram(inputs)
        if algorithm.from_squares:
            return algorithm.from_squares((inputs.diagonal() if inputs.ndim == 2 else inputs).numpy())
        return algorithm.from_weights

    def _matrix(self, name: str, weight: RowBlocks, round_rows: Round, inputs: Tensor, in_place: bool = False) -> None:
        """Round a matrix by blocks of rows. Output errors are measured on some rows, spread over the matrix.

        inputs: their X X^T [in, in] or sums of squares [in]. in_place: whether the rounded weights replace those of
        `weight`.
        """
        count, width = weight.shape
        fmt = format_for_width(self.formats.of(name), width, name)
        error, step = RoundingError(), max(1, count // SAMPLED_ROWS)

        def work(start: int) -> tuple[PackedRows, RoundingError]:
            own = weight[start : start + BLOCK_ROWS]
            packed = round_rows(own, fmt)
            floats = unpack(packed, fmt)
            own_error = RoundingError.between(own, floats)
            own_error.add_outputs(own[::step], floats[::step], inputs.numpy())
            if in_place:
                own[:] = floats
            return packed, own_error

        def blocks() -> Iterator[PackedRows]:
            # Each block of rows has a thread of its own, so torch needs no further threads within a block
            for packed, own_error in map_in_order(work, range(0, count, BLOCK_ROWS), partial(torch.set_num_threads, 1)):
                error.add(own_error)
                yield packed

        self.spool.add(name, fmt, blocks(), error)
