"""`Job`: what to export and how, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEFAULT_FORM, Form, require_precision
from pard_onnx.models.draft_vocabulary import Ids
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import KV_MARGIN, KvCacheFormat, Source, StaticGraph
from pard_onnx.models.precision import DEFAULT_PRECISION, Precision, Recipe, recipe
from pard_onnx.quantize.draft_vocabulary import SelectedVocabulary
from pard_onnx.quantize.packing.imported import imported_matrices
from pard_onnx.quantize.packing.prepared import Prepared
from pard_onnx.quantize.quantizer import QuantizationRequest

from .float_export import FloatExport

DEFAULT_CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """What to export and how. output must not exist, unless `force` allows it to be replaced."""

    checkpoint: Checkpoint
    source: Source
    output: Path
    precision: Precision = DEFAULT_PRECISION
    recipe: Recipe | None = None  # None: the precision's own; a mixed one keeps the precision as its name
    prepared: Prepared | None = None  # of the same checkpoint; the recipe is for what it does not hold
    order: QuantizationRequest | None = None  # quantize by a named recipe instead, of the same precision
    capacity: int | None = None  # tokens; None: the model's own, at most DEFAULT_CAPACITY
    form: Form = DEFAULT_FORM
    kv_cache: KvCacheFormat = "float"
    vocabulary: SelectedVocabulary | None = None  # the ids that a draft's head keeps; None: all
    verify: bool = True
    force: bool = False
    exported: FloatExport | None = None  # whose graphs and weights these are, instead of a trace and a checkpoint

    def resolved_recipe(self) -> Recipe:
        role = self.checkpoint.spec.role
        if self.recipe is None:
            require_precision(self.form, self.precision)
        own = self.recipe or recipe(self.precision, imported=self.checkpoint.quantization is not None)
        used = self.fitted(self.order.recipe.formats(role) if self.order else own)
        used.require(role)
        if used.matrices.kind == "qdq" and not self.order:
            raise BadInput(f"{self.precision}: its scales come from text; use pard-quantize --recipe {self.precision}")
        if self.checkpoint.quantization and self.order:
            raise BadInput(
                f"{self.checkpoint.folder}: is quantized already ({self.checkpoint.quantization.method}); pard-export "
                "takes its integers as they are, and pard-quantize the unquantized checkpoint"
            )
        if self.kv_cache != "float" and self.form.attention != "gqa":
            raise BadInput(
                f"--kv-cache {self.kv_cache} with attention {self.form.attention}: only gqa stores int8 rows"
            )
        if self.checkpoint.quantization and self.precision == "fp16":
            raise BadInput(
                f"{self.precision}: the checkpoint's integer weights (quantization_config: "
                f"{self.checkpoint.quantization.method}) are taken as they are, beside activations in float32; "
                "choose int4, int8 or fp32 for what it holds in floats"
            )
        return used

    def fitted(self, own: Recipe) -> Recipe:
        """As the device runs it; what was given stays as it is."""
        return own if self.recipe else self.form.device.fitted(own, self.form.floats)

    def resolved_prepared(self) -> Prepared | None:
        """What was given, or else the integers of a quantized checkpoint."""
        return self.prepared or imported_matrices(self.checkpoint)

    def chosen(self) -> Ids | None:
        """The ids of the logits; None for all."""
        return None if self.vocabulary is None else self.vocabulary.ids

    def exported_in(self) -> Precision | None:
        """The precision of the export that the weights come from; None: they are a checkpoint's."""
        return self.exported.manifest.precision if self.exported else None

    def graphs(self) -> tuple[StaticGraph, ...]:
        return self.form.graphs(self.checkpoint.spec.role)

    def kv_rows(self) -> int:
        """Masks, rejected drafts and padding find room behind the capacity."""
        widest = max((graph.width for graph in self.graphs()), default=0)
        return self.resolved_capacity() + KV_MARGIN + widest

    def resolved_capacity(self) -> int:
        limit = self.checkpoint.spec.max_positions
        if self.capacity is None:
            return min(limit, DEFAULT_CAPACITY)
        if not 1 <= self.capacity <= limit:
            raise BadInput(f"context length {self.capacity} is not in 1..{limit}, the model's max_position_embeddings")
        return self.capacity


def requantized(
    exported: FloatExport,
    output: Path,
    order: QuantizationRequest,
    *,
    kv_cache: KvCacheFormat | None = None,
    verify: bool = True,
    force: bool = False,
) -> Job:
    """Quantize a float export: its source, device, shapes and context length stay, and its KV cache unless it is float.

    Raises BadInput for another int8 KV cache than it has.
    """
    manifest = exported.manifest
    if kv_cache not in (None, manifest.kv_cache) and manifest.kv_cache != "float":
        raise BadInput(
            f"--kv-cache {kv_cache}: the one of {exported.checkpoint.folder} is {manifest.kv_cache}; leave the option "
            f"out, or name the checkpoint, {manifest.source.model}"
        )
    return Job(
        exported.checkpoint,
        manifest.source,
        output,
        order.recipe.precision,
        order=order,
        capacity=manifest.capacity,
        form=exported.form(),
        kv_cache=kv_cache or manifest.kv_cache,
        verify=verify,
        force=force,
        exported=exported,
    )
