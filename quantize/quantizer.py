"""Quantize a checkpoint by a named recipe: a format for every matrix, and packed weights if the recipe needs text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import CalibrationText, Quantization
from pard_onnx.models.precision import Recipe
from pard_onnx.quantize.algorithms.grid import Round
from pard_onnx.quantize.algorithms.mixed import budget_bytes, choose_bits, matrix_bytes, with_choices
from pard_onnx.quantize.calibration.magnitudes import ActivationScales
from pard_onnx.quantize.calibration.text import (
    SHIPPED,
    CalibrationRow,
    TextFile,
    calibration_rows,
    read_text_file,
    spread_rows,
)
from pard_onnx.quantize.packing.prepared import Formats, Prepared, Spool

from .recipes import NamedRecipe

BUDGET = "0.6"
SQUARES_ROWS = 2  # of text: mean squares of inputs hardly change with more


@dataclass(frozen=True, slots=True)
class QuantizationRequest:
    """A recipe with the options that users can give it. Raises BadInput for an option that the recipe does not take."""

    recipe: NamedRecipe
    calibration: Path | None = None  # a text file; None: the text that ships
    budget: str | None = None  # size of a mixed recipe, as `budget_bytes` takes it; None: BUDGET

    def __post_init__(self) -> None:
        if self.budget is not None and not self.recipe.mixed:
            raise BadInput(f"--budget {self.budget}: {self.recipe.name} is not mixed; take --recipe int4-mixed")
        if self.calibration is not None and not self.recipe.needs_text:
            raise BadInput(f"--calibration {self.calibration}: {self.recipe.name} looks at no text; leave it out")


@dataclass(frozen=True, slots=True)
class QuantizedWeights:
    """What the exporter needs to store a checkpoint's weights."""

    recipe: Recipe
    round: Round  # for matrices that are not in `prepared`
    prepared: Prepared | None = None
    quantization: Quantization | None = None  # the manifest's record
    scales: ActivationScales | None = None  # of recipes whose activations are quantized


@contextmanager
def quantize(
    checkpoint: Checkpoint, request: QuantizationRequest, work: Path, progress: Progress
) -> Iterator[QuantizedWeights]:
    """Weights that can be stored while the context is open.

    work: a folder for packed weights until they are exported; they take as much room as the export and are deleted at
    the end. Raises BadInput for a checkpoint that is quantized already.
    """
    named = request.recipe
    if checkpoint.quantization:
        raise BadInput(
            f"{checkpoint.path}: is quantized already (quantization_config: {checkpoint.quantization.method}); "
            "pard-export takes its integers as they are, or name the checkpoint in floats"
        )
    recipe, by_weights = named.formats(checkpoint.spec), named.algorithm.from_weights
    if not named.needs_text:
        yield QuantizedWeights(recipe, by_weights, None, Quantization(named.name, named.rounding))
        return
    text = read_text_file(request.calibration or SHIPPED)
    budget = budget_bytes(request.budget or BUDGET, checkpoint, recipe) if named.mixed else None
    tokenizer = checkpoint.tokenizer()
    rows = calibration_rows(text, tokenizer, checkpoint.spec)
    if not (named.needs_gram or named.mixed or named.qdq):
        rows = spread_rows(rows, SQUARES_ROWS)
    record = Quantization(named.name, named.rounding, _text_record(text, rows), budget)
    layers = checkpoint.spec.layers
    if named.qdq:
        # Imported here, as the modules below: torch takes seconds to import, and bad input is refused before.
        from pard_onnx.quantize.calibration.ranges import MOST_ROWS, measure_ranges

        rows = spread_rows(rows, MOST_ROWS)
        record = replace(record, calibration=_text_record(text, rows))
        ranges = measure_ranges(checkpoint, rows, lambda done: progress("calibrate", done, layers))
        yield QuantizedWeights(recipe, by_weights, None, record, ranges.scales(named.format.activations))
        return
    if budget is not None:
        from pard_onnx.quantize.calibration.sensitivity import measure_losses

        losses = measure_losses(checkpoint, recipe, rows, lambda done: progress("measure", done, layers))
        record = replace(record, choices=choose_bits(losses, budget - matrix_bytes(checkpoint, recipe)))
        recipe = with_choices(recipe, record.choices)
    from pard_onnx.quantize.calibration.rounding_pass import RoundingPass

    with TemporaryFile(dir=work) as file:
        spool = Spool(file)
        RoundingPass(checkpoint, named, Formats(recipe, checkpoint.spec.tied), spool).run(
            rows, lambda done: progress("quantize", done, layers)
        )
        yield QuantizedWeights(recipe, by_weights, spool, record)


def _text_record(text: TextFile, rows: Sequence[CalibrationRow]) -> CalibrationText:
    return CalibrationText(text.name, text.sha256, sum(len(row.ids) for row in rows))
