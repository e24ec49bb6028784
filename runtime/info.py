"""`PairInfo`: all that an application's about box or a bug report shows of a pair."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy
import tokenizers

from pard_onnx.models.checks import DRAFT_LIMIT
from pard_onnx.models.spec import Role

from .model import LoadedModel
from .providers.table import onnxruntime
from .sessions.device_cache import cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """What runs the models."""

    pard_onnx: str
    onnxruntime: str
    numpy: str
    tokenizers: str
    python: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One model of a pair."""

    name: str  # as it was given to `load`: a folder or a hub id
    role: Role
    commit: str | None  # of the hub's repository that the folder was fetched from; None for a local folder
    source: str  # the checkpoint that it was exported from
    source_revision: str | None  # its commit on the hub
    adapter: str | None  # the LoRA adapter that was merged into it
    family: str  # such as "qwen2"
    layers: int
    hidden_size: int
    vocabulary: int  # ids that it reads and writes
    context: int  # tokens that it was exported for
    precision: str  # "int4", ...
    formats: tuple[str, str, str]  # of most matrices, the LM head, and the embedding
    activations: str  # the type of activations
    kv_cache: str  # the type of the KV cache
    recipe: str | None  # by which it was quantized; None: rounded to nearest, or not quantized
    perplexity: float | None  # on the text that ships with this package; None: not measured
    reference_perplexity: float | None  # of the checkpoint, on the same text
    attention: str  # the variant of its graph
    device: str  # that it was exported for
    provider: str  # where it runs
    provider_reason: str  # why it runs there
    warning: str | None  # why it runs token by token; None where it does not
    weight_bytes: int  # on disk: graphs and weights, which are about what is held in memory
    cache_bytes: int  # one conversation's KV cache, once it is full
    shared: bool  # whether another pair opened it, whose memory it is


@dataclass(frozen=True, slots=True, kw_only=True)
class PairInfo:
    """A target, with or without a draft."""

    target: ModelInfo
    draft: ModelInfo | None
    # "target-dependent" if the draft reads the target's hidden states, "target-independent" if it could; None otherwise
    draft_mode: str | None
    context: int  # tokens that a conversation may hold
    kernel: str  # what computes quantized matmuls: an instruction set of this package's kernels, or "onnxruntime"
    exact: bool  # whether plain decoding and decoding with any draft give the same tokens, unless exact=False
    exact_widths: tuple[int, ...]  # numbers of tokens of the target's steps whose rows are bitwise equal; () for none
    weight_bytes: int  # of both models
    versions: Versions


def pair_info(
    models: tuple[LoadedModel[Any], LoadedModel[Any] | None], kernel: str, context: int, draft_mode: str | None
) -> PairInfo:
    """The facts of opened models. kernel, context, draft_mode: as `Engine` has them."""
    target, draft = model_info(models[0]), model_info(models[1]) if models[1] else None
    widths = models[0].tuning.widths
    return PairInfo(
        target=target,
        draft=draft,
        draft_mode=draft_mode,
        context=context,
        kernel=kernel,
        exact=widths is not None,
        exact_widths=widths.up_to(DRAFT_LIMIT + 2) if widths else (),
        weight_bytes=target.weight_bytes + (draft.weight_bytes if draft else 0),
        versions=Versions(
            pard_onnx=version("pard-onnx"),
            onnxruntime=onnxruntime().__version__,
            numpy=numpy.__version__,
            tokenizers=tokenizers.__version__,
            python=platform.python_version(),
        ),
    )


def model_info(model: LoadedModel[Any]) -> ModelInfo:
    """The facts of one model."""
    manifest, spec = model.manifest, model.manifest.spec
    source, quality, recipe = manifest.source, manifest.quality, manifest.recipe
    return ModelInfo(
        name=model.name,
        role=manifest.role,
        commit=model.artifact.commit,
        source=source.model,
        source_revision=source.revision,
        adapter=source.adapter.name if source.adapter else None,
        family=spec.family,
        layers=spec.layers,
        hidden_size=spec.hidden,
        vocabulary=spec.vocabulary.size,
        context=manifest.capacity,
        precision=manifest.precision,
        formats=(recipe.matrices.name, recipe.head.name, recipe.embedding.name),
        activations=recipe.floats,
        kv_cache=manifest.kv_dtype,
        recipe=manifest.quantization.recipe if manifest.quantization else None,
        perplexity=quality.perplexity if quality else None,
        reference_perplexity=quality.reference_perplexity if quality else None,
        attention=manifest.attention,
        device=manifest.device,
        provider=model.provider.title,
        provider_reason=model.reason,
        warning=model.warning,
        weight_bytes=manifest.weight_bytes,
        cache_bytes=cache_bytes(manifest, model.provider),
        shared=model.borrowed,
    )


def in_one_line(info: PairInfo) -> str:
    """The facts that a log shows."""
    models = [model for model in (info.target, info.draft) if model]
    named = ", ".join(f"{model.role} {model.name!r} {model.precision} on {model.provider}" for model in models)
    return f"{named}; {info.context} tokens, kernel {info.kernel}, {'exact' if info.exact else 'not exact'}"
