"""`Job`: what to export and how, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pard_onnx.models.checkpoints.checkpoint import Checkpoint
from pard_onnx.models.devices import DEFAULT_FORM, Form, require_precision
from pard_onnx.models.errors import BadInput
from pard_onnx.models.manifest import GRAPH, KV_MARGIN, Ids, KvCacheFormat, Source, StaticGraph
from pard_onnx.models.precision import DEFAULT_PRECISION, Precision, Recipe, recipe

if TYPE_CHECKING:  # a command imports this module before it checks that onnxruntime and the export extra are installed
    from pard_onnx.quantize.draft_vocabulary import SelectedVocabulary
    from pard_onnx.quantize.packing.prepared import Prepared
    from pard_onnx.quantize.quantizer import QuantizationRequest

    from .float_export import FloatExport

DEFAULT_CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """What to export and how."""

    checkpoint: Checkpoint
    source: Source  # for the manifest
    output: Path  # a folder that does not exist, unless `force` is set
    precision: Precision = DEFAULT_PRECISION
    recipe: Recipe | None = None  # None: the precision's own; a mixed one keeps the precision as its name
    prepared: Prepared | None = None  # packed matrices of the same checkpoint; the recipe is for all others
    order: QuantizationRequest | None = None  # quantize by a named recipe instead, of the same precision
    capacity: int | None = None  # tokens; None: the model's own, at most DEFAULT_CAPACITY
    form: Form = DEFAULT_FORM
    feature_layers: tuple[int, ...] = ()  # of a target's output hidden_states; (): it has none
    kv_cache: KvCacheFormat = "float"
    vocabulary: SelectedVocabulary | None = None  # the ids that a draft's head keeps; None: all
    verify: bool = True  # compare the graphs with torch
    accept_loss: bool = False  # export a target whatever its perplexity loses
    force: bool = False  # replace an earlier export in `output`
    float_export: FloatExport | None = None  # whose graphs and weights are used, instead of a trace of the checkpoint

    def resolved_recipe(self) -> Recipe:
        """The format of every matrix as the device runs it. Raises BadInput for options that exclude one another."""
        role = self.checkpoint.spec.role
        if self.recipe is None:
            require_precision(self.form, self.precision)
        imported = self.checkpoint.quantization is not None and "int8" in self.form.device.precisions
        own = self.recipe or recipe(self.precision, imported=imported)
        used = self.runnable_recipe(self.order.recipe.formats(self.checkpoint.spec) if self.order else own)
        used.require(role)
        if used.matrices.kind == "qdq" and not self.order:
            raise BadInput(f"{self.precision}: its scales come from text; use pard-quantize --recipe {self.precision}")
        if self.checkpoint.quantization and self.order:
            raise BadInput(
                f"{self.checkpoint.path}: is quantized already ({self.checkpoint.quantization.method}); pard-export "
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

    def runnable_recipe(self, recipe: Recipe) -> Recipe:
        """The recipe as the job's device runs it; a recipe that the job states itself is not changed."""
        return recipe if self.recipe else self.form.device.runnable_recipe(recipe, self.form.floats)

    def head_ids(self) -> Ids | None:
        """The ids that the LM head gives logits of; None: all."""
        return None if self.vocabulary is None else self.vocabulary.ids

    def float_precision(self) -> Precision | None:
        """The precision of the float export that the weights come from; None: they come from a checkpoint."""
        return self.float_export.manifest.precision if self.float_export else None

    def kv_cache_before(self) -> KvCacheFormat:
        """The format of the KV cache in the graphs as they are first written."""
        return self.float_export.manifest.kv_cache if self.float_export else "float"

    def graphs(self) -> tuple[StaticGraph, ...]:
        """The graphs of fixed shapes; empty for one graph of dynamic shapes."""
        return self.form.graphs(self.checkpoint.spec.role)

    def graph_files(self) -> list[str]:
        """The names of the graphs' files."""
        return [graph.file for graph in self.graphs()] or [GRAPH]

    def kv_rows(self) -> int:
        """Rows of the KV buffers: those behind the capacity are for masks, rejected drafts and padding."""
        widest = max((graph.width for graph in self.graphs()), default=0)
        return self.resolved_capacity() + KV_MARGIN + widest

    def resolved_capacity(self) -> int:
        """Tokens that a conversation may hold. Raises BadInput for more than the model's own limit."""
        limit = self.checkpoint.spec.max_positions
        if self.capacity is None:
            return min(limit, DEFAULT_CAPACITY)
        if not 1 <= self.capacity <= limit:
            raise BadInput(f"context length {self.capacity} is not in 1..{limit}, the model's max_position_embeddings")
        return self.capacity


def requantize_job(
    float_export: FloatExport,
    output: Path,
    order: QuantizationRequest,
    *,
    kv_cache: KvCacheFormat | None = None,
    verify: bool = True,
    accept_loss: bool = False,
    force: bool = False,
) -> Job:
    """The job that quantizes a float export. The export's source, device, shapes and context length stay.

    kv_cache: another format for a KV cache in floats; None: the export's own. Raises BadInput where the export's KV
    cache is int8 already and another format is asked for.
    """
    manifest = float_export.manifest
    if kv_cache not in (None, manifest.kv_cache) and manifest.kv_cache != "float":
        raise BadInput(
            f"--kv-cache {kv_cache}: the one of {float_export.checkpoint.folder} is {manifest.kv_cache}; leave the "
            f"option out, or name the checkpoint, {manifest.source.model}"
        )
    return Job(
        float_export.checkpoint,
        manifest.source,
        output,
        order.recipe.precision,
        order=order,
        capacity=manifest.capacity,
        form=float_export.form(),
        feature_layers=manifest.feature_layers,
        kv_cache=kv_cache or manifest.kv_cache,
        verify=verify,
        accept_loss=accept_loss,
        force=force,
        float_export=float_export,
    )
