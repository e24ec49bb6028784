"""The pass of the algorithms that see text: layer by layer, each fed by the rounded layers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checkpoints.tensors import read_tensor, require_finite
from pard_onnx.quantize.algorithms.awq import fold
from pard_onnx.quantize.algorithms.table import Round
from pard_onnx.quantize.packing.pack import Float, Packed, fit_block, in_order, unpack
from pard_onnx.quantize.packing.prepared import HEAD, Formats
from pard_onnx.quantize.packing.report import Error
from pard_onnx.quantize.packing.spool import Spool
from pard_onnx.quantize.recipes import NamedRecipe

from .layers import GROUPS, Layers
from .text import Row

AT_ONCE = 512  # rows of a matrix that are rounded together
SAMPLED = 256  # rows whose output errors are told
Progress = Callable[[int], None]  # layers done


class Rows(Protocol):
    """A matrix [n, in] that gives blocks of its rows; an array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice) -> Float: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix of the checkpoint, which stays on the disk."""

    checkpoint: Checkpoint
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.tensors[self.name].shape

    def __getitem__(self, rows: slice) -> Float:
        found = read_tensor(self.checkpoint.tensors[self.name], rows)
        require_finite(self.name, found)
        return found


@dataclass(frozen=True, slots=True)
class Pass:
    """Fills `spool` with every matrix that a layer or the head multiplies by. formats: of the recipe alone."""

    checkpoint: Checkpoint
    named: NamedRecipe
    formats: Formats
    spool: Spool

    def run(self, rows: Sequence[Row], progress: Progress) -> None:
        with torch.inference_mode():
            layers = Layers(self.checkpoint, rows)
            for index in range(self.checkpoint.spec.layers):
                self._layer(layers, index)
                progress(index + 1)
            self._head(layers.head_gram())

    def _layer(self, layers: Layers, index: int) -> None:
        prefix, spec = f"model.layers.{index}", self.checkpoint.spec
        with layers.loaded(index) as layer:
            grams = layers.grams(layer)
            if self.named.scaled:
                fold(layer, prefix, spec, self.named.format, grams, self.spool)
            for group in GROUPS:
                gram = grams.pop(group)
                rounded = self._rounding(gram)
                for name in group:
                    weight = layer.get_parameter(f"{name}.weight").data.numpy()
                    self._matrix(f"{prefix}.{name}", weight, rounded, gram, rounded_in_place=True)
            layers.advance(layer)

    def _head(self, gram: Tensor) -> None:
        name = self.formats.stored(HEAD)
        self._matrix(name, Stored(self.checkpoint, f"{name}.weight"), self._rounding(gram), gram)

    def _rounding(self, gram: Tensor) -> Round:
        algorithm = self.named.algorithm
        return algorithm.given(gram) if algorithm.given else algorithm.free

    def _matrix(self, name: str, weight: Rows, rounding: Round, gram: Tensor, rounded_in_place: bool = False) -> None:
        """Round a matrix by blocks of rows; its errors are told of some rows, spread over it."""
        count, width = weight.shape
        fmt = fit_block(self.formats.of(name), width, name)
        error, step = Error(), max(1, count // SAMPLED)

        def work(start: int) -> tuple[Packed, Error]:
            own = weight[start : start + AT_ONCE]
            packed = rounding(own, fmt)
            floats = unpack(packed, fmt)
            found = Error.between(own, floats)
            found.add_outputs(own[::step], floats[::step], gram.numpy())
            if rounded_in_place:
                own[:] = floats
            return packed, found

        def blocks() -> Iterator[Packed]:
            # A thread a block of rows: its products need no others
            for packed, found in in_order(work, range(0, count, AT_ONCE), partial(torch.set_num_threads, 1)):
                error.add(found)
                yield packed

        self.spool.add(name, fmt, blocks(), error)
