"""Why models run slower on this machine than they could, with the fix: what would otherwise go unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pard_onnx.models.manifest import Manifest

from . import kernels
from .providers.choice import FALLBACK, FUSED
from .providers.table import CPU, Provider


@dataclass(frozen=True, slots=True)
class Placed:
    """A model on the provider that runs it."""

    name: str
    manifest: Manifest
    provider: Provider
    reason: str = ""  # why it runs there


def slow_reasons(models: Sequence[Placed]) -> list[str]:
    """One line for each reason, which names the models and the fix; models of a pair share a line."""
    on_cpu = [model for model in models if model.provider.key == CPU.key]
    problem = kernels.problem()
    with_work = [model for model in on_cpu if uses_kernels(model.manifest)]
    out = [f"{names(with_work)}: {problem}"] if problem and with_work else []
    for model in models:
        if model.reason.startswith(FALLBACK):
            out.append(f"{model.name}: runs on {model.provider.title} as a {model.reason}")
    if portable := [model for model in on_cpu if model.manifest.attention != FUSED]:
        out.append(
            f"{names(portable)}: exported with attention in plain operators, which take longer on the CPU than one "
            "fused operator; export for the CPU with pard-export --device cpu"
        )
    if half := [model for model in on_cpu if model.manifest.recipe.floats == "float16"]:
        weights = any(model.manifest.recipe.matrices.plain for model in half)
        fix = "--precision int4" if weights else "--io-dtype fp32"
        out.append(
            f"{names(half)}: has activations in float16, which this package's CPU kernels do not take; export for the "
            f"CPU with pard-export --device cpu {fix}"
        )
    return out


def uses_kernels(manifest: Manifest) -> bool:
    """Whether this package's CPU kernels have work in the model's graph: quantized matmuls, or fused attention."""
    recipe = manifest.recipe
    formats = (recipe.matrices, recipe.head, *(fmt for _, fmt in recipe.overrides))
    quantized = any(fmt.kind == "nbits" for fmt in formats)
    return recipe.floats == "float32" and (quantized or manifest.attention == FUSED)


def names(models: Iterable[Placed]) -> str:
    return " and ".join(model.name for model in models)
