"""What a named recipe makes of a checkpoint: a format for every matrix, and prepared weights if it looks at text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from tokenizers import Tokenizer

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.checks import Progress
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import CalibrationText, Quantization
from pard_onnx.models.precision import Recipe
from pard_onnx.quantize.algorithms.mixed import budget_bytes, choose, mixed, size
from pard_onnx.quantize.algorithms.table import Round
from pard_onnx.quantize.calibration import text as texts
from pard_onnx.quantize.calibration.activations import Scales
from pard_onnx.quantize.calibration.text import Calibration, Row
from pard_onnx.quantize.packing.prepared import Formats, Prepared
from pard_onnx.quantize.packing.spool import Spool

from .recipes import NamedRecipe

BUDGET = "0.6"


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for. calibration: None for the text that ships; budget: of a mixed recipe, for `budget_bytes`."""

    named: NamedRecipe
    calibration: Path | None = None
    budget: str | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not self.named.mixed:
            raise BadInput(f"--budget {self.budget}: {self.named.name} is not mixed; take --recipe int4-mixed")
        if self.calibration is not None and not self.named.calibrated:
            raise BadInput(f"--calibration {self.calibration}: {self.named.name} looks at no text; leave it out")


@dataclass(frozen=True, slots=True)
class Quantized:
    """What the exporter needs; round: for matrices that are not prepared; scales: of static recipes."""

    recipe: Recipe
    round: Round
    prepared: Prepared | None = None
    quantization: Quantization | None = None
    scales: Scales | None = None


@contextmanager
def quantized(checkpoint: Checkpoint, order: Order, work: Path, progress: Progress) -> Iterator[Quantized]:
    """work: a folder for packed weights until they are exported; as large as the export, and empty afterwards."""
    named, role = order.named, checkpoint.spec.role
    if checkpoint.quantization:
        raise BadInput(
            f"{checkpoint.folder}: is quantized already (quantization_config: {checkpoint.quantization.method}); "
            "pard-export takes its integers as they are, or name the checkpoint in floats"
        )
    recipe, free = named.formats(role), named.algorithm.free
    if not named.calibrated:
        yield Quantized(recipe, free, None, Quantization(named.name, named.rounding))
        return
    seen = texts.read(order.calibration or texts.SHIPPED)
    budget = budget_bytes(order.budget or BUDGET, checkpoint, recipe) if named.mixed else None
    rows = texts.rows(seen, Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")), checkpoint.spec)
    told = Quantization(named.name, named.rounding, _told(seen, rows), budget)
    layers = checkpoint.spec.layers
    if named.static:
        from pard_onnx.quantize.calibration.ranges import (  # torch takes seconds to import; bad input is told before
            ranges,
            some,
        )

        rows = some(rows)
        told = replace(told, calibration=_told(seen, rows))
        found = ranges(checkpoint, rows, lambda done: progress("calibrate", done, layers))
        yield Quantized(recipe, free, None, told, found.scales(named.format.activations))
        return
    if budget is not None:
        from pard_onnx.quantize.calibration.sensitivity import units

        losses = units(checkpoint, recipe, rows, lambda done: progress("measure", done, layers))
        told = replace(told, choices=choose(losses, budget - size(checkpoint, recipe)))
        recipe = mixed(recipe, told.choices)
    from pard_onnx.quantize.calibration.calibrated import Pass

    with TemporaryFile(dir=work) as file:
        spool = Spool(file)
        Pass(checkpoint, named, Formats(recipe, checkpoint.spec.tied), spool).run(
            rows, lambda done: progress("quantize", done, layers)
        )
        yield Quantized(recipe, free, spool, told)


def _told(seen: Calibration, rows: list[Row]) -> CalibrationText:
    return CalibrationText(seen.name, seen.sha256, sum(len(row.ids) for row in rows))
